from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from octavo_engine.server.stop_strings import StopStringFinder

# Few letters, so that stop strings occur, overlap and repeat.
texts = st.text("abc", max_size=30)
stops = st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=16)


def expected(text: str, stop_strings: list[str]) -> tuple[str, str | None]:
    """Character by character: the first place where the text ends with a stop string; the longest one there."""
    for end in range(1, len(text) + 1):
        matches = [stop for stop in stop_strings if text[:end].endswith(stop)]
        if matches:
            longest = max(matches, key=len)
            return text[: end - len(longest)], longest
    return text, None


def run(finder: StopStringFinder, pieces: list[str]) -> str:
    shown = ""
    for piece in pieces:
        shown += finder.feed(piece)
        if finder.matched is not None:
            return shown
    return shown + finder.flush()


def cut(text: str, borders: list[int]) -> list[str]:
    places = sorted({0, len(text), *(border % (len(text) + 1) for border in borders)})
    return [text[start:end] for start, end in pairwise(places)]


@given(texts, stops, st.lists(st.integers(0, 100), max_size=10))
def test_finds_the_same_whatever_the_pieces(text: str, stop_strings: list[str], borders: list[int]) -> None:
    finder = StopStringFinder(stop_strings)
    assert (run(finder, cut(text, borders)), finder.matched) == expected(text, stop_strings)


@given(texts, stops)
def test_shows_all_that_cannot_begin_a_stop_string(text: str, stop_strings: list[str]) -> None:
    finder = StopStringFinder(stop_strings)
    shown = "".join(finder.feed(letter) for letter in text if finder.matched is None)
    if finder.matched is None:
        held = text[len(shown) :]
        assert text.startswith(shown)
        assert not held or any(stop.startswith(held) for stop in stop_strings)


def test_includes_the_stop_string_if_asked() -> None:
    finder = StopStringFinder(["bc"], include_in_output=True)
    assert run(finder, ["ab", "cd"]) == "abc"


def test_takes_the_longest_of_those_that_end_together() -> None:
    finder = StopStringFinder(["c", "abc"])
    assert (run(finder, ["xab", "c"]), finder.matched) == ("x", "abc")


def test_skipped_text_is_passed_on_unsearched() -> None:
    finder = StopStringFinder(["ab"])
    assert finder.skip("ab") + finder.feed("a") + finder.flush() == "aba"
