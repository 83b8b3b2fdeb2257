"""The front end's half of the engine: it starts and watches the engine's process and hands outputs to their requests.

Each request ends in exactly one outcome, also when the process dies. Outputs that a consumer has not taken yet are
merged, so that a slow one gets fewer, larger chunks instead of a backlog. It knows tokens; text is the server's affair.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from octavo_engine.config import EngineConfig
from octavo_engine.engine_process import DEFAULT_CORE, EngineProcess, Rendezvous
from octavo_engine.errors import EngineDeadError
from octavo_engine.protocol import (
    AbortRequests,
    AddRequest,
    EngineFailed,
    EngineMessage,
    EnginePhase,
    EngineReady,
    EngineStats,
    FinishReason,
    SamplingParams,
    SequenceOutput,
    StepOutputs,
    TokenLogprobs,
)

logger = logging.getLogger(__name__)

# What the process sent right before it ended is still on its way through ZeroMQ's thread.
LAST_WORDS_S = 0.1
# Why ranks ended because of those on another node, that node says.
OTHER_NODES_WORDS_S = 2.0
CLOSE_TIMEOUT_S = 2.0


@dataclass(slots=True)
class Chunk:
    """What one sequence gained since its consumer last looked."""

    prompt_index: int
    index: int
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    logprobs: list[TokenLogprobs] | None = None
    num_cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    error: str | None = None

    def merge(self, later: "Chunk") -> None:
        """Append what the sequence gained afterwards."""
        self.token_ids += later.token_ids
        self.finish_reason = later.finish_reason
        self.stop_token_id = later.stop_token_id
        self.error = later.error
        if later.logprobs is not None:
            self.logprobs = (self.logprobs or []) + later.logprobs


@dataclass(frozen=True, slots=True)
class FinishedSequence:
    """A sequence's life in numbers, for the metrics."""

    finish_reason: FinishReason
    num_prompt_tokens: int
    num_generation_tokens: int
    e2e_s: float
    decode_s: float  # from the first token to the last


class SequenceObserver(Protocol):
    """Who wants to know when tokens come. Called on the event loop, per sequence and step: it must be quick."""

    def observe_queue_time(self, seconds: float) -> None:
        """The time from a request's arrival to its first step."""

    def observe_first_token(self, seconds: float) -> None:
        """The time from the request's arrival to its first token."""

    def observe_next_tokens(self, seconds: float, num_tokens: int) -> None:
        """The time that the next `num_tokens` tokens took together."""

    def observe_finished(self, sequence: FinishedSequence) -> None:
        """The sequence's end, whatever the reason."""


@dataclass(slots=True)
class _Sequence:
    """One sequence's course so far."""

    num_tokens: int = 0
    first_token_s: float = 0.0
    last_token_s: float = 0.0


@dataclass(slots=True)
class _Request:
    """One prompt that the engine runs, and the generation that it belongs to."""

    generation: "Generation"
    prompt_index: int
    num_prompt_tokens: int
    running: dict[int, _Sequence] = field(default_factory=dict)


