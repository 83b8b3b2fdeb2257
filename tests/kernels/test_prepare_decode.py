"""The inputs of a decode step follow from the tables; the kernel does what torch does."""

import pytest
import torch
from octavo_kernels.ops import prepare_decode as op


def clone(rows: op.DecodeRows) -> op.DecodeRows:
    return op.DecodeRows(rows.slots.clone(), rows.positions.clone(), rows.token_ids.clone())


@pytest.mark.parametrize("num_rows", [1, 5, 12])
def test_kernel_equals_torch_and_moves_the_rows_on(num_rows: int) -> None:
    torch.manual_seed(num_rows)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows, last_tokens, tables, block_size = op.example_inputs(num_rows)
    last_tokens, tables = last_tokens.to(device), tables.to(device)
    rows = op.DecodeRows(rows.slots.to(device), rows.positions.to(device), rows.token_ids.to(device))
    expected_rows, expected = clone(rows), op.empty_inputs(num_rows, tables.shape[1], device)
    inputs = op.empty_inputs(num_rows, tables.shape[1], device)
    for _ in range(2):
        rows.positions.clamp_(max=tables.shape[1] * block_size - 1)
        expected_rows.positions.copy_(rows.positions)
        op.prepare_decode_torch(expected_rows, last_tokens, tables, block_size, expected)
        op.prepare_decode_triton(rows, last_tokens, tables, block_size, inputs)
        for name in ("input_ids", "positions", "slot_mapping", "seq_lens"):
            torch.testing.assert_close(getattr(inputs, name), getattr(expected, name), msg=name)
        for row, length in enumerate(inputs.seq_lens.tolist()):
            used = -(-length // block_size)
            assert torch.equal(inputs.block_tables[row, :used], expected.block_tables[row, :used])
        assert torch.equal(rows.positions, expected_rows.positions)
        assert torch.equal(rows.token_ids, expected_rows.token_ids)


def test_padding_stays_padding() -> None:
    rows, last_tokens, tables, block_size = op.example_inputs(3)
    inputs = op.empty_inputs(3, tables.shape[1], torch.device("cpu"))
    op.prepare_decode_(rows, last_tokens, tables, block_size, inputs)
    assert (rows.positions[2], inputs.slot_mapping[2], inputs.seq_lens[2]) == (op.PADDING, -1, 0)
