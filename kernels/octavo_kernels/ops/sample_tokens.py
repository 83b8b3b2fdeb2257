"""Draw a token for each row of logits on the GPU: no sort, no host synchronisation, a grid that no value decides.

The draw is Gumbel-max: the largest of `logit + temperature * noise` is a draw from softmax(logits / temperature), in
one pass and without the sum. Scaling the noise rather than the logits leaves nothing to overflow, and a temperature of
0 is greedy by the same formula. The noise of a token is a hash of (seed, index, position, token), so a row draws the
same token whatever else is in the batch and however the row is split.

Filters become one number, the row's threshold: a token is kept if its logit is at least that. It is found by bisection
over logits, exact because the bounds move from one logit of the row to another. Few logits take part: those of groups
of 64 neighbours whose largest reaches a lower bound, and the bound is the same search over these largest alone.
"""
# Triton's kernels: untyped arguments, constexprs in capitals.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice

from octavo_kernels.launch import VARIANTS, CompileExample, variant_of
from octavo_kernels.ops.argmax import (
    argmax_rows_reference,
    check_logits,
    load_logits,
    order_preserving,
    pack_keys,
    split_rows,
    tokens_of_best_keys,
)

# Neighbouring tokens with one largest logit and one sum. Part of what is computed, not of how: sums round by it.
_GROUP_SIZE: Final = 64


@dataclass(frozen=True, slots=True)
class Launch:
    """draw_block:      tokens that a program of the draw reads at a time
    group_block:     groups that a program of the summary reads
    threshold_block: groups that a row's search reads at a time
    """

    draw_block: int
    draw_warps: int
    group_block: int
    group_warps: int
    threshold_block: int
    threshold_warps: int


# One setting for all: 8 or 16 values per thread to stream, and many threads for the search, one program per row.
LAUNCH: Mapping[str, Launch] = dict.fromkeys(
    VARIANTS,
    Launch(draw_block=1024, draw_warps=4, group_block=32, group_warps=4, threshold_block=64, threshold_warps=16),
)


@dataclass(frozen=True, slots=True, eq=False)
class SamplingTensors:
    """What each row asks for, on the device of the logits; each [num_rows], contiguous.

    temperatures: float32; 0 is greedy
    top_k:        int32; 0 is off. 1 is greedy
    top_p, min_p: float32; 1 and 0 are off
    seeds:        int64, all 64 bits used
    indices:      int32, which of the request's sequences
    positions:    int32, of the token to draw
    """

    temperatures: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seeds: torch.Tensor
    indices: torch.Tensor
    positions: torch.Tensor


_DTYPES: Final = {
    "temperatures": torch.float32,
    "top_k": torch.int32,
    "top_p": torch.float32,
    "min_p": torch.float32,
    "seeds": torch.int64,
    "indices": torch.int32,
    "positions": torch.int32,
}


def sample_rows_reference(logits: torch.Tensor, sampling: SamplingTensors) -> torch.Tensor:
    """`sample_rows` in torch, with a sort."""
    temperatures = sampling.temperatures.masked_fill(sampling.top_k == 1, 0)[:, None]
    noise = _gumbel_noise_reference(sampling, logits.shape[1])
    scores = torch.where(temperatures > 0, logits.float() + temperatures * noise, logits.float())
    is_kept = kept_tokens_reference(logits, sampling) | (temperatures == 0)
    return argmax_rows_reference(scores.masked_fill(~is_kept, -torch.inf))


def kept_tokens_reference(logits: torch.Tensor, sampling: SamplingTensors) -> torch.Tensor:
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


def _gumbel_noise_reference(sampling: SamplingTensors, vocab_size: int) -> torch.Tensor:
    """[num_rows, vocab_size] float32: word `token % 4` of Philox at counter (token // 4, position, index, 0)."""
    quads = torch.arange(triton.cdiv(vocab_size, 4), device=sampling.seeds.device)
    words = philox_reference(
        sampling.seeds[:, None], quads[None], sampling.positions.long()[:, None], sampling.indices.long()[:, None]
    )  # [num_rows, num_quads, 4]
    uniforms = (words.flatten(1)[:, :vocab_size].float() * 2.0**-32 + 2.0**-33).clamp(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-uniforms))