class Generation:
    """The sequences of one HTTP request: `n` for each of its prompts.

    Iterating gives lists of chunks, at most one per sequence, until each sequence has ended; it raises EngineDeadError
    if the engine dies. Leaving the `with` block aborts whatever still runs.
    """

    def __init__(self, engine: "AsyncEngine", arrival_s: float) -> None:
        self._engine = engine
        self.arrival_s = arrival_s
        self.requests: dict[str, _Request] = {}
        self._pending: dict[tuple[int, int], Chunk] = {}
        self._failure: str | None = None
        self._waiter: asyncio.Future[None] | None = None

    def __enter__(self) -> "Generation":
        return self

    def __exit__(self, *exception: object) -> None:
        self._engine.abort(self)

    def __aiter__(self) -> "Generation":
        return self

    async def __anext__(self) -> list[Chunk]:
        while not self._pending:
            if self._failure is not None:
                raise EngineDeadError(self._failure)
            if not self.requests:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        chunks = list(self._pending.values())
        self._pending.clear()
        return chunks

    def cancel(self) -> None:
        """End all sequences because nobody reads them any more; iteration stops."""
        self._engine.abort(self)
        self._wake()

    def stop(self, prompt_index: int, index: int) -> None:
        """End one sequence, as a stop string does: it gives no further chunk and counts as finished."""
        self._pending.pop((prompt_index, index), None)
        self._engine.stop_sequence(self, prompt_index, index)

    def push(self, chunk: Chunk) -> None:
        """Take what a sequence gained (called by the engine)."""
        key = (chunk.prompt_index, chunk.index)
        earlier = self._pending.get(key)
        if earlier is None:
            self._pending[key] = chunk
        else:
            earlier.merge(chunk)
        self._wake()

    def fail(self, message: str) -> None:
        """End all sequences because the engine is gone (called by the engine)."""
        self._failure = message
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class AsyncEngine:
    """Starts the engine's process, supervises it and shares it between requests. Belongs to one event loop."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        core: str = DEFAULT_CORE,
        observer: SequenceObserver | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._core = core
        self._observer = observer
        self._clock = clock
        self._process: EngineProcess | None = None
        self._requests: dict[str, _Request] = {}
        # Sequences that were ended from here, of which the engine has not said yet that they are: (request, index).
        self._unconfirmed: set[tuple[str, int]] = set()
        self._num_requests_ever = 0
        self._busy_since_s = 0.0
        self._last_step_s = 0.0
        self._phase_since_s = clock()
        self.started_s = clock()
        self.phase = EnginePhase("starting")
        self._phase_seconds: dict[str, float] = {}
        self.ready: EngineReady | None = None
        self.ready_after_s: float | None = None
        self.stats = EngineStats()
        self.failure: EngineFailed | None = None
        self._settled = asyncio.Event()
        self._dead = asyncio.Event()

    def start(self, rendezvous: Rendezvous | None = None) -> None:
        """Start the process. It loads the model while this returns at once.

        rendezvous: with ranks on other nodes
        """
        self._process = EngineProcess(self._config, self._core, rendezvous)
        loop = asyncio.get_running_loop()
        loop.add_reader(self._process.outputs_fd, self._on_outputs)
        for exit_fd in self._process.exit_fds:
            loop.add_reader(exit_fd, self._on_exit)

    @property
    def pids(self) -> list[int]:
        """The ids of its processes, in the order of their ranks."""
        return self._process.pids if self._process else []

    @property
    def is_dead(self) -> bool:
        """Whether the process has ended, or was never able to start."""
        return self._dead.is_set()

    @property
    def num_requests(self) -> int:
        """Prompts that the engine has not finished."""
        return len(self._requests)

    def now_s(self) -> float:
        """The engine's clock, on which requests arrive."""
        return self._clock()

    def is_stalled(self) -> bool:
        """Whether work is queued and no step finished for `stall_timeout_s`, also if whoever waited has left."""
        last_sign_of_life = max(self._busy_since_s, self._last_step_s)
        return self._is_busy and self._clock() - last_sign_of_life > self._config.stall_timeout_s

    @property
    def _is_busy(self) -> bool:
        return bool(self._requests or self._unconfirmed)

    def startup_elapsed_s(self) -> float:
        """How long start-up has taken so far, or took altogether."""
        return self._clock() - self.started_s if self.ready_after_s is None else self.ready_after_s

    def phase_seconds(self) -> dict[str, float]:
        """How long each phase of start-up took, in order; the present one so far."""
        if self.ready is not None:
            return dict(self._phase_seconds)
        return {**self._phase_seconds, self.phase.phase: self._clock() - self._phase_since_s}

    def estimate_remaining_s(self) -> float | None:
        """How long the present phase of start-up has left at its pace so far; None where nothing tells."""
        elapsed = self._clock() - self._phase_since_s
        if self.phase.fraction <= 0 or self.ready is not None:
            return None
        return max(0.0, elapsed / self.phase.fraction - elapsed)

    async def wait_ready(self) -> EngineReady:
        """Wait for the end of start-up. Raises EngineDeadError if the process ends before it."""
        await self._settled.wait()
        if self.ready is None or self.failure is not None:
            raise EngineDeadError(self._obituary())
        return self.ready

    async def wait_dead(self) -> str:
        """Wait for the process's end; what it said last."""
        await self._dead.wait()
        return self._obituary()

    def generate(
        self, prompts: Sequence[list[int]], params: SamplingParams, *, arrival_s: float | None = None
    ) -> Generation:
        """Start `params.n` sequences for each prompt. Raises EngineDeadError if there is no engine to run them."""
        if self._process is None or self.ready is None or self.is_dead:
            raise EngineDeadError(self._obituary() if self.is_dead else "the engine is not ready")
        arrival_s = self._clock() if arrival_s is None else arrival_s
        generation = Generation(self, arrival_s)
        if not self._is_busy:
            self._busy_since_s = self._clock()
        for prompt_index, token_ids in enumerate(prompts):
            self._num_requests_ever += 1
            request_id = f"r{self._num_requests_ever}"
            request = _Request(generation, prompt_index, len(token_ids))
            request.running = {index: _Sequence() for index in range(params.n)}
            self._process.send(AddRequest(request_id, token_ids, params, arrival_s))
            self._requests[request_id] = generation.requests[request_id] = request
        return generation

    def stop_sequence(self, generation: Generation, prompt_index: int, index: int) -> None:
        """End one sequence because its text is complete."""
        for request_id, request in list(generation.requests.items()):
            if request.prompt_index == prompt_index and index in request.running:
                self._end_sequence(request_id, request, index, "stop")
                self._unconfirmed.add((request_id, index))
                self._send(AbortRequests([request_id], index))

    def abort(self, generation: Generation) -> None:
        """End whatever of the generation still runs; nothing if it is finished."""
        request_ids = list(generation.requests)
        for request_id in request_ids:
            request = generation.requests[request_id]
            for index in list(request.running):
                self._end_sequence(request_id, request, index, "abort")
                self._unconfirmed.add((request_id, index))
        if request_ids:
            self._send(AbortRequests(request_ids))

    def abort_all(self, message: str) -> None:
        """End every request with an error that says `message`."""
        generations = {id(request.generation): request.generation for request in self._requests.values()}
        for generation in generations.values():
            self.abort(generation)
            generation.fail(message)

    def give_up(self, message: str) -> None:
        """Fail whatever runs, because of something outside this node that the engine cannot do without."""
        self._declare_dead(message)

    async def close(self) -> None:
        """End the process and fail what still runs."""
        if self._process is None:
            return
        process, self._process = self._process, None
        loop = asyncio.get_running_loop()
        loop.remove_reader(process.outputs_fd)
        for exit_fd in process.exit_fds:
            loop.remove_reader(exit_fd)
        self._declare_dead("the engine was closed")
        await asyncio.to_thread(process.close, CLOSE_TIMEOUT_S)

    def _send(self, message: AbortRequests) -> None:
        if self._process is None or self.is_dead:
            return
        try:
            self._process.send(message)
        except EngineDeadError:
            logger.debug("abort of %s came after the engine's end", message.request_ids)

    def _on_outputs(self) -> None:
        if self._process is not None:
            for message in self._process.receive():
                self._handle(message)

    def _handle(self, message: EngineMessage) -> None:
        if isinstance(message, StepOutputs):
            self._dispatch(message)
        elif isinstance(message, EnginePhase):
            self.enter_phase(message)
        elif isinstance(message, EngineReady):
            self.ready = message
            self.ready_after_s = self._clock() - self.started_s
            self.enter_phase(EnginePhase("ready", 1.0))
            self._settled.set()
            if self._process is not None:
                self._process.unlink_sockets()
        else:  # of several ranks that fail, the first says why
            self.failure = self.failure or message

    def enter_phase(self, phase: EnginePhase) -> None:
        """Note how far the start has come."""
        if phase.phase != self.phase.phase:
            now = self._clock()
            self._phase_seconds[self.phase.phase] = now - self._phase_since_s
            self._phase_since_s = now
        self.phase = phase

    def _dispatch(self, step: StepOutputs) -> None:
        now = self._last_step_s = self._clock()
        self.stats = step.stats
        for output in step.outputs:
            request = self._requests.get(output.request_id)
            if request is not None and output.index in request.running:
                self._deliver(request, output, now)
            elif output.finish_reason is not None:
                self._unconfirmed.discard((output.request_id, output.index))

    def _deliver(self, request: _Request, output: SequenceOutput, now: float) -> None:
        if self._observer and output.queue_time_s is not None:
            self._observer.observe_queue_time(output.queue_time_s)
        self._observe_tokens(request, output, now)
        chunk = Chunk(
            request.prompt_index,
            output.index,
            output.token_ids,
            output.finish_reason,
            output.stop_token_id,
            output.logprobs,
            output.num_cached_tokens,
            output.prompt_logprobs,
            output.error,
        )
        if output.finish_reason is not None:
            self._end_sequence(output.request_id, request, output.index, output.finish_reason)
        request.generation.push(chunk)

    def _observe_tokens(self, request: _Request, output: SequenceOutput, now: float) -> None:
        num_tokens = len(output.token_ids)
        if not num_tokens:
            return
        sequence = request.running[output.index]
        if sequence.num_tokens == 0:
            sequence.first_token_s = now
            if self._observer:
                self._observer.observe_first_token(now - request.generation.arrival_s)
        elif self._observer:
            self._observer.observe_next_tokens(now - sequence.last_token_s, num_tokens)
        sequence.num_tokens += num_tokens
        sequence.last_token_s = now

    def _end_sequence(self, request_id: str, request: _Request, index: int, reason: FinishReason) -> None:
        sequence = request.running.pop(index)
        if not request.running:
            del self._requests[request_id]
            del request.generation.requests[request_id]
        if self._observer:
            now = self._clock()
            self._observer.observe_finished(
                FinishedSequence(
                    finish_reason=reason,
                    num_prompt_tokens=request.num_prompt_tokens,
                    num_generation_tokens=sequence.num_tokens,
                    e2e_s=now - request.generation.arrival_s,
                    decode_s=sequence.last_token_s - sequence.first_token_s,
                )
            )

    def _on_exit(self) -> None:
        if self._process is None:
            return
        loop = asyncio.get_running_loop()
        for exit_fd in self._process.exit_fds:
            loop.remove_reader(exit_fd)
        is_others_doing = self._config.num_nodes > 1 and self._process.was_ended_by_others
        loop.call_later(OTHER_NODES_WORDS_S if is_others_doing else LAST_WORDS_S, self._bury)

    def _bury(self) -> None:
        if self._process is None or self.is_dead:
            return
        self._on_outputs()
        obituary = self._process.obituary or "the engine process ended"
        if self.failure is None or not self.failure.is_user_error:
            logger.error("%s", obituary)
        self._declare_dead(obituary)

    def _declare_dead(self, message: str) -> None:
        if self.failure is None:
            self.failure = EngineFailed(message, is_user_error=False)
        self._dead.set()
        self._settled.set()
        for request_id, request in list(self._requests.items()):
            for index in list(request.running):
                self._end_sequence(request_id, request, index, "error")
            request.generation.fail(self.failure.message)

    def _obituary(self) -> str:
        return self.failure.message if self.failure else "the engine process ended"
