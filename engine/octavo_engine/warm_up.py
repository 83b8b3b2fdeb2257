"""What an engine computes before it answers anybody: no client waits for libraries to initialise or kernels to compile.

On a GPU, chunks of different lengths and numbers and draws of different kinds run different kernels, which Triton
compiles when they are first asked for. The widest steps are among them: what does not fit into the GPU's memory has to
show now.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from octavo_engine.mixed_graphs import MAX_CHUNKS
from octavo_engine.protocol import SamplingParams
from octavo_engine.scheduler import SchedulerLimits

_GREEDY = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
_DRAWN = SamplingParams(max_tokens=2, ignore_eos=True)
_SCORED = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True, logprobs=1, prompt_logprobs=1)
_CONSTRAINED = SamplingParams(
    max_tokens=2, ignore_eos=True, top_p=0.9, repetition_penalty=1.1, logit_bias={0: 1.0}, min_tokens=2
)


@dataclass(frozen=True, slots=True)
class WarmUp:
    """So many prompts at once, of so many tokens each, none of which is cached."""

    num_prompts: int
    num_tokens: int
    params: SamplingParams


def warm_ups(limits: SchedulerLimits, *, is_gpu: bool) -> Iterator[WarmUp]:
    """One after the other. Prompts leave room in the context for the two tokens that they ask for."""
    longest = max(1, limits.max_model_len - 2)
    for warm_up in _wanted(limits, longest, is_gpu=is_gpu):
        yield replace(warm_up, num_tokens=min(warm_up.num_tokens, longest))


def _wanted(limits: SchedulerLimits, longest: int, *, is_gpu: bool) -> Iterator[WarmUp]:
    if not is_gpu:
        yield WarmUp(1, 8, _GREEDY)
        return
    yield WarmUp(1, 3, _GREEDY)
    yield WarmUp(1, 12, _DRAWN)
    yield WarmUp(1, 12, _SCORED)
    yield WarmUp(1, 300, _CONSTRAINED)
    # More chunks than graphs have: what plans them is compiled for each power of two.
    num_chunks = MAX_CHUNKS
    while num_chunks < limits.max_num_seqs:
        num_chunks *= 2
        yield WarmUp(min(num_chunks, limits.max_num_seqs), 4, _GREEDY)
    num_prompts = min(-(-limits.max_num_batched_tokens // longest), limits.max_num_seqs)
    yield WarmUp(num_prompts, limits.max_num_batched_tokens // num_prompts, _GREEDY)
    yield WarmUp(1, 1, SamplingParams(max_tokens=2, ignore_eos=True, n=limits.max_num_seqs))