def philox_reference(
    key: torch.Tensor, c0: torch.Tensor, c1: torch.Tensor, c2: torch.Tensor, c3: int = 0
) -> torch.Tensor:
    """Philox4x32-10: [..., 4] words of 32 random bits, in int64, for a 64-bit key and a counter of four 32-bit words.

    Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (doi:10.1145/2063384.2063405).
    """
    low_word = 0xFFFFFFFF
    k0, k1 = key & low_word, (key >> 32) & low_word
    x0, x1, x2, x3 = c0, c1, c2, torch.full_like(c0, c3)
    for _ in range(10):
        a, b = x0 * 0xD2511F53, x2 * 0xCD9E8D57  # wraps in int64; the bits are those of the unsigned product
        x0, x1, x2, x3 = (b >> 32) & low_word ^ x1 ^ k0, b & low_word, (a >> 32) & low_word ^ x3 ^ k1, a & low_word
        k0, k1 = (k0 + 0x9E3779B9) & low_word, (k1 + 0xBB67AE85) & low_word
    return torch.stack((x0, x1, x2, x3), dim=-1)


def sample_rows(logits: torch.Tensor, sampling: SamplingTensors, *, any_filters: bool = True) -> torch.Tensor:
    """Draw one token of each row from softmax(logits / temperature) over the tokens that the row's filters keep.

    top-k: fewer than k tokens are likelier. top-p: the likelier ones that top-k kept hold less than p of the weight of
    all that top-k kept. min-p: at least p times as likely as the best. Equally likely tokens are thus kept or dropped
    together, so top-k can keep more than k; only k = 1 takes the lowest of equals, as greedy does. The best is always
    kept. NaN counts as -inf, and -inf is never drawn, except that a row without any finite logit gives token 0.

    logits:      [num_rows, vocab_size] float32 or bfloat16, last dimension contiguous
    any_filters: False promises that no row filters, which saves two launches
    Returns      [num_rows] int64
    Raises ValueError if an argument has another shape, type or layout.
    Source: Gumbel-max, Maddison et al. (https://arxiv.org/abs/1411.0030).
    """
    check_logits(logits)
    _check_sampling(logits, sampling)
    num_rows, vocab_size = logits.shape
    launch = LAUNCH[variant_of(logits.device)]
    thresholds = filter_thresholds(logits, sampling) if any_filters else None
    num_splits, tiles_per_split = split_rows(num_rows, vocab_size, launch.draw_block)
    keys = torch.empty((num_rows, num_splits), dtype=torch.int64, device=logits.device)
    if num_rows:
        _draw_kernel[num_rows, num_splits](
            logits,
            logits.stride(0),
            keys,
            sampling.temperatures,
            sampling.top_k,
            thresholds,
            sampling.seeds,
            sampling.indices,
            sampling.positions,
            vocab_size,
            tiles_per_split,
            HAS_THRESHOLDS=thresholds is not None,
            FAST_LOG=logits.is_cuda,
            BLOCK=launch.draw_block,
            num_warps=launch.draw_warps,
            num_stages=1,
        )
    return tokens_of_best_keys(keys)


