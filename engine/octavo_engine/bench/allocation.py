"""How many requests fit into one KV cache: blocks on demand against a reservation of the maximum length.

The engine's own scheduler and block pool are driven with a model that costs nothing, so this takes neither weights nor
a GPU. The baseline is what serving was before PagedAttention: each request owns a contiguous region for the longest
context from its start to its end. Both get the same bytes, the same requests, all waiting at the start, in one order.
Time is counted in steps of the engine. Source of the experiment: PagedAttention (arXiv:2309.06180), sections 3 and 6.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from octavo_engine.protocol import SamplingParams
from octavo_engine.request import Request
from octavo_engine.scheduler import Scheduler, SchedulerLimits

RequestLengths = tuple[int, int]  # tokens in, tokens out


@dataclass(frozen=True, slots=True)
class CacheShape:
    """One KV cache: `num_tokens` token slots, in blocks of `block_size`, for contexts of up to `max_model_len`."""

    num_tokens: int
    block_size: int = 16
    max_model_len: int = 2048
    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 1024

    @property
    def num_reservations(self) -> int:
        """Requests that fit when each reserves the longest context."""
        return self.num_tokens // self.max_model_len


@dataclass(frozen=True, slots=True)
class Occupancy:
    """The cache after one step, in token slots of the whole cache and in requests."""

    num_running: int
    num_waiting: int
    num_slots_held: int
    num_slots_filled: int


@dataclass(frozen=True, slots=True)
class AllocationResult:
    """What one way of allocation made of the load.

    The means are over the steps in which requests waited, for only then does memory decide. `wasted_share`: slots that
    a request holds and has not filled, over all slots of the cache. `idle_share`: slots that nobody holds though
    requests wait.
    """

    mean_running: float
    max_running: int
    wasted_share: float
    idle_share: float
    num_steps: int
    num_preemptions: int
    timeline: tuple[Occupancy, ...]


def allocate_blocks(lengths: Sequence[RequestLengths], cache: CacheShape) -> AllocationResult:
    """Run the load through the engine's scheduler."""
    # Random prompts share nothing; without the prefix cache, a block that no request holds is plainly free.
    scheduler = Scheduler(
        SchedulerLimits(
            num_blocks=cache.num_tokens // cache.block_size,
            block_size=cache.block_size,
            max_num_seqs=cache.max_num_seqs,
            max_num_batched_tokens=cache.max_num_batched_tokens,
            max_model_len=cache.max_model_len,
            enable_prefix_caching=False,
        )
    )
    for number, (num_input, num_output) in enumerate(lengths):
        scheduler.add(_request(number, num_input, num_output))
    timeline = []
    while scheduler.has_work:
        step = scheduler.schedule()
        timeline.append(_occupancy(scheduler))
        scheduler.launch(step)
        scheduler.complete(step)
        for request in step.sampled:
            scheduler.deliver(request, [0])
            if request.num_output_tokens == request.params.max_tokens:
                scheduler.finish(request)
    return _sum_up(timeline, cache, scheduler.counters.num_preemptions)


def _request(number: int, num_input: int, num_output: int) -> Request:
    return Request(
        request_id=f"{number:08}",
        index=0,
        token_ids=[0] * num_input,
        num_prompt_tokens=num_input,
        params=SamplingParams(max_tokens=num_output, ignore_eos=True),
        seed=0,
        arrival_time_s=float(number),
    )


def _occupancy(scheduler: Scheduler) -> Occupancy:
    return Occupancy(
        num_running=len(scheduler.running),
        num_waiting=len(scheduler.waiting),
        num_slots_held=scheduler.pool.num_used * scheduler.limits.block_size,
        num_slots_filled=sum(request.num_computed_tokens for request in scheduler.running),
    )


def reserve_maximum(lengths: Sequence[RequestLengths], cache: CacheShape) -> AllocationResult:
    """Run the load with a region of `max_model_len` slots a request: all that a server can know at its start."""
    return _reserve(lengths, [cache.max_model_len] * len(lengths), cache)


def reserve_exactly(lengths: Sequence[RequestLengths], cache: CacheShape) -> AllocationResult:
    """Run the load with regions of just the final length, as if answers were foreseen; regions never fragment."""
    return _reserve(lengths, [num_input + num_output for num_input, num_output in lengths], cache)


def _reserve(lengths: Sequence[RequestLengths], regions: Sequence[int], cache: CacheShape) -> AllocationResult:
    """Start requests in order while their regions fit. A prompt takes one step and yields a token, so does each step.

    Prompts are free of the token budget here, which favours the baseline.
    """
    waiting = [_Reserved(*each, region) for each, region in zip(reversed(lengths), reversed(regions), strict=True)]
    running: list[_Reserved] = []
    num_held = 0
    timeline = []
    while waiting or running:
        while waiting and num_held + waiting[-1].region <= cache.num_tokens:
            num_held += waiting[-1].region
            running.append(waiting.pop())
        num_filled = sum(each.num_filled for each in running)
        timeline.append(Occupancy(len(running), len(waiting), num_held, num_filled))
        for each in running:
            each.num_filled += 1
            each.num_steps_left -= 1
        num_held -= sum(each.region for each in running if not each.num_steps_left)
        running = [each for each in running if each.num_steps_left]
    return _sum_up(timeline, cache, num_preemptions=0)


@dataclass(slots=True)
class _Reserved:
    """A request that owns `region` slots, of which `num_filled` hold KV."""

    num_filled: int
    num_steps_left: int
    region: int


def _sum_up(timeline: Sequence[Occupancy], cache: CacheShape, num_preemptions: int) -> AllocationResult:
    """Means over the steps in which requests waited; over all steps if none ever did."""
    pressed = [each for each in timeline if each.num_waiting] or list(timeline)
    held = np.array([each.num_slots_held for each in pressed])
    filled = np.array([each.num_slots_filled for each in pressed])
    return AllocationResult(
        mean_running=float(np.mean([each.num_running for each in pressed])),
        max_running=max(each.num_running for each in timeline),
        wasted_share=float(np.mean(held - filled)) / cache.num_tokens,
        idle_share=1 - float(np.mean(held)) / cache.num_tokens,
        num_steps=len(timeline),
        num_preemptions=num_preemptions,
        timeline=tuple(timeline),
    )
