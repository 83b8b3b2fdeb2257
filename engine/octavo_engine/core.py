"""The engine's hot loop: schedule -> launch -> complete -> emit.

On a device that works while the host goes on, the next step is launched before the one before it is completed: the
same four pieces, in another order. One `EngineCore` owns the model, the KV cache and the scheduler of one device. It
knows nothing of HTTP, of text or of processes. Whoever runs it calls `step` while `has_work`.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Callable
from random import Random

from octavo_kernels.kernel_cache import report_compilations

from octavo_engine.config import EngineConfig
from octavo_engine.errors import InvalidRequestError
from octavo_engine.protocol import (
    AbortRequests,
    AddRequest,
    EnginePhase,
    EngineReady,
    EngineStats,
    FinishReason,
    Seat,
    SequenceOutput,
    StepOutputs,
    TokenLogprobs,
)
from octavo_engine.request import Request, RequestStatus
from octavo_engine.runner import Launched, Runner
from octavo_engine.scheduler import Scheduler, Step
from octavo_engine.start import Started, start
from octavo_engine.step_roofline import scheduled_step_limit_s
from octavo_engine.warm_up import warm_ups

logger = logging.getLogger(__name__)

# Tokens that a step may bring each sequence where the host is slower than the device: more would delay newcomers.
MAX_ROUNDS = 8
# Weight of the latest step in the running means of what steps cost.
NEWEST_SHARE = 0.2


class EngineCore:
    """The engine of one replica, or one rank of it."""

    def __init__(self, config: EngineConfig, on_phase: Callable[[EnginePhase], None], seat: Seat | None = None) -> None:
        """Load the model and allocate the KV cache. Raises OctavoError where the user can mend it.

        seat: this rank's, of several that hold the model together and take the same steps
        """
        self._started: Started = start(config, on_phase, seat)
        self.ranks = self._started.ranks
        self.scheduler = Scheduler(self._started.scheduler_limits)
        self._eos_token_ids = self._started.eos_token_ids
        self._seeds = Random(config.seed)
        self._pending: list[SequenceOutput] = []  # outcomes that no step brought
        self._under_way: deque[Launched] = deque()
        self._num_steps = 0
        self._last_step_time_s = 0.0
        self._roofline_ratio = 0.0
        self._host_s = self._round_s = 0.0  # running means: the host's time for a step, the device's for one round
        self._busy_since_s = 0.0  # when the last step returned, if there was more to do
        self._runner = self._make_runner(on_phase)
        self._num_ahead = 1 if self._runner.is_asynchronous else 0
        self._warm_up()
        on_phase(EnginePhase("ready", 1.0))

    def _make_runner(self, on_phase: Callable[[EnginePhase], None]) -> Runner:
        """Capture graphs while the weights arrive, then wait for those."""
        weights = self._started.under_way

        def on_captured(fraction: float) -> None:
            loaded = weights.progress
            on_phase(EnginePhase("loading", loaded) if loaded < 1 else EnginePhase("warming_up", fraction))

        def on_loaded(fraction: float, text: str) -> None:
            if fraction < 1:
                on_phase(EnginePhase("loading", fraction, text))

        on_captured(0.0)
        with weights:
            runner = Runner(self._started, on_captured)
        self._started.finish_loading(on_loaded)
        on_phase(EnginePhase("warming_up", 1.0))
        return runner

    def ready(self) -> EngineReady:
        """What the front end is told once, when requests can be answered."""
        return self._started.ready()

    @property
    def has_work(self) -> bool:
        """Whether `step` would do or say something."""
        return self.scheduler.has_work or bool(self._under_way) or bool(self._pending)

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

    def step(self, max_rounds: int | None = None) -> StepOutputs:
        """Give the device a step, and return what its sequences gained by the one that is done.

        max_rounds: tokens that a sequence may get by it; None: as many as this rank thinks good
        """
        outputs, self._pending = self._pending, []
        step = self.scheduler.schedule(self.max_rounds() if max_rounds is None else max_rounds)
        self._note_admitted(step)
        if step.scheduled:
            self._under_way.append(self._runner.launch(step))
            self.scheduler.launch(step)
        waited_s = 0.0
        if len(self._under_way) > self._num_ahead or (self._under_way and not step.scheduled):
            launched, waiting_since_s = self._under_way.popleft(), time.perf_counter()
            token_ids = launched.wait()
            waited_s = time.perf_counter() - waiting_since_s
            outputs += self._complete(launched, token_ids)
            self._measure(launched)
        self._measure_host(waited_s)
        return StepOutputs(outputs, self._stats())

    def _note_admitted(self, step: Step) -> None:
        for request in step.admitted:
            if request.queue_time_s is None:  # the first time, not after a preemption
                request.queue_time_s = time.monotonic() - request.arrival_time_s

    def max_rounds(self) -> int:
        """As many tokens for each sequence as keep the device busy while the host prepares the next step."""
        if not 0 < self._round_s < self._host_s or not self._runner.can_repeat(self.scheduler.running):
            return 1
        return min(MAX_ROUNDS, math.ceil(self._host_s / self._round_s))

    def _complete(self, launched: Launched, token_ids: list[list[int]]) -> list[SequenceOutput]:
        """Book a step that is done; what ended while it ran gets nothing more."""
        self.scheduler.complete(launched.step)
        return [
            self._emit(request, tokens, logprobs)
            for request, tokens, logprobs in zip(launched.sampled, token_ids, launched.logprobs(), strict=True)
            if request.status is not RequestStatus.FINISHED
        ]

    def _emit(self, request: Request, token_ids: list[int], logprobs: TokenLogprobs | None) -> SequenceOutput:
        """Give a sequence its tokens, up to the one that ends it, and say so."""
        is_first = request.num_known_tokens == request.num_prompt_tokens
        token_ids, reason = self._up_to_the_end(request, token_ids)
        self.scheduler.deliver(request, token_ids)
        if reason:
            self.scheduler.finish(request)
        prompt_logprobs, request.prompt_logprobs = request.prompt_logprobs, None
        return SequenceOutput(
            request.request_id,
            request.index,
            token_ids,
            reason,
            stop_token_id=token_ids[-1] if reason == "stop" else None,
            logprobs=None if logprobs is None else [logprobs],
            num_cached_tokens=request.num_cached_tokens if is_first else 0,
            queue_time_s=request.queue_time_s if is_first else None,
            prompt_logprobs=prompt_logprobs,
        )

    def _up_to_the_end(self, request: Request, token_ids: list[int]) -> tuple[list[int], FinishReason | None]:
        """The new tokens that belong to the answer, and why it ends with them if it does."""
        params = request.params
        eos_token_ids = frozenset() if params.ignore_eos else self._eos_token_ids
        if eos_token_ids or params.stop_token_ids:
            num_output = request.num_known_tokens - request.num_prompt_tokens
            for count, token_id in enumerate(token_ids, 1):
                is_end = token_id in eos_token_ids or token_id in params.stop_token_ids
                if is_end and num_output + count >= params.min_tokens:
                    return token_ids[:count], "stop"
        is_full = request.num_known_tokens + len(token_ids) >= request.max_num_tokens
        return token_ids, "length" if is_full else None

    def _abort(self, request: Request) -> None:
        """A prompt that was to be forked answers for all its sequences."""
        indices = [request.index, *range(1, request.num_forks + 1)]
        self.scheduler.finish(request)
        self._pending += [SequenceOutput(request.request_id, index, [], "abort") for index in indices]

    def _warm_up(self) -> None:
        is_gpu = self._started.device.torch_device.type == "cuda"
        limits = self.scheduler.limits
        for warm_up in warm_ups(limits, is_gpu=is_gpu):
            for number in range(warm_up.num_prompts):
                prompt = [0] * warm_up.num_tokens
                self.add_request(AddRequest(f"warm-up-{number}", prompt, warm_up.params, time.monotonic()))
            while self.has_work:
                self.step(max_rounds=1)
            self.scheduler = Scheduler(limits)
        if is_gpu:
            report_compilations(_warn_of_compilation)
        self._num_steps = 0
        self._host_s = self._round_s = self._busy_since_s = 0.0

    def _measure_host(self, waited_s: float) -> None:
        """How long the host takes from one step to the next, whatever its callers do in between, without waiting."""
        now_s = time.perf_counter()
        if self._busy_since_s:
            self._host_s += NEWEST_SHARE * (now_s - self._busy_since_s - waited_s - self._host_s)
        self._busy_since_s = now_s if self.has_work else 0.0

    def _measure(self, launched: Launched) -> None:
        step, num_rounds = launched.step, launched.step.num_rounds
        round_s = launched.duration_s / num_rounds
        self._num_steps += num_rounds
        self._last_step_time_s = round_s
        if step.is_decode:
            self._round_s += NEWEST_SHARE * (round_s - self._round_s)
        started = self._started
        limit_s = scheduled_step_limit_s(step, started.geometry, started.device.hardware, started.capacity)
        if self.ranks and self.ranks.pipeline:  # a step passes one stage after the other
            limit_s *= self.ranks.pipeline.num_stages
        self._roofline_ratio = limit_s / round_s

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


def _warn_of_compilation(kernel: str, seconds: float) -> None:
    logger.warning(
        "all requests waited %.2f s while %s was compiled: the warm-up did not need that kernel", seconds, kernel
    )
