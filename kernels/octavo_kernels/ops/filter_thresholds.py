"""Top-k, top-p and min-p of each row of logits as one number: a token is kept if its logit is at least that.

This threshold is found without a sort, by bisection over logits, exact because the bounds move from one logit of the
row to another. Few logits take part: those of groups of 64 neighbours whose largest reaches a lower bound, and this
bound is the same search over these largest alone.
"""
# Triton's kernels: untyped arguments, constexprs in capitals.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl

from octavo_kernels.launch import LOG2_E, VARIANTS, CompileExample, cdiv, next_power_of_2, signature_of, variant_of
from octavo_kernels.ops.argmax import load_logits, order_preserving
from octavo_kernels.ops.sampling_tensors import SamplingTensors

# Neighbouring tokens with one largest logit and one sum. Part of what is computed, not of how: sums round by it.
_GROUP_SIZE: Final = 64


@dataclass(frozen=True, slots=True)
class Launch:
    """group_block:     groups that a program of the summary reads
    threshold_block: groups that a row's search reads at a time
    """

    group_block: int
    group_warps: int
    threshold_block: int
    threshold_warps: int


# One setting for all: 16 values per thread to stream, and many threads for the search, one program per row.
LAUNCH: Mapping[str, Launch] = dict.fromkeys(
    VARIANTS, Launch(group_block=32, group_warps=4, threshold_block=64, threshold_warps=16)
)


