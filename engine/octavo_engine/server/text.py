"""From the engine's tokens to the client's text: detokenised as tokens arrive, ended at stop strings, counted.

It works per token of a chunk where stop strings or offsets need it. It knows no HTTP and no reply format.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Protocol

from octavo_engine.async_engine import Chunk, Generation
from octavo_engine.protocol import TokenLogprobs
from octavo_engine.server.errors import ApiError
from octavo_engine.server.replies import Finish, Usage
from octavo_engine.server.stop_strings import StopStringFinder


class TextStream(Protocol):
    """Turns one sequence's tokens into text as they come: bytes of an unfinished character wait."""

    def step(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is unfinished."""

    def flush(self) -> str:
        """What an unfinished character leaves at the end."""


class Tokenizer(Protocol):
    """What the server needs of a model's tokenizer. All of it may be called from any thread."""

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The text's tokens."""

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """Each text's tokens."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The tokens' text."""

    def token_bytes(self, token_id: int) -> bytes:
        """One token's share of a text."""

    def stream(self, *, skip_special_tokens: bool = True) -> TextStream:
        """A decoder for one sequence."""

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The conversation as the model was trained to read it. Raises InvalidRequestError if the template refuses."""


@dataclass(frozen=True, slots=True)
class TextOptions:
    """How tokens become text, for all sequences of a request."""

    stop_strings: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop: bool = False
    min_tokens: int = 0
    skip_special_tokens: bool = True


@dataclass(slots=True)
class TextDelta:
    """What one answer gained. `offsets` has, per token, the characters of the answer before it."""

    prompt_index: int
    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: Finish | None = None
    stop_reason: str | int | None = None


class SequenceText:
    """One sequence's text so far."""

    def __init__(self, stream: TextStream, options: TextOptions) -> None:
        self._stream = stream
        self._options = options
        self._finder = (
            StopStringFinder(options.stop_strings, include_in_output=options.include_stop)
            if options.stop_strings
            else None
        )
        self._num_tokens = 0
        self._num_characters = 0

    def feed(self, chunk: Chunk) -> TextDelta:
        """The text that a chunk adds. `stop_reason` is a string if a stop string ended it before the engine did."""
        delta = TextDelta(chunk.prompt_index, chunk.index, prompt_logprobs=chunk.prompt_logprobs)
        pieces = []
        num_shown = len(chunk.token_ids)
        if chunk.stop_token_id is not None and not self._options.include_stop:
            num_shown -= 1
        for position, token_id in enumerate(chunk.token_ids):
            delta.token_ids.append(token_id)
            delta.offsets.append(self._num_characters)
            self._num_tokens += 1
            if position < num_shown:
                pieces.append(self._find_stop(self._stream.step(token_id)))
            if self._has_matched:
                break
        if chunk.finish_reason is not None and not self._has_matched:
            pieces.append(self._finish())
            delta.finish_reason = _finish_reason(chunk)
            if chunk.stop_token_id in self._options.stop_token_ids:
                delta.stop_reason = chunk.stop_token_id
        if self._finder and self._finder.matched is not None:
            delta.finish_reason, delta.stop_reason = "stop", self._finder.matched
        delta.text = "".join(pieces)
        if chunk.logprobs is not None:
            delta.logprobs = chunk.logprobs[: len(delta.token_ids)]
        return delta

    @property
    def _has_matched(self) -> bool:
        return self._finder is not None and self._finder.matched is not None

    def _find_stop(self, piece: str) -> str:
        self._num_characters += len(piece)
        if self._finder is None:
            return piece
        if self._num_tokens < self._options.min_tokens:
            return self._finder.skip(piece)
        return self._finder.feed(piece)

    def _finish(self) -> str:
        text = self._find_stop(self._stream.flush())
        if self._finder and not self._has_matched:
            text += self._finder.flush()
        return text


def _finish_reason(chunk: Chunk) -> Finish:
    """The engine's reason as the API names it. Raises ApiError where the sequence did not end by itself."""
    if chunk.finish_reason in ("stop", "length"):
        return chunk.finish_reason
    if chunk.finish_reason == "abort":
        raise ApiError(HTTPStatus.SERVICE_UNAVAILABLE, "the engine aborted the request", code="aborted")
    message = chunk.error or "the engine failed at this request"
    raise ApiError(HTTPStatus.BAD_REQUEST if chunk.error else HTTPStatus.INTERNAL_SERVER_ERROR, message)


class TextGeneration:
    """The texts of one HTTP request: `n` answers for each prompt, and what they cost."""

    def __init__(
        self, generation: Generation, prompts: Sequence[Sequence[int]], tokenizer: Tokenizer, options: TextOptions
    ) -> None:
        self.generation = generation
        self.prompts = prompts
        self._tokenizer = tokenizer
        self._options = options
        self._texts: dict[tuple[int, int], SequenceText] = {}
        self._num_prompt_tokens = sum(len(prompt) for prompt in prompts)
        self._num_completion_tokens = 0
        self._num_cached_tokens: dict[int, int] = {}

    async def deltas(self) -> AsyncIterator[list[TextDelta]]:
        """What the answers gained, at most one delta for each, until all have ended.

        Raises EngineDeadError or ApiError if one of them cannot end well.
        """
        async for chunks in self.generation:
            yield [self._feed(chunk) for chunk in chunks]

    @property
    def usage(self) -> Usage:
        """Token counts so far."""
        return {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": self._num_completion_tokens,
            "total_tokens": self._num_prompt_tokens + self._num_completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._num_cached_tokens.values())},
        }

    def _feed(self, chunk: Chunk) -> TextDelta:
        key = (chunk.prompt_index, chunk.index)
        text = self._texts.get(key)
        if text is None:
            stream = self._tokenizer.stream(skip_special_tokens=self._options.skip_special_tokens)
            text = self._texts[key] = SequenceText(stream, self._options)
        delta = text.feed(chunk)
        if delta.finish_reason is not None and chunk.finish_reason is None:
            self.generation.stop(*key)
        # The forks of one prompt share its blocks: only its first sequence tells of the cache.
        if chunk.index == 0 and chunk.num_cached_tokens:
            self._num_cached_tokens[chunk.prompt_index] = chunk.num_cached_tokens
        self._num_completion_tokens += len(delta.token_ids)
        return delta
