"""Stop strings, found in text that arrives in pieces. The result does not depend on where the pieces are cut."""

from collections.abc import Sequence


class StopStringFinder:
    """Passes text on up to the first stop string; what could be the beginning of one is held back.

    The first is the one that is complete first; of those that are complete at the same character, the longest.
    """

    def __init__(self, stop_strings: Sequence[str], *, include_in_output: bool = False) -> None:
        self._stop_strings = sorted(stop_strings, key=len, reverse=True)
        self._include = include_in_output
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str) -> str:
        """The text that is safe to show. After a match, `matched` is set and nothing more may be fed."""
        text = self._held + text
        match = self._first_match(text)
        if match is not None:
            start, self.matched = match
            self._held = ""
            return text[: start + len(self.matched)] if self._include else text[:start]
        num_held = self._num_held(text)
        shown = len(text) - num_held
        self._held = text[shown:]
        return text[:shown]

    def skip(self, text: str) -> str:
        """Pass on text in which no stop string counts."""
        return self.flush() + text

    def flush(self) -> str:
        """What was held back; the text ends here."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str) -> tuple[int, str] | None:
        """Start and string of the match that ends first."""
        best: tuple[int, str] | None = None
        for stop in self._stop_strings:
            start = text.find(stop)
            # Longest first, so that a later one has to end strictly earlier.
            if start >= 0 and (best is None or start + len(stop) < best[0] + len(best[1])):
                best = start, stop
        return best

    def _num_held(self, text: str) -> int:
        """The length of the longest end of `text` that begins a stop string."""
        longest = 0
        for stop in self._stop_strings:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