def reference(logits: torch.Tensor, sampling: SamplingTensors) -> torch.Tensor:
    """Which tokens the filters of each random row keep, [num_rows, vocab_size] bool, by sorting in float64."""
    vocab_size = logits.shape[1]
    scores = logits.double().nan_to_num(-torch.inf, posinf=torch.finfo(torch.float32).max, neginf=-torch.inf)
    top_k = sampling.top_k.long()[:, None]
    top_k = torch.where(top_k > 0, top_k, vocab_size)
    ordered, tokens = scores.sort(dim=1, descending=True)
    best = ordered[:, :1].clamp(min=torch.finfo(torch.float32).min)
    relative = (ordered - best) / sampling.temperatures.double()[:, None].clamp(min=1e-6)
    weights = relative.exp()
    # Where the run of tokens starts that are as likely as this one: those before it are the likelier ones.
    ranks = torch.arange(vocab_size, device=logits.device).expand_as(ordered)
    starts_run = torch.ones_like(ordered, dtype=torch.bool)
    starts_run[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    num_likelier = torch.where(starts_run, ranks, 0).cummax(dim=1).values
    in_top_k = num_likelier < top_k
    kept_weights = weights * in_top_k
    before = (kept_weights.cumsum(dim=1) - kept_weights).gather(1, num_likelier)
    top_p = sampling.top_p.double()[:, None]
    in_top_p = (before < top_p * kept_weights.sum(dim=1, keepdim=True)) | (top_p >= 1)
    in_min_p = relative >= sampling.min_p.double()[:, None].log()
    is_kept = in_top_k & (num_likelier == 0) | in_top_k & in_top_p & in_min_p
    return torch.zeros_like(is_kept).scatter_(1, tokens, is_kept)


def filter_thresholds(logits: torch.Tensor, sampling: SamplingTensors) -> torch.Tensor:
    """The least logit that each row's filters keep, [num_rows] float32; -inf for a row that is greedy or unfiltered.

    Arguments as of `sample_rows`.
    """
    num_rows, vocab_size = logits.shape
    launch = LAUNCH[variant_of(logits.device)]
    num_groups = cdiv(vocab_size, _GROUP_SIZE)
    maxima = torch.empty((num_rows, num_groups), dtype=torch.float32, device=logits.device)
    masses = torch.empty_like(maxima)
    live_groups = torch.empty_like(maxima, dtype=torch.int32)
    thresholds = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    if not num_rows:
        return thresholds
    _summary_kernel[num_rows, cdiv(num_groups, launch.group_block)](
        logits,
        logits.stride(0),
        maxima,
        masses,
        sampling.temperatures,
        sampling.top_k,
        sampling.top_p,
        sampling.min_p,
        vocab_size,
        num_groups,
        GROUP_SIZE=_GROUP_SIZE,
        GROUP_BLOCK=launch.group_block,
        num_warps=launch.group_warps,
        num_stages=1,
    )
    _threshold_kernel[(num_rows,)](
        logits,
        logits.stride(0),
        maxima,
        masses,
        live_groups,
        sampling.temperatures,
        sampling.top_k,
        sampling.top_p,
        sampling.min_p,
        thresholds,
        vocab_size,
        num_groups,
        NUM_GROUPS=next_power_of_2(num_groups),
        GROUP_SIZE=_GROUP_SIZE,
        GROUP_BLOCK=launch.threshold_block,
        num_warps=launch.threshold_warps,
        num_stages=1,
    )
    return thresholds


@triton.jit
def _asks_for_filters(temperature, top_k, top_p, min_p):
    return (temperature > 0) & (top_k != 1) & ((top_k > 0) | (top_p < 1) | (min_p > 0))


@triton.jit
def _exponent_scale(temperature):
    """exp(x / temperature) = exp2(x * scale). Below a millionth only the best has weight: no need to divide by 0."""
    return LOG2_E / tl.maximum(temperature, 1e-6)


@triton.jit
def _summary_kernel(
    logits_ptr,
    row_stride,
    maxima_ptr,
    masses_ptr,
    temperatures_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    vocab_size,
    num_groups,
    GROUP_SIZE: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
):
    """Each group's largest logit, and its sum of exp((logit - largest) / temperature).

    Grid: one program per (row, GROUP_BLOCK groups).
    """
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperatures_ptr + row)
    asks = _asks_for_filters(temperature, tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row))
    if asks:
        groups = tl.program_id(1) * GROUP_BLOCK + tl.arange(0, GROUP_BLOCK)
        tokens = groups[:, None] * GROUP_SIZE + tl.arange(0, GROUP_SIZE)[None, :]  # [GROUP_BLOCK, GROUP_SIZE]
        values = load_logits(logits_ptr + row * row_stride + tokens, tokens < vocab_size)
        maxima = tl.max(values, axis=1)  # [GROUP_BLOCK]
        origins = tl.where(maxima == float("-inf"), 0.0, maxima)
        weights = tl.exp2((values - origins[:, None]) * _exponent_scale(temperature))
        is_group = groups < num_groups
        tl.store(maxima_ptr + row * num_groups + groups, maxima, mask=is_group)
        tl.store(masses_ptr + row * num_groups + groups, tl.sum(weights, axis=1), mask=is_group)


@triton.jit
def _load_groups(
    values_ptr, groups_ptr, start, num_groups, num_values, GROUP_SIZE: tl.constexpr, GROUP_BLOCK: tl.constexpr
):
    """Values of the listed groups from entry `start` on, [GROUP_BLOCK, GROUP_SIZE]; -inf beyond either end."""
    entries = start + tl.arange(0, GROUP_BLOCK)
    groups = tl.load(groups_ptr + entries, mask=entries < num_groups, other=0)
    offsets = groups[:, None] * GROUP_SIZE + tl.arange(0, GROUP_SIZE)[None, :]
    return load_logits(values_ptr + offsets, (entries < num_groups)[:, None] & (offsets < num_values))


@triton.jit
def _mass_from(
    values_ptr,
    groups_ptr,
    num_groups,
    num_values,
    low,
    best,
    scale,
    GROUP_SIZE: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
):
    """Sum of exp2((value - best) * scale) over the values >= low in the listed groups."""
    masses = tl.zeros([GROUP_BLOCK, GROUP_SIZE], tl.float32)
    for start in range(0, num_groups, GROUP_BLOCK):
        values = _load_groups(values_ptr, groups_ptr, start, num_groups, num_values, GROUP_SIZE, GROUP_BLOCK)
        masses += tl.where(values >= low, tl.exp2((values - best) * scale), 0.0)
    return tl.sum(tl.sum(masses, axis=1), axis=0)


