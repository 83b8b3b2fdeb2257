"""Log probabilities in OpenAI's two formats."""

from collections.abc import Sequence
from typing import Final

from octavo_engine.protocol import TokenLogprobs
from octavo_engine.server.replies import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob
from octavo_engine.server.text import TextDelta, Tokenizer

# JSON knows no infinity; this is what a token that cannot come is given, as in OpenAI's own answers.
SMALLEST_LOGPROB: Final = -9999.0


class TokenTexts:
    """The text of single tokens, remembered: twenty alternatives a token are twenty look-ups, not twenty decodings."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, tuple[str, list[int]]] = {}

    def __getitem__(self, token_id: int) -> str:
        return self.with_bytes(token_id)[0]

    def with_bytes(self, token_id: int) -> tuple[str, list[int]]:
        """A token's text, in which parts of characters are U+FFFD, and its bytes, which clients can join."""
        known = self._texts.get(token_id)
        if known is None:
            content = self._tokenizer.token_bytes(token_id)
            known = self._texts[token_id] = content.decode("utf-8", "replace"), list(content)
        return known


def completion_logprobs(
    token_ids: Sequence[int],
    logprobs: Sequence[TokenLogprobs | None],
    offsets: Sequence[int],
    num_top: int,
    texts: TokenTexts,
) -> CompletionLogprobs:
    """The completions format: parallel lists. None stands for a prompt's first token, which nothing predicts."""
    return {
        "tokens": [texts[token_id] for token_id in token_ids],
        "token_logprobs": [None if entry is None else _finite(entry.logprob) for entry in logprobs],
        "top_logprobs": [None if entry is None else _top_by_text(entry, num_top, texts) for entry in logprobs],
        "text_offset": list(offsets),
    }


def _top_by_text(entry: TokenLogprobs, num_top: int, texts: TokenTexts) -> dict[str, float]:
    """The likeliest tokens and the chosen one. Where two have the same text, the likelier counts."""
    top: dict[str, float] = {}
    for token_id, logprob in [*entry.top[:num_top], (entry.token_id, entry.logprob)]:
        top.setdefault(texts[token_id], _finite(logprob))
    return top


def chat_logprobs(delta: TextDelta, num_top: int, texts: TokenTexts) -> ChatLogprobs | None:
    """The chat format: one object per token."""
    if delta.logprobs is None:
        return None
    return {"content": [_token_logprob(entry, num_top, texts) for entry in delta.logprobs]}


def _token_logprob(entry: TokenLogprobs, num_top: int, texts: TokenTexts) -> TokenLogprob:
    top = [_top_logprob(token_id, logprob, texts) for token_id, logprob in entry.top[:num_top]]
    return {**_top_logprob(entry.token_id, entry.logprob, texts), "top_logprobs": top}


def _top_logprob(token_id: int, logprob: float, texts: TokenTexts) -> TopLogprob:
    text, content = texts.with_bytes(token_id)
    return {"token": text, "logprob": _finite(logprob), "bytes": content}


def _finite(logprob: float) -> float:
    return max(logprob, SMALLEST_LOGPROB)
