"""The largest logit of each row: greedy decoding, and the last step of sampling (see `sample_tokens`).

A row is cut into splits, so that one row alone fills the GPU. Each split reduces to a key whose order as an integer is
"larger score first, then lower token", and a second, small kernel takes the largest key of the row. Integers have one
maximum whatever the order of the reduction: the result depends on nothing but the row.
"""
# Triton's kernels: untyped arguments, constexprs in capitals.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl

from octavo_kernels.launch import VARIANTS, CompileExample, cdiv, variant_of
from octavo_kernels.pdl import PDL_VARIANTS, begin, pdl_options

# Programs of a launch that keep every GPU busy, several waves of them so that the last, partial one costs little.
_NUM_PROGRAMS: Final = 8192

_REDUCE_BLOCK: Final = 128


@dataclass(frozen=True, slots=True)
class Launch:
    """block_size: tokens of a row that a program reads at a time."""

    block_size: int
    num_warps: int
    num_stages: int


# One setting for all: the kernel only streams. The block is small so that one row of 128256 makes 126 programs.
LAUNCH: Mapping[str, Launch] = dict.fromkeys(VARIANTS, Launch(block_size=1024, num_warps=4, num_stages=1))


def argmax_rows_reference(logits: torch.Tensor) -> torch.Tensor:
    """`argmax_rows` in torch."""
    scores = logits.float().masked_fill(logits.isnan(), -torch.inf)
    tokens = torch.arange(scores.shape[1], device=scores.device)
    is_best = scores == scores.amax(dim=1, keepdim=True)
    return torch.where(is_best, tokens, scores.shape[1]).amin(dim=1)


def argmax_rows(logits: torch.Tensor) -> torch.Tensor:
    """The token of the largest logit of each row: the lowest of equals; NaN counts as -inf.

    logits:  [num_rows, vocab_size] float32, bfloat16 or float16, last dimension contiguous
    Returns  [num_rows] int64; 0 for a row of -inf and NaN only
    Raises ValueError if the logits have another shape, type or layout.
    """
    check_logits(logits)
    num_rows, vocab_size = logits.shape
    launch = LAUNCH[variant_of(logits.device)]
    num_splits, tiles_per_split = split_rows(num_rows, vocab_size, launch.block_size)
    keys = torch.empty((num_rows, num_splits), dtype=torch.int64, device=logits.device)
    if num_rows:
        _argmax_kernel[num_rows, num_splits](
            logits,
            logits.stride(0),
            keys,
            vocab_size,
            tiles_per_split,
            BLOCK=launch.block_size,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
            **pdl_options(logits.device),
        )
    return tokens_of_best_keys(keys)


def check_logits(logits: torch.Tensor) -> None:
    """Raises ValueError unless these are [num_rows, vocab_size] logits as the kernels read them."""
    if logits.dim() != 2 or not logits.shape[1]:
        raise ValueError(f"logits have shape {tuple(logits.shape)}; expected [num_rows, vocab_size]")
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"logits are {logits.dtype}; expected float32, bfloat16 or float16")
    if logits.stride(1) != 1:
        raise ValueError("the logits of a row must be contiguous")


def split_rows(num_rows: int, vocab_size: int, block_size: int) -> tuple[int, int]:
    """(num_splits, tiles_per_split) of each row: many for few rows, never less than a tile of `block_size` tokens."""
    num_tiles = cdiv(vocab_size, block_size)
    tiles_per_split = cdiv(num_tiles, cdiv(_NUM_PROGRAMS, max(num_rows, 1)))
    return cdiv(num_tiles, tiles_per_split), tiles_per_split


def tokens_of_best_keys(keys: torch.Tensor) -> torch.Tensor:
    """The token in the largest key (see `pack_keys`) of each row. keys: [num_rows, num_splits] int64, contiguous."""
    tokens = torch.empty(keys.shape[0], dtype=torch.int64, device=keys.device)
    if keys.shape[0]:
        _best_key_kernel[(keys.shape[0],)](
            keys, tokens, keys.shape[1], BLOCK=_REDUCE_BLOCK, num_warps=1, num_stages=1, **pdl_options(keys.device)
        )
    return tokens


