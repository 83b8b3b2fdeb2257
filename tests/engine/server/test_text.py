from itertools import pairwise

from engine.server.fake_core import END_TOKEN_ID
from engine.server.fake_tokenizer import ByteTokenizer
from hypothesis import given
from hypothesis import strategies as st
from octavo_engine.async_engine import Chunk
from octavo_engine.protocol import FinishReason, TokenLogprobs
from octavo_engine.server.text import SequenceText, TextDelta, TextOptions

TOKENIZER = ByteTokenizer()


def feed(
    token_ids: list[int],
    options: TextOptions,
    borders: tuple[int, ...] = (),
    reason: FinishReason = "length",
    stop_token_id: int | None = None,
) -> list[TextDelta]:
    """The deltas of tokens that arrive in chunks cut at `borders`, up to the end or a stop."""
    text = SequenceText(TOKENIZER.stream(skip_special_tokens=options.skip_special_tokens), options)
    places = sorted({0, len(token_ids), *(border for border in borders if border < len(token_ids))})
    deltas = []
    for start, end in pairwise(places):
        is_last = end == len(token_ids)
        logprobs = [TokenLogprobs(token_id, -1.0) for token_id in token_ids[start:end]]
        chunk = Chunk(0, 0, token_ids[start:end], reason if is_last else None, stop_token_id, logprobs)
        chunk.stop_token_id = stop_token_id if is_last else None
        deltas.append(text.feed(chunk))
        if deltas[-1].finish_reason:
            break
    return deltas


def joined(deltas: list[TextDelta]) -> str:
    return "".join(delta.text for delta in deltas)


@given(st.text(min_size=1, max_size=20), st.sets(st.integers(1, 60), max_size=8))
def test_characters_are_never_cut(text: str, borders: set[int]) -> None:
    deltas = feed(list(text.encode()), TextOptions(), tuple(borders))
    assert joined(deltas) == text
    assert deltas[-1].finish_reason == "length"


@given(st.sets(st.integers(1, 20), max_size=8))
def test_stop_string_ends_text_tokens_and_logprobs_wherever_chunks_are_cut(borders: set[int]) -> None:
    deltas = feed(list(b"one two three four"), TextOptions(stop_strings=["wo th"]), tuple(borders))
    assert joined(deltas) == "one t"
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", "wo th")
    token_ids = [token_id for delta in deltas for token_id in delta.token_ids]
    assert bytes(token_ids) == b"one two th"
    assert sum(len(delta.logprobs or []) for delta in deltas) == len(token_ids)


def test_offsets_count_the_characters_before_each_token() -> None:
    (delta,) = feed(list("aéb".encode()), TextOptions())
    assert delta.offsets == [0, 1, 1, 2]


def test_held_back_text_comes_out_at_the_end() -> None:
    assert joined(feed(list(b"ab st"), TextOptions(stop_strings=["stop"]), (1, 2, 3, 4))) == "ab st"


def test_unfinished_character_shows_at_the_end() -> None:
    assert joined(feed([0x61, 0xC3], TextOptions())) == "a\N{REPLACEMENT CHARACTER}"


def test_stop_token_is_not_shown_unless_asked() -> None:
    token_ids = list(b"ab.")
    hidden = TextOptions(stop_token_ids=[46])
    shown = TextOptions(stop_token_ids=[46], include_stop=True)
    assert joined(feed(token_ids, hidden, reason="stop", stop_token_id=46)) == "ab"
    deltas = feed(token_ids, shown, reason="stop", stop_token_id=46)
    assert (joined(deltas), deltas[-1].stop_reason) == ("ab.", 46)


def test_only_the_last_token_counts_as_stop_token() -> None:
    options = TextOptions(stop_token_ids=[46], min_tokens=3)
    assert joined(feed(list(b"a.b."), options, reason="stop", stop_token_id=46)) == "a.b"


def test_end_of_the_model_is_no_stop_reason() -> None:
    deltas = feed([97, END_TOKEN_ID], TextOptions(), reason="stop", stop_token_id=END_TOKEN_ID)
    assert (joined(deltas), deltas[-1].finish_reason, deltas[-1].stop_reason) == ("a", "stop", None)


def test_stop_strings_do_not_count_before_min_tokens() -> None:
    options = TextOptions(stop_strings=["ab"], min_tokens=4)
    deltas = feed(list(b"abxxab!"), options)
    assert joined(deltas) == "abxx"
