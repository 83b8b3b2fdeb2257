"""The engine's hot loop: schedule -> prepare -> forward -> sample -> emit.

One `EngineCore` owns the model, the KV cache and the scheduler of one device. It knows nothing of HTTP, of text or of
processes. Whoever runs it calls `step` while `has_work`.
"""

import logging
import time
from collections.abc import Callable, Sequence
from random import Random

import torch

from octavo_engine.batch import Batch, prepare
from octavo_engine.capacity import step_limit_s
from octavo_engine.config import EngineConfig
from octavo_engine.errors import InvalidRequestError
from octavo_engine.protocol import (
    AbortRequests,
    AddRequest,
    EnginePhase,
    EngineReady,
    EngineStats,
    FinishReason,
    SamplingParams,
    SequenceOutput,
    StepOutputs,
    TokenLogprobs,
)
from octavo_engine.request import Request
from octavo_engine.sampler import Sampler, compute_logprobs
from octavo_engine.scheduler import ScheduledRequest, Scheduler, Step
from octavo_engine.start import Started, start

logger = logging.getLogger(__name__)

# Rows of logits that prompt log probabilities hold at once: a long prompt's would not fit beside the KV cache.
PROMPT_LOGPROBS_ROWS = 128


class EngineCore:
    """The engine of one replica."""

    def __init__(self, config: EngineConfig, on_phase: Callable[[EnginePhase], None]) -> None:
        """Load the model and allocate the KV cache. Raises OctavoError where the user can mend it."""
        self._started: Started = start(config, on_phase)
        self.scheduler = Scheduler(self._started.scheduler_limits)
        self._model = self._started.model
        self._kv_cache = self._started.kv_cache
        self._device = self._started.device.torch_device
        self._eos_token_ids = self._started.eos_token_ids
        self._sampler = Sampler(sorted(self._eos_token_ids))
        self._seeds = Random(config.seed)
        self._pending: list[SequenceOutput] = []  # outcomes that no step brought
        self._num_steps = 0
        self._last_step_time_s = 0.0
        self._roofline_ratio = 0.0
        on_phase(EnginePhase("warming_up"))
        self._warm_up()
        on_phase(EnginePhase("ready", 1.0))

    def ready(self) -> EngineReady:
        """What the front end is told once, when requests can be answered."""
        return self._started.ready()

    @property
    def has_work(self) -> bool:
        """Whether `step` would do or say something."""
        return self.scheduler.has_work or bool(self._pending)

    def add_request(self, message: AddRequest) -> None:
        """Queue a client's request. One that can never run ends at once, with its error."""
        params = message.params
        request = Request(
            request_id=message.request_id,
            index=0,
            token_ids=list(message.prompt_token_ids),
            num_prompt_tokens=len(message.prompt_token_ids),
            params=params,
            seed=self._seeds.getrandbits(63) if params.seed is None else params.seed,
            arrival_time_s=message.arrival_time_s,
            num_forks=params.n - 1,
            prompt_logprobs=None if params.prompt_logprobs is None else [None],
        )
        try:
            self.scheduler.add(request)
        except InvalidRequestError as error:
            self._pending += [
                SequenceOutput(message.request_id, index, [], "error", error=str(error)) for index in range(params.n)
            ]

    def abort(self, message: AbortRequests) -> None:
        """End requests, or one sequence of each, wherever they stand; unknown ones have ended already."""
        for request_id in message.request_ids:
            for request in list(self.scheduler.find(request_id)):
                if message.index is None or request.index == message.index:
                    self._abort(request)

    def step(self) -> StepOutputs:
        """Compute one step and return what its sequences gained."""
        outputs, self._pending = self._pending, []
        step = self.scheduler.schedule()
        if step.scheduled:
            started = time.perf_counter()
            outputs += self._compute(step)
            self._measure(step, time.perf_counter() - started)
        return StepOutputs(outputs, self._stats())

    @torch.inference_mode()
    def _compute(self, step: Step) -> list[SequenceOutput]:
        batch = prepare(step, self.scheduler.limits.block_size, self._device)
        self._copy_blocks(batch)
        hidden = self._model.forward(batch.input_ids, batch.positions, self._kv_cache, batch.metadata)
        self._collect_prompt_logprobs(step, hidden)
        sampled = step.sampled
        token_ids, logprobs = self._sample(hidden[batch.sampled_rows], sampled)
        self.scheduler.complete(step)
        return [self._emit(*each) for each in zip(sampled, token_ids, logprobs, strict=True)]

    def _copy_blocks(self, batch: Batch) -> None:
        """Copy on write, before the step writes: all sources are read before any destination is written."""
        if batch.block_copies is not None:
            sources, destinations = batch.block_copies
            self._kv_cache[destinations] = self._kv_cache[sources]

    def _sample(
        self, hidden: torch.Tensor, requests: Sequence[Request]
    ) -> tuple[list[int], Sequence[TokenLogprobs | None]]:
        if not requests:
            return [], []
        logits = self._model.compute_logits(hidden)
        rows = [i for i, request in enumerate(requests) if request.params.logprobs is not None]
        raw_logits = logits[rows] if rows else None  # a copy: the sampler changes rows in place
        token_ids = self._sampler.sample(logits, requests)
        logprobs: list[TokenLogprobs | None] = [None] * len(requests)
        if raw_logits is not None:
            num_top = [requests[i].params.logprobs or 0 for i in rows]
            for i, each in zip(rows, compute_logprobs(raw_logits, [token_ids[i] for i in rows], num_top), strict=True):
                logprobs[i] = each
        return token_ids, logprobs

    def _emit(self, request: Request, token_id: int, logprobs: TokenLogprobs | None) -> SequenceOutput:
        """Append a token to its sequence, end the sequence if that was its last, and say so."""
        is_first = request.num_output_tokens == 0
        self.scheduler.append_token(request, token_id)
        reason = self._finish_reason(request, token_id)
        if reason:
            self.scheduler.finish(request, reason)
        prompt_logprobs, request.prompt_logprobs = request.prompt_logprobs, None
        return SequenceOutput(
            request.request_id,
            request.index,
            [token_id],
            reason,
            stop_token_id=token_id if reason == "stop" else None,
            logprobs=None if logprobs is None else [logprobs],
            num_cached_tokens=request.num_cached_tokens if is_first else 0,
            prompt_logprobs=prompt_logprobs,
        )

    def _finish_reason(self, request: Request, token_id: int) -> FinishReason | None:
        params = request.params
        may_stop = request.num_output_tokens >= params.min_tokens
        is_eos = token_id in self._eos_token_ids and not params.ignore_eos
        if may_stop and (is_eos or token_id in params.stop_token_ids):
            return "stop"
        if request.num_output_tokens >= params.max_tokens or request.num_tokens >= self._max_model_len:
            return "length"
        return None

    @property
    def _max_model_len(self) -> int:
        return self.scheduler.limits.max_model_len

    def _abort(self, request: Request) -> None:
        """A prompt that was to be forked answers for all its sequences."""
        indices = [request.index, *range(1, request.num_forks + 1)]
        self.scheduler.finish(request, "abort")
        self._pending += [SequenceOutput(request.request_id, index, [], "abort") for index in indices]

    def _collect_prompt_logprobs(self, step: Step, hidden: torch.Tensor) -> None:
        """For those who ask: the log probability of each prompt token, from the hidden state before it."""
        row = 0
        for each in step.scheduled:
            if each.request.wants_prompt_logprobs:
                self._extend_prompt_logprobs(each, hidden[row : row + each.num_tokens])
            row += each.num_tokens

    def _extend_prompt_logprobs(self, scheduled: ScheduledRequest, hidden: torch.Tensor) -> None:
        request, first = scheduled.request, scheduled.first_token
        assert request.prompt_logprobs is not None
        del request.prompt_logprobs[first + 1 :]  # a preempted prompt starts again
        targets = request.token_ids[first + 1 : min(first + len(hidden) + 1, request.num_prompt_tokens)]
        for start_row in range(0, len(targets), PROMPT_LOGPROBS_ROWS):
            chunk = targets[start_row : start_row + PROMPT_LOGPROBS_ROWS]
            logits = self._model.compute_logits(hidden[start_row : start_row + len(chunk)])
            num_top = [request.params.prompt_logprobs or 0] * len(chunk)
            request.prompt_logprobs += compute_logprobs(logits, chunk, num_top)

    def _warm_up(self) -> None:
        """Run a prompt and a decode step, so that the first client does not wait for libraries to initialise."""
        prompt = [0] * max(1, min(32, self._max_model_len - 2))
        params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
        self.add_request(AddRequest("warm-up", prompt, params, time.monotonic()))
        while self.has_work:
            self.step()
        self.scheduler = Scheduler(self._started.scheduler_limits)
        self._num_steps = 0

    def _measure(self, step: Step, duration_s: float) -> None:
        self._num_steps += 1
        self._last_step_time_s = duration_s
        capacity = self._started.capacity
        num_context_tokens = sum(each.first_token + each.num_tokens for each in step.scheduled)
        limit_s = step_limit_s(
            self._started.geometry,
            self._started.device.hardware,
            weight_bytes=capacity.weight_bytes,
            kv_bytes=num_context_tokens * capacity.kv_block_bytes // capacity.block_size,
            num_tokens=step.num_tokens,
            num_logits=len(step.scheduled),
        )
        self._roofline_ratio = limit_s / duration_s

    def _stats(self) -> EngineStats:
        scheduler, pool, counters = self.scheduler, self.scheduler.pool, self.scheduler.counters
        return EngineStats(
            num_waiting=len(scheduler.waiting),
            num_running=len(scheduler.running),
            num_kv_blocks=pool.num_blocks,
            num_used_kv_blocks=pool.num_used,
            num_cached_kv_blocks=pool.num_cached,
            num_steps=self._num_steps,
            num_prompt_tokens=counters.num_prompt_tokens,
            num_generation_tokens=counters.num_generation_tokens,
            num_preemptions=counters.num_preemptions,
            num_prefix_cache_queries=counters.num_prefix_cache_queries,
            num_prefix_cache_hits=counters.num_prefix_cache_hits,
            last_step_time_s=self._last_step_time_s,
            last_step_roofline_ratio=self._roofline_ratio,
            last_progress_s=time.monotonic(),
        )
