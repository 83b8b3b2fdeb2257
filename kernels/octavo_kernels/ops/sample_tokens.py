"""Draw a token for each row of logits on the GPU: no sort, no host synchronisation, a grid that no value decides.

The draw is Gumbel-max: the largest of `logit + temperature * noise` is a draw from softmax(logits / temperature), in
one pass and without the sum. Scaling the noise rather than the logits leaves nothing to overflow, and a temperature of
0 is greedy by the same formula. The noise of a token is a hash of (seed, index, position, token), so a row draws the
same token whatever else is in the batch and however the row is split.

Filters are a threshold of the row's, see `filter_thresholds`.
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

from octavo_kernels.launch import VARIANTS, CompileExample, cdiv, signature_of, variant_of
from octavo_kernels.ops.argmax import (
    argmax_rows_reference,
    check_logits,
    load_logits,
    pack_keys,
    split_rows,
    tokens_of_best_keys,
)
from octavo_kernels.ops.filter_thresholds import filter_thresholds
from octavo_kernels.ops.filter_thresholds import reference as kept_tokens
from octavo_kernels.ops.sampling_tensors import SamplingTensors, check_sampling


@dataclass(frozen=True, slots=True)
class Launch:
    """block: tokens that a program reads at a time."""

    block: int = 1024
    num_warps: int = 4


# One setting for all: 8 values per thread to stream.
LAUNCH: Mapping[str, Launch] = dict.fromkeys(VARIANTS, Launch())


def sample_rows_reference(logits: torch.Tensor, sampling: SamplingTensors) -> torch.Tensor:
    """`sample_rows` in torch, with a sort."""
    temperatures = sampling.temperatures.masked_fill(sampling.top_k == 1, 0)[:, None]
    noise = _gumbel_noise_reference(sampling, logits.shape[1])
    scores = torch.where(temperatures > 0, logits.float() + temperatures * noise, logits.float())
    is_kept = kept_tokens(logits, sampling) | (temperatures == 0)
    return argmax_rows_reference(scores.masked_fill(~is_kept, -torch.inf))


def _gumbel_noise_reference(sampling: SamplingTensors, vocab_size: int) -> torch.Tensor:
    """[num_rows, vocab_size] float32: word `token % 4` of Philox at counter (token // 4, position, index, 0)."""
    quads = torch.arange(cdiv(vocab_size, 4), device=sampling.seeds.device)
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
    kept. NaN counts as -inf, and -inf is never drawn, except that a row of -inf and NaN only gives token 0.

    logits:      [num_rows, vocab_size] float32, bfloat16 or float16, last dimension contiguous
    any_filters: False promises that no row filters, which saves two launches
    Returns      [num_rows] int64
    Raises ValueError if an argument has another shape, type or layout.
    Source: Gumbel-max, Maddison et al. (https://arxiv.org/abs/1411.0030).
    """
    check_logits(logits)
    check_sampling(logits, sampling)
    num_rows, vocab_size = logits.shape
    launch = LAUNCH[variant_of(logits.device)]
    thresholds = filter_thresholds(logits, sampling) if any_filters else None
    num_splits, tiles_per_split = split_rows(num_rows, vocab_size, launch.block)
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
            BLOCK=launch.block,
            num_warps=launch.num_warps,
            num_stages=1,
        )
    return tokens_of_best_keys(keys)


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


_POINTERS: Final = {
    "keys_ptr": "*i64",
    "temperatures_ptr": "*fp32",
    "top_k_ptr": "*i32",
    "thresholds_ptr": "*fp32",
    "seeds_ptr": "*i64",
    "indices_ptr": "*i32",
    "positions_ptr": "*i32",
}


def compile_examples(variant: str) -> list[CompileExample]:
    """The draw with and without filters, of float32 and bfloat16."""
    launch = LAUNCH[variant]
    return [
        CompileExample(
            name=f"sample_rows {'filtered' if has_thresholds else 'unfiltered'} {dtype}",
            function=_draw_kernel,
            signature=signature_of(_draw_kernel, _POINTERS | {"logits_ptr": f"*{dtype}"}, constexprs),
            constexprs=constexprs,
            num_warps=launch.num_warps,
            num_stages=1,
        )
        for has_thresholds in (True, False)
        for constexprs in ({"HAS_THRESHOLDS": has_thresholds, "FAST_LOG": True, "BLOCK": launch.block},)
        for dtype in ("fp32", "bf16")
    ]
