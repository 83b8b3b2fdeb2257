"""`/v1/completions`: continue texts, or token ids, whole or as a stream."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import cast
from uuid import uuid4

from fastapi import APIRouter, Request, Response

from octavo_engine.protocol import TokenLogprobs
from octavo_engine.server.errors import GENERATION_ERRORS
from octavo_engine.server.logprobs import completion_logprobs
from octavo_engine.server.prompts import completion_prompts
from octavo_engine.server.replies import Completion, CompletionChoice, CompletionLogprobs, Usage
from octavo_engine.server.sampling import completion_params, text_options
from octavo_engine.server.schemas import CompletionRequest
from octavo_engine.server.serving import Admission, ServingOfApp
from octavo_engine.server.streaming import event, respond
from octavo_engine.server.text import TextDelta, TextGeneration

router = APIRouter(prefix="/v1", tags=["completions"])


@router.post(
    "/completions",
    response_model=Completion,
    responses={200: {"content": {"text/event-stream": {}}}, **GENERATION_ERRORS},
)
async def create_completion(request: CompletionRequest, http: Request, serving: ServingOfApp) -> Response:
    """Continue each prompt."""
    with serving.open_request():
        admission = serving.admit(request.model)
        prompts = await completion_prompts(request, admission.tokenizer, serving)
        token_ids = [prompt.token_ids for prompt in prompts]
        params = completion_params(request, token_ids, admission.limits, admission.tokenizer.vocab_size)
        generation = serving.engine.generate(token_ids, params, arrival_s=admission.arrival_s)
        texts = TextGeneration(generation, token_ids, admission.tokenizer, text_options(request))
        writer = _Writer(request, admission, texts, [prompt.text for prompt in prompts])
        return await respond(serving, http.receive, generation, writer, streams=bool(request.stream))


@dataclass(slots=True)
class _Answer:
    """A choice as it grows."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    last: TextDelta | None = None


class _Writer:
    """Writes one request's answers in the completions format."""

    def __init__(
        self,
        request: CompletionRequest,
        admission: Admission,
        texts: TextGeneration,
        prompt_texts: Sequence[str],
    ) -> None:
        self._request = request
        self._id = f"cmpl-{uuid4().hex}"
        self._model = admission.model
        self._created_s = admission.created_s
        self._texts = texts
        self._prompt_texts = prompt_texts
        self._token_texts = admission.token_texts
        self._n = request.n or 1
        self._begun: set[int] = set()
        self._prompt_logprobs: dict[int, list[TokenLogprobs | None]] = {}

    async def whole(self) -> Completion:
        """The answers once all have ended."""
        answers = [_Answer() for _ in range(len(self._texts.prompts) * self._n)]
        async for deltas in self._texts.deltas():
            for delta in deltas:
                self._keep_prompt_logprobs(delta)
                _append(answers[self._index(delta)], delta)
        choices = [self._choice(answer.last, answer) for answer in answers if answer.last is not None]
        return self._reply(choices, usage=self._usage())

    async def events(self) -> AsyncIterator[bytes]:
        """The answers as events, one per choice and step."""
        options = self._request.stream_options
        wants_usage = options is not None and options.include_usage
        is_continuous = options is not None and options.continuous_usage_stats
        async for deltas in self._texts.deltas():
            chunks = []
            for delta in deltas:
                self._keep_prompt_logprobs(delta)
                if not self._is_worth_sending(delta):
                    continue
                answer = _Answer()
                _append(answer, delta)
                reply = self._reply([self._choice(delta, answer)])
                if wants_usage or is_continuous:
                    reply["usage"] = self._usage() if is_continuous else None
                chunks.append(event(reply))
            if chunks:
                yield b"".join(chunks)
        if wants_usage:
            yield event(self._reply([], usage=self._usage()))

    def _is_worth_sending(self, delta: TextDelta) -> bool:
        needs_tokens = self._request.logprobs is not None or self._request.return_token_ids
        is_first = self._index(delta) not in self._begun
        return bool(delta.text or delta.finish_reason or needs_tokens or (is_first and self._request.echo))

    def _usage(self) -> Usage:
        usage = self._texts.usage
        if self._request.max_tokens == 0:  # the token that scored the prompt is not the client's
            usage = {**usage, "completion_tokens": 0, "total_tokens": usage["prompt_tokens"]}
        return usage

    def _index(self, delta: TextDelta) -> int:
        return delta.prompt_index * self._n + delta.index

    def _keep_prompt_logprobs(self, delta: TextDelta) -> None:
        if delta.prompt_logprobs is not None:
            self._prompt_logprobs[delta.prompt_index] = delta.prompt_logprobs

    def _choice(self, delta: TextDelta, answer: _Answer) -> CompletionChoice:
        """One choice with what `answer` holds: all of it, or what one step added."""
        if self._request.max_tokens == 0:
            answer = _Answer()
        index = self._index(delta)
        is_first = index not in self._begun
        self._begun.add(index)
        echoes = bool(self._request.echo) and is_first
        prompt_text = self._prompt_texts[delta.prompt_index] if self._request.echo else ""
        choice: CompletionChoice = {
            "index": index,
            "text": prompt_text + answer.text if echoes else answer.text,
            "logprobs": self._logprobs(delta.prompt_index, answer, echoes=echoes, shift=len(prompt_text)),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if self._request.return_token_ids:
            choice["token_ids"] = answer.token_ids
            if is_first:
                choice["prompt_token_ids"] = list(self._texts.prompts[delta.prompt_index])
        return choice

    def _logprobs(self, prompt_index: int, answer: _Answer, *, echoes: bool, shift: int) -> CompletionLogprobs | None:
        num_top = self._request.logprobs
        if num_top is None:
            return None
        token_ids, entries = answer.token_ids, answer.logprobs
        offsets = [shift + offset for offset in answer.offsets]
        if echoes:
            prompt = list(self._texts.prompts[prompt_index])
            lengths = (len(self._token_texts[token_id]) for token_id in prompt)
            starts = [min(start, shift) for start in accumulate(lengths, initial=0)][:-1]
            token_ids, offsets = prompt + token_ids, starts + offsets
            entries = self._prompt_logprobs.get(prompt_index, [None] * len(prompt)) + entries
        return completion_logprobs(token_ids, entries, offsets, num_top, self._token_texts)

    def _reply(self, choices: list[CompletionChoice], *, usage: Usage | None = None) -> Completion:
        reply: Completion = {
            "id": self._id,
            "object": "text_completion",
            "created": self._created_s,
            "model": self._model,
            "choices": choices,
        }
        if usage is not None:
            reply["usage"] = usage
        return reply


def _append(answer: _Answer, delta: TextDelta) -> None:
    answer.text += delta.text
    answer.token_ids += delta.token_ids
    answer.offsets += delta.offsets
    answer.logprobs += cast("list[TokenLogprobs | None]", delta.logprobs or [])
    answer.last = delta
