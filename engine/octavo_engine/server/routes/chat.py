"""`/v1/chat/completions`: answer conversations, whole or as a stream."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from uuid import uuid4

from fastapi import APIRouter, Request, Response

from octavo_engine.server.errors import GENERATION_ERRORS
from octavo_engine.server.logprobs import chat_logprobs
from octavo_engine.server.prompts import chat_prompt
from octavo_engine.server.replies import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprobs,
    TokenLogprob,
)
from octavo_engine.server.sampling import chat_params, text_options
from octavo_engine.server.schemas import ChatCompletionRequest
from octavo_engine.server.serving import Admission, ServingOfApp
from octavo_engine.server.streaming import event, respond
from octavo_engine.server.text import TextDelta, TextGeneration

router = APIRouter(prefix="/v1", tags=["chat"])


@router.post(
    "/chat/completions",
    response_model=ChatCompletion,
    responses={200: {"content": {"text/event-stream": {}}}, **GENERATION_ERRORS},
)
async def create_chat_completion(request: ChatCompletionRequest, http: Request, serving: ServingOfApp) -> Response:
    """Answer the conversation."""
    with serving.open_request():
        admission = serving.admit(request.model)
        prompt = await chat_prompt(request, admission.tokenizer, serving)
        params = chat_params(request, prompt, admission.limits, admission.tokenizer.vocab_size)
        generation = serving.engine.generate([prompt], params, arrival_s=admission.arrival_s)
        texts = TextGeneration(generation, [prompt], admission.tokenizer, text_options(request))
        writer = _Writer(request, admission, texts)
        return await respond(serving, http.receive, generation, writer, streams=bool(request.stream))


@dataclass(slots=True)
class _Answer:
    """A choice as it grows."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    last: TextDelta | None = None


class _Writer:
    """Writes one request's answers in the chat format."""

    def __init__(self, request: ChatCompletionRequest, admission: Admission, texts: TextGeneration) -> None:
        self._request = request
        self._id = f"chatcmpl-{uuid4().hex}"
        self._model = admission.model
        self._created_s = admission.created_s
        self._texts = texts
        self._token_texts = admission.token_texts
        self._begun: set[int] = set()

    async def whole(self) -> ChatCompletion:
        """The answers once all have ended."""
        answers = [_Answer() for _ in range(self._request.n or 1)]
        async for deltas in self._texts.deltas():
            for delta in deltas:
                self._append(answers[delta.index], delta)
        reply: ChatCompletion = {
            "id": self._id,
            "object": "chat.completion",
            "created": self._created_s,
            "model": self._model,
            "choices": [self._choice(index, answer) for index, answer in enumerate(answers)],
            "usage": self._texts.usage,
        }
        if self._request.return_token_ids:
            reply["prompt_token_ids"] = list(self._texts.prompts[0])
        return reply

    async def events(self) -> AsyncIterator[bytes]:
        """The answers as events, one per choice and step; a choice's first one tells the role."""
        options = self._request.stream_options
        wants_usage = options is not None and options.include_usage
        is_continuous = options is not None and options.continuous_usage_stats
        async for deltas in self._texts.deltas():
            chunks = []
            for delta in deltas:
                for choice in self._chunk_choices(delta):
                    chunk = self._chunk([choice])
                    if wants_usage or is_continuous:
                        chunk["usage"] = self._texts.usage if is_continuous else None
                    if self._request.return_token_ids and "role" in choice["delta"]:
                        chunk["prompt_token_ids"] = list(self._texts.prompts[0])
                    chunks.append(event(chunk))
            if chunks:
                yield b"".join(chunks)
        if wants_usage:
            chunk = self._chunk([])
            chunk["usage"] = self._texts.usage
            yield event(chunk)

    def _append(self, answer: _Answer, delta: TextDelta) -> None:
        answer.text += delta.text
        answer.token_ids += delta.token_ids
        logprobs = self._logprobs(delta)
        if logprobs is not None:
            answer.logprobs += logprobs["content"]
        answer.last = delta

    def _choice(self, index: int, answer: _Answer) -> ChatChoice:
        last = answer.last
        choice: ChatChoice = {
            "index": index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": {"content": answer.logprobs} if self._request.logprobs else None,
            "finish_reason": (last.finish_reason if last else None) or "stop",
            "stop_reason": last.stop_reason if last else None,
        }
        if self._request.return_token_ids:
            choice["token_ids"] = answer.token_ids
        return choice

    def _chunk_choices(self, delta: TextDelta) -> list[ChatChunkChoice]:
        choices: list[ChatChunkChoice] = []
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            role: ChatDelta = {"role": "assistant", "content": ""}
            choices.append({"index": delta.index, "delta": role, "logprobs": None, "finish_reason": None})
        needs_tokens = self._request.logprobs or self._request.return_token_ids
        if delta.text or delta.finish_reason or needs_tokens:
            choices.append(self._chunk_choice(delta))
        return choices

    def _chunk_choice(self, delta: TextDelta) -> ChatChunkChoice:
        choice: ChatChunkChoice = {
            "index": delta.index,
            "delta": {"content": delta.text} if delta.text else {},
            "logprobs": self._logprobs(delta),
            "finish_reason": delta.finish_reason,
        }
        if delta.finish_reason is not None:
            choice["stop_reason"] = delta.stop_reason
        if self._request.return_token_ids:
            choice["token_ids"] = delta.token_ids
        return choice

    def _logprobs(self, delta: TextDelta) -> ChatLogprobs | None:
        return chat_logprobs(delta, self._request.top_logprobs or 0, self._token_texts)

    def _chunk(self, choices: list[ChatChunkChoice]) -> ChatCompletionChunk:
        return {
            "id": self._id,
            "object": "chat.completion.chunk",
            "created": self._created_s,
            "model": self._model,
            "choices": choices,
        }
