"""Penalties, logit bias and forbidden tokens, applied to logits where they lie.

Which tokens a sequence has seen is kept on the GPU, one row of `TokenTables` per running sequence, so that a step costs
no upload and a CUDA graph can hold it. A row of logits that asks for nothing is not read.
"""
# Triton's kernels: untyped arguments, constexprs in capitals.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
import triton
import triton.language as tl

from octavo_kernels.launch import VARIANTS, CompileExample, cdiv, signature_of, variant_of
from octavo_kernels.ops.argmax import check_logits

_WORD_BITS: Final = 32


@dataclass(frozen=True, slots=True)
class Launch:
    """block_size: logits of a row, tokens to count, or entries of a bias that a program takes at a time."""

    block_size: int
    num_warps: int
    num_stages: int


# One setting for all: the kernels stream.
LAUNCH: Mapping[str, Launch] = dict.fromkeys(VARIANTS, Launch(block_size=2048, num_warps=4, num_stages=1))


@dataclass(frozen=True, slots=True, eq=False)
class TokenTables:
    """What each slot's sequence has seen. Its owner assigns a slot to a sequence for as long as it runs.

    prompt_mask:   [num_slots, ceil(vocab_size / 32)] int32; bit `token % 32` of word `token // 32`: in the prompt
    output_counts: [num_slots, vocab_size] int32, how often each token was generated
    """

    prompt_mask: torch.Tensor
    output_counts: torch.Tensor


def allocate_tables(num_slots: int, vocab_size: int, device: torch.device) -> TokenTables:
    """Tables of empty slots."""
    num_words = cdiv(vocab_size, _WORD_BITS)
    return TokenTables(
        torch.zeros((num_slots, num_words), dtype=torch.int32, device=device),
        torch.zeros((num_slots, vocab_size), dtype=torch.int32, device=device),
    )


def reset_slot(tables: TokenTables, slot: int) -> None:
    """Forget the slot's sequence."""
    tables.prompt_mask[slot].zero_()
    tables.output_counts[slot].zero_()


def add_prompt_tokens(tables: TokenTables, slot: int, token_ids: torch.Tensor) -> None:
    """Mark tokens as part of the slot's prompt. token_ids: [num_tokens] int64 on the tables' device, repeats allowed.

    Once per request and without synchronisation, but not meant for a CUDA graph.
    """
    num_words = tables.prompt_mask.shape[1]
    is_seen = torch.zeros(num_words * _WORD_BITS, dtype=torch.bool, device=token_ids.device)
    is_seen.index_fill_(0, token_ids, True)
    bits = torch.arange(_WORD_BITS, device=token_ids.device)
    words = (is_seen.view(num_words, _WORD_BITS).long() << bits).sum(dim=1)
    tables.prompt_mask[slot] |= words.to(torch.int32)  # keeps the low 32 bits


def add_output_tokens_reference(tables: TokenTables, slots: torch.Tensor, token_ids: torch.Tensor) -> None:
    """`add_output_tokens` in torch."""
    vocab_size = tables.output_counts.shape[1]
    is_token = (slots >= 0) & (token_ids >= 0) & (token_ids < vocab_size)
    cells = torch.where(is_token, slots.long() * vocab_size + token_ids, 0)
    tables.output_counts.view(-1).scatter_add_(0, cells, is_token.int())


def add_output_tokens(tables: TokenTables, slots: torch.Tensor, token_ids: torch.Tensor) -> None:
    """Count generated tokens, in place; may be part of a CUDA graph.

    slots:     [num_tokens] int32, -1 = padding, skipped; a slot may come more than once
    token_ids: [num_tokens] int64, such as `sample_rows` returns; what is not in the vocabulary, such as -1, is skipped
    Raises ValueError if an argument has another shape or type.
    """
    _check("slots", slots, torch.int32, token_ids.shape)
    _check("token_ids", token_ids, torch.int64, slots.shape)
    launch = LAUNCH[variant_of(token_ids.device)]
    num_tokens = len(token_ids)
    if num_tokens:
        _count_kernel[(cdiv(num_tokens, launch.block_size),)](
            tables.output_counts,
            tables.output_counts.stride(0),
            slots,
            token_ids,
            num_tokens,
            tables.output_counts.shape[1],
            BLOCK=launch.block_size,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )


def apply_penalties_reference(
    logits: torch.Tensor,
    tables: TokenTables,
    slots: torch.Tensor,
    repetition: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
) -> torch.Tensor:
    """`apply_penalties_` in torch, out of place."""
    rows = slots.clamp(min=0).long()
    counts = tables.output_counts[rows]
    bits = torch.arange(_WORD_BITS, device=logits.device)
    in_prompt = ((tables.prompt_mask[rows].long()[:, :, None] >> bits) & 1).flatten(1)[:, : logits.shape[1]] > 0
    scores = logits.float()
    divisor = repetition[:, None]
    repeated = torch.where(scores > 0, scores / divisor, scores * divisor)
    scores = torch.where((in_prompt | (counts > 0)) & (divisor != 1), repeated, scores)
    scores = scores - torch.where(counts > 0, presence[:, None] + frequency[:, None] * counts, 0)
    return torch.where(slots[:, None] >= 0, scores, logits.float()).to(logits.dtype)


