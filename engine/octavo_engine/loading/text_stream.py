"""Text from tokens as they come: what is emitted never changes later and never ends inside a character."""

from collections.abc import Callable, Sequence

# What decoders write for bytes that are no character, or not yet one.
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# Tokens that are decoded each time; older ones are dropped between two characters, beyond the hard bound anywhere.
WINDOW = 16
HARD_WINDOW = 64


class TextStream:
    """Detokenises one sequence.

    A token's text depends on its neighbours: bytes of one character spread over tokens, and some decoders strip a
    text's first space. So a window of the last tokens is decoded each time, and what it gained is emitted.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._num_emitted = 0  # characters of the window's text
        self._cut = 0  # tokens of the window that may be dropped: it ends between two characters there

    def step(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is unfinished."""
        self._window.append(token_id)
        text = self._decode(self._window)
        # One byte too few can turn the characters before it into replacements, too: byte fallback decodes a run of
        # bytes as a whole. So all of them wait.
        num_stable = len(text.rstrip(REPLACEMENT))
        if len(self._window) >= HARD_WINDOW:
            num_stable = len(text)
        piece = text[self._num_emitted : num_stable]
        self._num_emitted = max(self._num_emitted, num_stable)
        if num_stable == len(text):
            self._shorten()
        return piece

    def flush(self) -> str:
        """What an unfinished character leaves at the end."""
        text = self._decode(self._window)
        piece = text[self._num_emitted :]
        self._num_emitted = len(text)
        return piece

    def _shorten(self) -> None:
        """Between two characters: remember the point, or drop what lies before the remembered one."""
        num_tokens = len(self._window)
        if num_tokens <= WINDOW // 2 or self._cut == 0:
            self._cut = num_tokens
        elif num_tokens >= WINDOW:
            self._window = self._window[self._cut :]
            self._num_emitted = len(self._decode(self._window))
            self._cut = 0
