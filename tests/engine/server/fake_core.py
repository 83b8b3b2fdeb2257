"""Cores without a model, for tests of everything in front of the engine.

`EchoCore` repeats the prompt: token k of sequence i is prompt[(k + i) % len(prompt)], one token per sequence and step.
Its vocabulary is the 256 bytes and an end token, so texts of tests are what they look like.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from octavo_engine.config import EngineConfig
from octavo_engine.errors import ModelSourceError
from octavo_engine.protocol import (
    AbortRequests,
    AddRequest,
    EnginePhase,
    EngineReady,
    EngineStats,
    SamplingParams,
    SequenceOutput,
    StepOutputs,
    TokenLogprobs,
)

END_TOKEN_ID = 256
VOCAB_SIZE = 257
MAX_MODEL_LEN = 2048
MAX_NUM_SEQS = 64
NUM_KV_BLOCKS = 1000
BLOCK_SIZE = 16
CRASH_TOKEN_ID = 1  # CrashingCore ends its process at a prompt that begins with it


@dataclass
class FakeSequence:
    request_id: str
    index: int
    prompt: list[int]
    params: SamplingParams
    num_tokens: int = 0

    @property
    def num_blocks(self) -> int:
        return -(-(len(self.prompt) + self.num_tokens) // BLOCK_SIZE)


class EchoCore:
    step_time_s = 0.0
    load_time_s = 0.0

    def __init__(self, config: EngineConfig, on_phase: Callable[[EnginePhase], None]) -> None:
        self.max_model_len = config.max_model_len or MAX_MODEL_LEN
        for percent in range(0, 101, 10):
            on_phase(EnginePhase("loading", percent / 100, "weights"))
            time.sleep(self.load_time_s / 11)
        on_phase(EnginePhase("warming_up"))
        self.running: list[FakeSequence] = []
        self.pending: list[SequenceOutput] = []
        self.num_steps = 0
        self.num_prompt_tokens = 0
        self.num_generation_tokens = 0

    def ready(self) -> EngineReady:
        memory = {"weights": {"predicted": 1000, "actual": 1010}, "kv_cache": {"predicted": 500, "actual": 500}}
        return EngineReady(
            self.max_model_len, MAX_NUM_SEQS, 512, NUM_KV_BLOCKS, BLOCK_SIZE, memory, "fake", {"attention": "echo"}
        )

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.pending)

    def add_request(self, request: AddRequest) -> None:
        if len(request.prompt_token_ids) >= self.max_model_len:
            self.pending += [
                SequenceOutput(request.request_id, index, [], finish_reason="error", error="the prompt is too long")
                for index in range(request.params.n)
            ]
            return
        self.num_prompt_tokens += len(request.prompt_token_ids)
        for index in range(request.params.n):
            sequence = FakeSequence(request.request_id, index, request.prompt_token_ids, request.params)
            self.running.append(sequence)

    def abort(self, request: AbortRequests) -> None:
        for sequence in list(self.running):
            if sequence.request_id in request.request_ids and request.index in (None, sequence.index):
                self.running.remove(sequence)
                self.pending.append(SequenceOutput(sequence.request_id, sequence.index, [], finish_reason="abort"))

    def step(self) -> StepOutputs:
        time.sleep(self.step_time_s)
        outputs, self.pending = self.pending, []
        for sequence in list(self.running):
            output = self._advance(sequence)
            outputs.append(output)
            if output.finish_reason:
                self.running.remove(sequence)
        self.num_steps += 1
        return StepOutputs(outputs, self._stats())

    def _advance(self, sequence: FakeSequence) -> SequenceOutput:
        params, prompt = sequence.params, sequence.prompt
        token_id = prompt[(sequence.num_tokens + sequence.index) % len(prompt)]
        sequence.num_tokens += 1
        self.num_generation_tokens += 1
        is_stop = token_id in params.stop_token_ids or (token_id == END_TOKEN_ID and not params.ignore_eos)
        is_stop = is_stop and sequence.num_tokens >= params.min_tokens
        is_full = sequence.num_tokens >= params.max_tokens
        is_first = sequence.num_tokens == 1
        return SequenceOutput(
            sequence.request_id,
            sequence.index,
            [token_id],
            finish_reason="stop" if is_stop else "length" if is_full else None,
            stop_token_id=token_id if is_stop else None,
            logprobs=None if params.logprobs is None else [fake_logprobs(token_id, params.logprobs)],
            num_cached_tokens=len(prompt) // BLOCK_SIZE * BLOCK_SIZE if is_first else 0,
            queue_time_s=0.25 if is_first and sequence.index == 0 else None,
            prompt_logprobs=self._prompt_logprobs(sequence) if is_first else None,
        )

    def _prompt_logprobs(self, sequence: FakeSequence) -> list[TokenLogprobs | None] | None:
        count = sequence.params.prompt_logprobs
        if count is None or sequence.index:
            return None
        return [None, *(fake_logprobs(token_id, count) for token_id in sequence.prompt[1:])]

    def _stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self.running),
            num_kv_blocks=NUM_KV_BLOCKS,
            num_used_kv_blocks=sum(sequence.num_blocks for sequence in self.running),
            num_steps=self.num_steps,
            num_prompt_tokens=self.num_prompt_tokens,
            num_generation_tokens=self.num_generation_tokens,
            last_step_time_s=self.step_time_s,
            last_step_roofline_ratio=0.5,
            last_progress_s=time.monotonic(),
        )


def fake_logprobs(token_id: int, count: int) -> TokenLogprobs:
    top = [((token_id + rank) % VOCAB_SIZE, -0.5 * (rank + 1)) for rank in range(count)]
    return TokenLogprobs(token_id, -0.5, top)


class SlowCore(EchoCore):
    step_time_s = 0.02


class LoadingCore(EchoCore):
    load_time_s = 2.0


class HangingCore(EchoCore):
    """A step that never ends."""

    def step(self) -> StepOutputs:
        time.sleep(3600)
        raise AssertionError


class CrashingCore(SlowCore):
    """Ends its process without a word when it sees a certain prompt."""

    def add_request(self, request: AddRequest) -> None:
        if request.prompt_token_ids[0] == CRASH_TOKEN_ID:
            os._exit(7)
        super().add_request(request)


class RaisingCore(EchoCore):
    """A defect in a step."""

    def step(self) -> StepOutputs:
        raise RuntimeError("the step went wrong")


class FailingCore(EchoCore):
    """A model that is not there."""

    def __init__(self, config: EngineConfig, on_phase: Callable[[EnginePhase], None]) -> None:
        raise ModelSourceError(f"there is no model at {config.model}")