@triton.jit
def _measure(
    values_ptr,
    groups_ptr,
    num_groups,
    num_values,
    pivot,
    best,
    scale,
    GROUP_SIZE: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
):
    """Of the values in the listed groups: how many exceed the pivot, their weight, and the values next to the pivot.

    Returns (count of values > pivot, sum of their exp2((value - best) * scale), largest value <= pivot, smallest value
    > pivot); -inf or inf where there is none.
    """
    counts = tl.zeros([GROUP_BLOCK, GROUP_SIZE], tl.int32)
    masses = tl.zeros([GROUP_BLOCK, GROUP_SIZE], tl.float32)
    below = tl.full([GROUP_BLOCK, GROUP_SIZE], float("-inf"), tl.float32)
    above = tl.full([GROUP_BLOCK, GROUP_SIZE], float("inf"), tl.float32)
    for start in range(0, num_groups, GROUP_BLOCK):
        values = _load_groups(values_ptr, groups_ptr, start, num_groups, num_values, GROUP_SIZE, GROUP_BLOCK)
        is_above = values > pivot
        counts += is_above.to(tl.int32)
        masses += tl.where(is_above, tl.exp2((values - best) * scale), 0.0)
        below = tl.maximum(below, tl.where(is_above, float("-inf"), values))
        above = tl.minimum(above, tl.where(is_above, values, float("inf")))
    return (
        tl.sum(tl.sum(counts, axis=1), axis=0),
        tl.sum(tl.sum(masses, axis=1), axis=0),
        tl.max(tl.max(below, axis=1), axis=0),
        tl.min(tl.min(above, axis=1), axis=0),
    )


@triton.jit
def _search(
    values_ptr,
    groups_ptr,
    num_groups,
    num_values,
    low,
    best,
    scale,
    max_count,
    max_mass,
    GROUP_SIZE: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
):
    """The least t >= low such that fewer than `max_count` values, of a weight less than `max_mass`, exceed t.

    t is `low` or one of the values; `best`, the largest of them, always qualifies. `low` itself is tried first, then
    the middle of what is left, by the floats' order as integers: at most 33 rounds, fewer the fewer values are left.
    """
    high = best
    pivot = low
    while low < high:
        count, mass, below, above = _measure(
            values_ptr, groups_ptr, num_groups, num_values, pivot, best, scale, GROUP_SIZE, GROUP_BLOCK
        )
        qualifies = (count < max_count) & (mass < max_mass)
        high = tl.where(qualifies, below, high)
        low = tl.where(qualifies, low, above)
        low_key = order_preserving(low.to(tl.int32, bitcast=True))
        high_key = order_preserving(high.to(tl.int32, bitcast=True))
        middle = (low_key & high_key) + ((low_key ^ high_key) >> 1)  # the mean, rounded down, without overflow
        pivot = order_preserving(middle).to(tl.float32, bitcast=True)
    return tl.maximum(low, high)