def apply_penalties_(
    logits: torch.Tensor,
    tables: TokenTables,
    slots: torch.Tensor,
    repetition: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
) -> None:
    """Penalise what each row's sequence has seen, in place.

    Repetition first, over prompt and generated tokens: a positive logit is divided by it, another multiplied. Then
    presence + frequency * count is taken off each generated token.

    logits:     [num_rows, vocab_size] float32, bfloat16 or float16, last dimension contiguous
    slots:      [num_rows] int32, the row of the tables; -1 = padding, skipped
    repetition: [num_rows] float32, positive; 1 = off
    presence, frequency: [num_rows] float32; 0 = off
    Raises ValueError if an argument has another shape, type or layout.
    Source: CTRL (https://arxiv.org/abs/1909.05858), section 4.1; presence and frequency as OpenAI's API defines them.
    """
    check_logits(logits)
    num_rows, vocab_size = logits.shape
    if tables.output_counts.shape[1] != vocab_size:
        raise ValueError(f"the tables are for {tables.output_counts.shape[1]} tokens, the logits for {vocab_size}")
    _check("slots", slots, torch.int32, (num_rows,))
    for name, tensor in (("repetition", repetition), ("presence", presence), ("frequency", frequency)):
        _check(name, tensor, torch.float32, (num_rows,))
    launch = LAUNCH[variant_of(logits.device)]
    if num_rows:
        _penalise_kernel[num_rows, cdiv(vocab_size, launch.block_size)](
            logits,
            logits.stride(0),
            tables.prompt_mask,
            tables.prompt_mask.stride(0),
            tables.output_counts,
            tables.output_counts.stride(0),
            slots,
            repetition,
            presence,
            frequency,
            vocab_size,
            BLOCK=launch.block_size,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )


def add_logit_bias_reference(
    logits: torch.Tensor, rows: torch.Tensor, token_ids: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """`add_logit_bias_` in torch, out of place."""
    is_token = (token_ids >= 0) & (token_ids < logits.shape[1])
    cells = rows[is_token].long(), token_ids[is_token].long()
    return logits.float().index_put(cells, bias[is_token], accumulate=True).to(logits.dtype)


def add_logit_bias_(logits: torch.Tensor, rows: torch.Tensor, token_ids: torch.Tensor, bias: torch.Tensor) -> None:
    """logits[rows[i], token_ids[i]] += bias[i], in place.

    logits: [num_rows, vocab_size] float32, bfloat16 or float16, last dimension contiguous
    rows, token_ids: [num_entries] int32, no pair of them twice; a token that is not in the vocabulary is skipped
    bias:   [num_entries] float32
    Raises ValueError if an argument has another shape, type or layout.
    """
    _check("bias", bias, torch.float32, rows.shape)
    _launch_bias(logits, rows, token_ids, bias)


def forbid_tokens_(logits: torch.Tensor, rows: torch.Tensor, token_ids: torch.Tensor) -> None:
    """logits[rows[i], token_ids[i]] = -inf, in place. Arguments as of `add_logit_bias_`; pairs may repeat."""
    _launch_bias(logits, rows, token_ids, None)


def _launch_bias(logits: torch.Tensor, rows: torch.Tensor, token_ids: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Adds the bias; without one, sets -inf."""
    check_logits(logits)
    num_entries = len(rows)
    _check("rows", rows, torch.int32, (num_entries,))
    _check("token_ids", token_ids, torch.int32, (num_entries,))
    launch = LAUNCH[variant_of(logits.device)]
    if num_entries:
        _bias_kernel[(cdiv(num_entries, launch.block_size),)](
            logits,
            logits.stride(0),
            rows,
            token_ids,
            bias,
            num_entries,
            logits.shape[1],
            HAS_BIAS=bias is not None,
            BLOCK=launch.block_size,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )


def _check(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous():
        raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)}; expected contiguous {dtype} {tuple(shape)}")


@triton.jit(do_not_specialize=["num_tokens"])
def _count_kernel(counts_ptr, counts_stride, slots_ptr, token_ids_ptr, num_tokens, vocab_size, BLOCK: tl.constexpr):
    """Grid: one program per BLOCK tokens. Atomic, since two tokens of one slot may be the same."""
    entries = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    slots = tl.load(slots_ptr + entries, mask=entries < num_tokens, other=-1).to(tl.int64)
    token_ids = tl.load(token_ids_ptr + entries, mask=entries < num_tokens, other=-1)
    ones = tl.full([BLOCK], 1, tl.int32)
    is_token = (slots >= 0) & (token_ids >= 0) & (token_ids < vocab_size)
    tl.atomic_add(counts_ptr + slots * counts_stride + token_ids, ones, mask=is_token)


@triton.jit
def _penalise_kernel(
    logits_ptr,
    row_stride,
    prompt_mask_ptr,
    prompt_mask_stride,
    counts_ptr,
    counts_stride,
    slots_ptr,
    repetition_ptr,
    presence_ptr,
    frequency_ptr,
    vocab_size,
    BLOCK: tl.constexpr,
):
    """Grid: one program per (row, BLOCK tokens). In float32; only what the sequence has seen is written."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    repetition = tl.load(repetition_ptr + row)
    presence = tl.load(presence_ptr + row)
    frequency = tl.load(frequency_ptr + row)
    if (slot >= 0) & ((repetition != 1) | (presence != 0) | (frequency != 0)):
        tokens = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
        is_token = tokens < vocab_size
        counts = tl.load(counts_ptr + slot * counts_stride + tokens, mask=is_token, other=0)
        words = tl.load(prompt_mask_ptr + slot * prompt_mask_stride + tokens // 32, mask=is_token, other=0)
        is_generated = counts > 0
        is_seen = is_generated | (((words >> (tokens % 32)) & 1) > 0)
        scores = tl.load(logits_ptr + row * row_stride + tokens, mask=is_seen, other=0.0).to(tl.float32)
        scores = tl.where(scores > 0, scores / repetition, scores * repetition)
        scores -= tl.where(is_generated, presence + frequency * counts.to(tl.float32), 0.0)
        tl.store(logits_ptr + row * row_stride + tokens, scores, mask=is_seen)


@triton.jit(do_not_specialize=["num_entries"])
def _bias_kernel(
    logits_ptr, row_stride, rows_ptr, token_ids_ptr, bias_ptr, num_entries, vocab_size,
    HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: one program per BLOCK entries."""
    entries = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    is_entry = entries < num_entries
    rows = tl.load(rows_ptr + entries, mask=is_entry, other=0).to(tl.int64)
    token_ids = tl.load(token_ids_ptr + entries, mask=is_entry, other=-1)
    is_token = (token_ids >= 0) & (token_ids < vocab_size)
    logit_ptrs = logits_ptr + rows * row_stride + token_ids
    scores = tl.full([BLOCK], float("-inf"), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + entries, mask=is_token, other=0.0)
        scores = tl.load(logit_ptrs, mask=is_token, other=0.0).to(tl.float32) + bias
    tl.store(logit_ptrs, scores, mask=is_token)


def example_inputs(
    num_rows: int, vocab_size: int, *, device: str = "cpu"
) -> tuple[torch.Tensor, TokenTables, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Arguments of `apply_penalties_`: every other row asks; the slots, in reverse order, each have seen tokens."""
    tables = allocate_tables(num_rows, vocab_size, torch.device(device))
    slots = torch.arange(num_rows - 1, -1, -1, dtype=torch.int32, device=device)
    for slot in range(num_rows):
        add_prompt_tokens(tables, slot, torch.randint(vocab_size, (32,), device=device))
    for _ in range(32):
        add_output_tokens_reference(tables, slots, torch.randint(vocab_size, (num_rows,), device=device))
    asks = torch.arange(num_rows, device=device) % 2 == 0
    repetition, presence, frequency = (
        torch.where(asks, 1.3, 1.0),
        torch.where(asks, 0.5, 0.0),
        torch.where(asks, 0.2, 0.0),
    )
    return torch.randn(num_rows, vocab_size, device=device) * 3, tables, slots, repetition, presence, frequency


_POINTERS: Final = {
    "prompt_mask_ptr": "*i32",
    "counts_ptr": "*i32",
    "slots_ptr": "*i32",
    "rows_ptr": "*i32",
    "repetition_ptr": "*fp32",
    "presence_ptr": "*fp32",
    "frequency_ptr": "*fp32",
    "bias_ptr": "*fp32",
}


def compile_examples(variant: str) -> list[CompileExample]:
    """The kernels, those that touch logits for float32 and bfloat16."""
    launch = LAUNCH[variant]
    kernels: tuple[tuple[str, Any, dict[str, object], dict[str, str]], ...] = (
        ("penalties", _penalise_kernel, {}, {"logits_ptr": "*fp32"}),
        ("penalties bfloat16", _penalise_kernel, {}, {"logits_ptr": "*bf16"}),
        ("bias", _bias_kernel, {"HAS_BIAS": True}, {"logits_ptr": "*fp32", "token_ids_ptr": "*i32"}),
        ("bias bfloat16", _bias_kernel, {"HAS_BIAS": True}, {"logits_ptr": "*bf16", "token_ids_ptr": "*i32"}),
        ("count", _count_kernel, {}, {"token_ids_ptr": "*i64"}),
    )
    return [
        CompileExample(
            name=f"penalties {name}",
            function=function,
            signature=signature_of(function, _POINTERS | pointers, {*constexprs, "BLOCK"}),
            constexprs={**constexprs, "BLOCK": launch.block_size},
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
        for name, function, constexprs, pointers in kernels
    ]
