"""The inputs of a decode step, made on the device from tables of the running sequences.

A decode step differs from the one before it by one token a sequence, so everything that the model reads follows from
what the device has: the token that was sampled last, the position, and the block table. The step's first kernel derives
it, and moves the positions on, so that a captured step can be replayed without the host.
"""
# Triton's kernels: untyped arguments, constexprs in capitals.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from octavo_kernels.launch import CompileExample, runs_triton

UNKNOWN = -1  # a token whose value only the device has
PADDING = -1  # the position of a row without a sequence


@dataclass(frozen=True, slots=True, eq=False)
class DecodeRows:
    """The rows of a decode step, written by the host, moved on by the device.

    slots:     [num_rows] int32, each row's sequence in the tables
    positions: [num_rows] int32, of the token to compute; PADDING for none. Each step adds one
    token_ids: [num_rows] int32, the token where the host knows it, else UNKNOWN; each step sets it to UNKNOWN
    """

    slots: torch.Tensor
    positions: torch.Tensor
    token_ids: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class DecodeInputs:
    """What the model reads, all of it overwritten by each step.

    input_ids, positions: [num_rows] int64
    slot_mapping:         [num_rows] int64, block_id * block_size + offset; -1 for padding
    seq_lens:             [num_rows] int32, context including this token; 0 for padding
    block_tables:         [num_rows, max_blocks] int32
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    seq_lens: torch.Tensor
    block_tables: torch.Tensor


def empty_inputs(num_rows: int, max_blocks: int, device: torch.device) -> DecodeInputs:
    """Memory for the inputs of `num_rows` rows."""

    def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    return DecodeInputs(
        input_ids=zeros(num_rows, dtype=torch.int64),
        positions=zeros(num_rows, dtype=torch.int64),
        slot_mapping=zeros(num_rows, dtype=torch.int64),
        seq_lens=zeros(num_rows, dtype=torch.int32),
        block_tables=zeros(num_rows, max_blocks, dtype=torch.int32),
    )


def prepare_decode_(
    rows: DecodeRows, last_tokens: torch.Tensor, block_tables: torch.Tensor, block_size: int, inputs: DecodeInputs
) -> None:
    """Fill `inputs` for the next token of each row, and move the rows on.

    last_tokens:  [num_slots] int64, the token sampled last
    block_tables: [num_slots, max_blocks] int32
    """
    prepare = prepare_decode_triton if runs_triton(block_tables) else prepare_decode_torch
    prepare(rows, last_tokens, block_tables, block_size, inputs)


def prepare_decode_triton(
    rows: DecodeRows, last_tokens: torch.Tensor, block_tables: torch.Tensor, block_size: int, inputs: DecodeInputs
) -> None:
    """`prepare_decode_` in one kernel. Columns of a block table past a row's context keep what they held."""
    num_rows = len(rows.slots)
    _prepare_decode_kernel[(num_rows,)](
        rows.slots, rows.positions, rows.token_ids, last_tokens, block_tables,
        inputs.input_ids, inputs.positions, inputs.slot_mapping, inputs.seq_lens, inputs.block_tables,
        block_tables.stride(0), inputs.block_tables.stride(0), block_size, BLOCK=1024, num_warps=4,
    )  # fmt: skip