@triton.jit
def load_logits(pointers, mask):
    """Logits in float32 with NaN and what is masked as -inf, and +inf as the largest finite number.

    So a difference to the row's best is never NaN, and nothing compares as neither less nor greater.
    """
    values = tl.load(pointers, mask=mask, other=float("-inf")).to(tl.float32)
    values = tl.where(values == values, values, float("-inf"))  # only NaN differs from itself
    return tl.minimum(values, 3.4028234663852886e38)


@triton.jit
def order_preserving(bits):
    """Float32 bits as int32 that sort like the floats, and back: negative floats run the other way."""
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def pack_keys(scores, tokens):
    """int64 keys: the larger key has the larger score or, of equal scores, the lower token.

    scores: float32 without NaN; tokens: int32, at least 0
    """
    scores = tl.where(scores == 0, 0.0, scores)  # -0 equals 0, its bits do not
    high = order_preserving(scores.to(tl.int32, bitcast=True)).to(tl.int64)
    return (high << 32) | (0x7FFFFFFF - tokens).to(tl.int64)


@triton.jit(do_not_specialize=["tiles_per_split"])
def _argmax_kernel(
    logits_ptr, row_stride, keys_ptr, vocab_size, tiles_per_split, BLOCK: tl.constexpr, USE_PDL: tl.constexpr
):
    """Grid: one program per (row, split)."""
    begin(USE_PDL)
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    first_tile = split * tiles_per_split
    tokens = first_tile * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    best_scores = tl.full([BLOCK], float("-inf"), tl.float32)
    best_tokens = tokens
    for _ in range(tiles_per_split):
        scores = load_logits(logits_ptr + row * row_stride + tokens, tokens < vocab_size)  # [BLOCK]
        is_better = scores > best_scores
        best_scores = tl.where(is_better, scores, best_scores)
        best_tokens = tl.where(is_better, tokens, best_tokens)
        tokens += BLOCK
    best_key = tl.max(pack_keys(best_scores, best_tokens), axis=0)
    tl.store(keys_ptr + row * tl.num_programs(1) + split, best_key)


@triton.jit(do_not_specialize=["num_splits"])
def _best_key_kernel(keys_ptr, tokens_ptr, num_splits, BLOCK: tl.constexpr, USE_PDL: tl.constexpr):
    """Grid: one program per row."""
    begin(USE_PDL)
    row = tl.program_id(0).to(tl.int64)
    splits = tl.arange(0, BLOCK)
    best_keys = tl.full([BLOCK], -0x8000000000000000, tl.int64)  # [BLOCK]
    for start in range(0, num_splits, BLOCK):
        is_split = start + splits < num_splits
        keys = tl.load(keys_ptr + row * num_splits + start + splits, mask=is_split, other=-0x8000000000000000)
        best_keys = tl.maximum(best_keys, keys)
    best_key = tl.max(best_keys, axis=0)
    tl.store(tokens_ptr + row, 0x7FFFFFFF - (best_key & 0xFFFFFFFF))


def example_inputs(num_rows: int, vocab_size: int, *, device: str = "cpu") -> torch.Tensor:
    """Logits of `argmax_rows`: float32, normal with the spread of a language model's."""
    return torch.randn(num_rows, vocab_size, device=device) * 3


def compile_examples(variant: str) -> list[CompileExample]:
    """The kernels as a vocabulary of 128256 launches them, float32 and bfloat16."""
    launch = LAUNCH[variant]
    integers = {"row_stride": "i32", "vocab_size": "i32", "tiles_per_split": "i32"}
    partial = [
        CompileExample(
            name=f"argmax_rows {dtype}",
            function=_argmax_kernel,
            signature={"logits_ptr": f"*{dtype}", "keys_ptr": "*i64", **integers},
            constexprs={"BLOCK": launch.block_size, "USE_PDL": variant in PDL_VARIANTS},
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
        for dtype in ("fp32", "bf16")
    ]
    reduce = CompileExample(
        name="argmax_rows best key",
        function=_best_key_kernel,
        signature={"keys_ptr": "*i64", "tokens_ptr": "*i64", "num_splits": "i32"},
        constexprs={"BLOCK": _REDUCE_BLOCK, "USE_PDL": variant in PDL_VARIANTS},
        num_warps=1,
        num_stages=1,
    )
    return [*partial, reduce]