@triton.jit
def _threshold_kernel(
    logits_ptr,
    row_stride,
    maxima_ptr,
    masses_ptr,
    live_groups_ptr,
    temperatures_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    thresholds_ptr,
    vocab_size,
    num_groups,
    NUM_GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
):
    """Grid: one program per row. Counts in int32, weights in float32, relative to the best token's.

    Group maxima are some of the row's logits, so what exceeds t among them is at most what exceeds t in the row: a
    threshold found on the maxima alone is a lower bound of the row's, and groups below it need not be read.
    """
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperatures_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    threshold = float("-inf")
    if _asks_for_filters(temperature, top_k, top_p, min_p):
        row_ptr = logits_ptr + row * row_stride
        maxima_ptr += row * num_groups
        live_groups_ptr += row * num_groups
        groups = tl.arange(0, NUM_GROUPS)
        maxima = load_logits(maxima_ptr + groups, groups < num_groups)  # [NUM_GROUPS]
        masses = tl.load(masses_ptr + row * num_groups + groups, mask=groups < num_groups, other=0.0)
        best = tl.maximum(tl.max(maxima, axis=0), -3.4028234663852886e38)
        scale = _exponent_scale(temperature)
        total = tl.sum(masses * tl.exp2((maxima - best) * scale), axis=0)
        floor = float("-inf")
        if min_p > 0:
            floor = best + temperature * tl.log(min_p)

        # What top-p shares out is the weight of all that top-k keeps, so there the bound comes from top-k alone.
        has_top_k = (top_k > 0) & (top_k < vocab_size)
        max_count = tl.where(has_top_k, top_k, 0x7FFFFFFF)
        max_mass = tl.where(top_p < 1, top_p * total, float("inf"))
        tl.store(live_groups_ptr + groups, groups, mask=groups < num_groups)
        tl.debug_barrier()
        low = _search(
            maxima_ptr,
            live_groups_ptr,
            tl.cdiv(num_groups, GROUP_SIZE),
            num_groups,
            tl.where(has_top_k, float("-inf"), floor),
            best,
            scale,
            max_count,
            tl.where(has_top_k, float("inf"), max_mass),
            GROUP_SIZE,
            GROUP_BLOCK,
        )
        is_live = (groups < num_groups) & (maxima >= low)
        num_live = tl.sum(is_live.to(tl.int32), axis=0)
        tl.debug_barrier()
        tl.store(live_groups_ptr + tl.cumsum(is_live.to(tl.int32), axis=0) - 1, groups, mask=is_live)
        tl.debug_barrier()
        if has_top_k:
            low = _search(
                row_ptr,
                live_groups_ptr,
                num_live,
                vocab_size,
                low,
                best,
                scale,
                max_count,
                float("inf"),
                GROUP_SIZE,
                GROUP_BLOCK,
            )
            if top_p < 1:
                max_mass = top_p * _mass_from(
                    row_ptr, live_groups_ptr, num_live, vocab_size, low, best, scale, GROUP_SIZE, GROUP_BLOCK
                )
        threshold = _search(
            row_ptr,
            live_groups_ptr,
            num_live,
            vocab_size,
            tl.maximum(low, floor),
            best,
            scale,
            0x7FFFFFFF,
            max_mass,
            GROUP_SIZE,
            GROUP_BLOCK,
        )
    tl.store(thresholds_ptr + row, threshold)


_POINTERS: Final = {
    "maxima_ptr": "*fp32",
    "masses_ptr": "*fp32",
    "live_groups_ptr": "*i32",
    "temperatures_ptr": "*fp32",
    "top_k_ptr": "*i32",
    "top_p_ptr": "*fp32",
    "min_p_ptr": "*fp32",
    "thresholds_ptr": "*fp32",
}


def compile_examples(variant: str) -> list[CompileExample]:
    """The kernels as a vocabulary of 128256 launches them, float32 and bfloat16."""
    launch = LAUNCH[variant]
    summary: dict[str, object] = {"GROUP_SIZE": _GROUP_SIZE, "GROUP_BLOCK": launch.group_block}
    threshold: dict[str, object] = {
        "NUM_GROUPS": 2048, "GROUP_SIZE": _GROUP_SIZE, "GROUP_BLOCK": launch.threshold_block
    }  # fmt: skip
    return [
        CompileExample(
            name=f"filter_thresholds {name} {dtype}",
            function=function,
            signature=signature_of(function, _POINTERS | {"logits_ptr": f"*{dtype}"}, constexprs),
            constexprs=constexprs,
            num_warps=num_warps,
            num_stages=1,
        )
        for name, function, constexprs, num_warps in (
            ("summary", _summary_kernel, summary, launch.group_warps),
            ("search", _threshold_kernel, threshold, launch.threshold_warps),
        )
        for dtype in ("fp32", "bf16")
    ]