def prepare_decode_torch(
    rows: DecodeRows, last_tokens: torch.Tensor, block_tables: torch.Tensor, block_size: int, inputs: DecodeInputs
) -> None:
    """`prepare_decode_` in torch: the reference, and what a CPU runs."""
    slots, is_real = rows.slots.long(), rows.positions != PADDING
    positions = rows.positions.clamp(min=0).long()
    inputs.input_ids.copy_(torch.where(rows.token_ids == UNKNOWN, last_tokens[slots], rows.token_ids.long()))
    inputs.positions.copy_(positions)
    inputs.block_tables.copy_(block_tables[slots])
    blocks = inputs.block_tables.gather(1, (positions // block_size)[:, None])[:, 0].long()
    inputs.slot_mapping.copy_(torch.where(is_real, blocks * block_size + positions % block_size, -1))
    inputs.seq_lens.copy_(torch.where(is_real, positions + 1, 0))
    rows.positions.add_(is_real.int())
    rows.token_ids.fill_(UNKNOWN)


@triton.jit
def _prepare_decode_kernel(
    slots_ptr, row_positions_ptr, row_tokens_ptr, last_tokens_ptr, tables_ptr,
    input_ids_ptr, positions_ptr, slot_mapping_ptr, seq_lens_ptr, row_tables_ptr,
    table_stride, row_table_stride, block_size,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row."""
    row = tl.program_id(0)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    stored_position = tl.load(row_positions_ptr + row)
    is_real = stored_position >= 0
    position = tl.maximum(stored_position, 0)
    known = tl.load(row_tokens_ptr + row)
    token = tl.where(known >= 0, known.to(tl.int64), tl.load(last_tokens_ptr + slot))
    table_ptr = tables_ptr + slot * table_stride
    block_id = tl.load(table_ptr + position // block_size).to(tl.int64)
    # All threads load the same position and token: none may overwrite what another has yet to load.
    tl.debug_barrier()
    tl.store(input_ids_ptr + row, token)
    tl.store(positions_ptr + row, position.to(tl.int64))
    tl.store(slot_mapping_ptr + row, tl.where(is_real, block_id * block_size + position % block_size, -1))
    tl.store(seq_lens_ptr + row, tl.where(is_real, position + 1, 0))
    tl.store(row_positions_ptr + row, tl.where(is_real, position + 1, stored_position))
    tl.store(row_tokens_ptr + row, -1)
    num_used = tl.where(is_real, position // block_size + 1, 0)
    for start in range(0, num_used, BLOCK):
        columns = start + tl.arange(0, BLOCK)  # [BLOCK]
        blocks = tl.load(table_ptr + columns, mask=columns < num_used, other=0)
        tl.store(row_tables_ptr + row.to(tl.int64) * row_table_stride + columns, blocks, mask=columns < num_used)


def example_inputs(
    num_rows: int, *, num_slots: int = 12, max_blocks: int = 9, block_size: int = 4
) -> tuple[DecodeRows, torch.Tensor, torch.Tensor, int]:
    """Rows in random slots, every third one padding, every fourth with a token that the host knows."""
    slots = torch.randperm(num_slots)[:num_rows].int()
    positions = torch.randint(0, max_blocks * block_size, (num_rows,)).int()
    positions[2::3] = PADDING
    token_ids = torch.full((num_rows,), UNKNOWN, dtype=torch.int32)
    token_ids[::4] = torch.randint(0, 1000, (len(token_ids[::4]),)).int()
    tables = torch.randint(0, 500, (num_slots, max_blocks)).int()
    return DecodeRows(slots, positions, token_ids), torch.randint(0, 1000, (num_slots,)), tables, block_size


def compile_examples(variant: str) -> list[CompileExample]:
    """The one kernel, which is the same for every variant."""
    pointers = dict.fromkeys(("slots_ptr", "row_positions_ptr", "row_tokens_ptr", "tables_ptr"), "*i32")
    pointers |= dict.fromkeys(("last_tokens_ptr", "input_ids_ptr", "positions_ptr", "slot_mapping_ptr"), "*i64")
    pointers |= dict.fromkeys(("seq_lens_ptr", "row_tables_ptr"), "*i32")
    integers = dict.fromkeys(("table_stride", "row_table_stride", "block_size"), "i32")
    return [
        CompileExample(
            name="prepare_decode",
            function=_prepare_decode_kernel,
            signature=pointers | integers,
            constexprs={"BLOCK": 1024},
            num_warps=4,
            num_stages=1,
        )
    ]