def filter_thresholds(logits: torch.Tensor, sampling: SamplingTensors) -> torch.Tensor:
    """The least logit that each row's filters keep, [num_rows] float32; -inf for a row that is greedy or unfiltered.

    Arguments as of `sample_rows`.
    """
    num_rows, vocab_size = logits.shape
    launch = LAUNCH[variant_of(logits.device)]
    num_groups = triton.cdiv(vocab_size, _GROUP_SIZE)
    maxima = torch.empty((num_rows, num_groups), dtype=torch.float32, device=logits.device)
    masses = torch.empty_like(maxima)
    live_groups = torch.empty_like(maxima, dtype=torch.int32)
    thresholds = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    if not num_rows:
        return thresholds
    _summary_kernel[num_rows, triton.cdiv(num_groups, launch.group_block)](
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
        NUM_GROUPS=triton.next_power_of_2(num_groups),
        GROUP_SIZE=_GROUP_SIZE,
        GROUP_BLOCK=launch.threshold_block,
        num_warps=launch.threshold_warps,
        num_stages=1,
    )
    return thresholds


def _check_sampling(logits: torch.Tensor, sampling: SamplingTensors) -> None:
    for name, dtype in _DTYPES.items():
        tensor = getattr(sampling, name)
        if tensor.shape != logits.shape[:1] or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(
                f"{name}: {tensor.dtype} {tuple(tensor.shape)}; expected contiguous {dtype} [{logits.shape[0]}]"
            )


@triton.jit
def _log(values, FAST_LOG: tl.constexpr):
    """Natural logarithm, by the GPU's own instruction (to 1e-7, beside logits nothing) or for the interpreter."""
    return libdevice.fast_logf(values) if FAST_LOG else tl.log(values)


@triton.jit
def _gumbel_noise(seed, index, position, first_token, NUM_QUADS: tl.constexpr, FAST_LOG: tl.constexpr):
    """Noise of the tokens from `first_token` (a multiple of 4) on: [NUM_QUADS, 4], four words of each Philox call.

    -log(-log(1 - u)) for u of 32 bits: the largest noise, which decides, comes from the u next to 0, where float32 is
    finest; there -log(1 - u) is a series, since 1 - u would round what is fine in u.
    """
    quads = first_token // 4 + tl.arange(0, NUM_QUADS)
    zeros = tl.zeros_like(quads)
    w0, w1, w2, w3 = tl.philox(seed, quads, zeros + position, zeros + index, zeros)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [NUM_QUADS, 4])
    uniforms = words.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10  # 2^-32, 2^-33
    uniforms = tl.minimum(uniforms, 0.99999994)  # 1 - 2^-24
    series = uniforms * (1 + uniforms * (0.5 + uniforms * (0.33333333 + uniforms * 0.25)))
    exponentials = tl.where(uniforms < 0.015625, series, -_log(1 - uniforms, FAST_LOG))
    return -_log(exponentials, FAST_LOG)


@triton.jit(do_not_specialize=["tiles_per_split"])
def _draw_kernel(
    logits_ptr,
    row_stride,
    keys_ptr,
    temperatures_ptr,
    top_k_ptr,
    thresholds_ptr,
    seeds_ptr,
    indices_ptr,
    positions_ptr,
    vocab_size,
    tiles_per_split,
    HAS_THRESHOLDS: tl.constexpr,
    FAST_LOG: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: one program per (row, split). Scores in float32."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    temperature = tl.load(temperatures_ptr + row)
    is_random = (temperature > 0) & (tl.load(top_k_ptr + row) != 1)
    threshold = float("-inf")
    if HAS_THRESHOLDS:
        threshold = tl.load(thresholds_ptr + row)
    seed = tl.load(seeds_ptr + row)
    index = tl.load(indices_ptr + row)
    position = tl.load(positions_ptr + row)
    first_token = split * tiles_per_split * BLOCK
    lanes = tl.arange(0, BLOCK // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]  # [BLOCK // 4, 4]
    best_scores = tl.full([BLOCK // 4, 4], float("-inf"), tl.float32)
    best_tokens = first_token + lanes
    for _ in range(tiles_per_split):
        tokens = first_token + lanes
        scores = load_logits(logits_ptr + row * row_stride + tokens, tokens < vocab_size)  # [BLOCK // 4, 4]
        if is_random:
            noise = _gumbel_noise(seed, index, position, first_token, BLOCK // 4, FAST_LOG)
            scores = tl.where(scores >= threshold, scores + temperature * noise, float("-inf"))
        is_better = scores > best_scores
        best_scores = tl.where(is_better, scores, best_scores)
        best_tokens = tl.where(is_better, tokens, best_tokens)
        first_token += BLOCK
    best_key = tl.max(tl.max(pack_keys(best_scores, best_tokens), axis=1), axis=0)
    tl.store(keys_ptr + row * tl.num_programs(1) + split, best_key)


@triton.jit
def _asks_for_filters(temperature, top_k, top_p, min_p):
    return (temperature > 0) & (top_k != 1) & ((top_k > 0) | (top_p < 1) | (min_p > 0))


@triton.jit
def _exponent_scale(temperature):
    """exp(x / temperature) = exp2(x * scale). Below a millionth only the best has weight: no need to divide by 0."""
    return 1.4426950408889634 / tl.maximum(temperature, 1e-6)


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


def example_inputs(num_rows: int, vocab_size: int, *, device: str = "cpu") -> tuple[torch.Tensor, SamplingTensors]:
    """Arguments of `sample_rows`: rows that are greedy, unfiltered, and filtered in each way, by turns."""
    turns = torch.arange(num_rows, device=device) % 6
    sampling = SamplingTensors(
        temperatures=torch.where(turns == 0, 0.0, 0.8),
        top_k=torch.where((turns == 2) | (turns == 5), 20, 0).int(),
        top_p=torch.where((turns == 3) | (turns == 5), 0.95, 1.0),
        min_p=torch.where(turns == 4, 0.05, 0.0),
        seeds=torch.randint(-(2**63), 2**63 - 1, (num_rows,), device=device),
        indices=torch.zeros(num_rows, dtype=torch.int32, device=device),
        positions=torch.randint(1, 4096, (num_rows,), dtype=torch.int32, device=device),
    )
    return torch.randn(num_rows, vocab_size, device=device) * 3, sampling


_POINTERS: Final = {
    "logits_ptr": "*fp32",
    "keys_ptr": "*i64",
    "maxima_ptr": "*fp32",
    "masses_ptr": "*fp32",
    "live_groups_ptr": "*i32",
    "temperatures_ptr": "*fp32",
    "top_k_ptr": "*i32",
    "top_p_ptr": "*fp32",
    "min_p_ptr": "*fp32",
    "thresholds_ptr": "*fp32",
    "seeds_ptr": "*i64",
    "indices_ptr": "*i32",
    "positions_ptr": "*i32",
}


def compile_examples(variant: str) -> list[CompileExample]:
    """The kernels as a vocabulary of 128256 launches them, float32 and bfloat16."""
    launch = LAUNCH[variant]
    draw: dict[str, object] = {"FAST_LOG": True, "BLOCK": launch.draw_block}
    kernels = (
        ("draw", _draw_kernel, draw | {"HAS_THRESHOLDS": True}, launch.draw_warps),
        ("draw unfiltered", _draw_kernel, draw | {"HAS_THRESHOLDS": False}, launch.draw_warps),
        (
            "summary",
            _summary_kernel,
            {"GROUP_SIZE": _GROUP_SIZE, "GROUP_BLOCK": launch.group_block},
            launch.group_warps,
        ),
        (
            "threshold",
            _threshold_kernel,
            {"NUM_GROUPS": 2048, "GROUP_SIZE": _GROUP_SIZE, "GROUP_BLOCK": launch.threshold_block},
            launch.threshold_warps,
        ),
    )
    return [
        CompileExample(
            name=f"sample_rows {name} {dtype}",
            function=function,
            signature={
                argument: _POINTERS.get(argument, "i32")
                for argument in function.arg_names
                if argument not in constexprs
            }
            | {"logits_ptr": f"*{dtype}"},
            constexprs=constexprs,
            num_warps=num_warps,
            num_stages=1,
        )
        for name, function, constexprs, num_warps in kernels
        for dtype in ("fp32", "bf16")
    ]
