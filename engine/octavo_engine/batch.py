"""A scheduler's step as the tensors that the model reads: prepared once per step, in batch order."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import numpy as np
import torch
from octavo_kernels.ops.attention_metadata import AttentionMetadata

from octavo_engine.request import PROMISED
from octavo_engine.scheduler import ScheduledRequest, Step
from octavo_engine.slot_tables import SlotTables
from octavo_engine.staging import upload, upload_together

Integers = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One step's input.

    input_ids, positions: [num_tokens] int64
    sampled_rows:         [num_logits] int64, the token whose hidden state each sampled sequence reads. Forks of one
                          prompt read the same row. There may be more of them than sequences.
    block_copies:         [2, num_copies] int64, sources and destinations, or None
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    metadata: AttentionMetadata
    sampled_rows: torch.Tensor
    block_copies: torch.Tensor | None


def prepare(
    step: Step, block_size: int, device: torch.device, tables: SlotTables | None, numbers_of_logits: Sequence[int] = ()
) -> Batch:
    """Lay a step out as tensors on `device`.

    tables:            the device's; they have the step's blocks, and the tokens that the host does not know yet
    numbers_of_logits: ascending; `sampled_rows` is filled up to one of them, if it holds anything
    """
    scheduled = step.scheduled
    query_lens = tuple(each.num_tokens for each in scheduled)
    context_lens = tuple(each.first_token + each.num_tokens for each in scheduled)
    starts = np.fromiter(accumulate(query_lens, initial=0), np.int64, len(scheduled) + 1)
    rows = np.repeat(np.arange(len(scheduled)), query_lens)
    slots = np.fromiter((each.request.slot for each in scheduled), np.int64, len(scheduled))
    token_ids = _token_ids(scheduled, step.num_tokens)
    (promised,) = np.nonzero(token_ids == PROMISED)
    here = upload_together(
        {
            "input_ids": token_ids,
            "positions": _positions(scheduled, starts),
            "requests": rows,
            # As a captured step has them, whose kernels are compiled by then.
            "seq_lens": np.array(context_lens, np.int32),
            "query_start_loc": starts,
            "sampled_rows": np.array(_fill_up(_sampled_rows(scheduled, starts), numbers_of_logits), np.int64),
            "slots": slots,
            "promised": promised,
            "promised_slots": slots[rows[promised]],
        },
        device,
    )
    if tables is None:
        assert not len(promised), "without tables on the device every token is known"
        block_tables = upload(_block_tables(scheduled), device)
    else:
        block_tables = tables.block_tables[here["slots"]]
        if len(promised):
            here["input_ids"][here["promised"]] = tables.last_tokens[here["promised_slots"]]
    positions = here["positions"]
    blocks = block_tables[here["requests"], torch.div(positions, block_size, rounding_mode="floor")]
    return Batch(
        input_ids=here["input_ids"],
        positions=positions,
        metadata=AttentionMetadata(
            block_tables=block_tables,
            seq_lens=here["seq_lens"],
            query_start_loc=here["query_start_loc"],
            slot_mapping=blocks * block_size + positions % block_size,
            num_decodes=sum(length == 1 for length in query_lens),
            query_lens=query_lens,
            context_lens=context_lens,
        ),
        sampled_rows=here["sampled_rows"],
        block_copies=copies_on(device, step),
    )


def copies_on(device: torch.device, step: Step) -> torch.Tensor | None:
    """The step's block copies as `Batch.block_copies`."""
    return upload(np.array(step.block_copies, np.int64).T.copy(), device) if step.block_copies else None


def _positions(scheduled: Sequence[ScheduledRequest], query_start_loc: Integers) -> Integers:
    first_tokens = np.fromiter((each.first_token for each in scheduled), np.int64, len(scheduled))
    shifts = np.repeat(first_tokens - query_start_loc[:-1], np.diff(query_start_loc))
    return np.arange(query_start_loc[-1], dtype=np.int64) + shifts


def _token_ids(scheduled: Sequence[ScheduledRequest], num_tokens: int) -> Integers:
    """PROMISED for those that the device sampled and the host does not know yet."""
    chunks = (each.request.token_ids[each.first_token : each.first_token + each.num_tokens] for each in scheduled)
    return np.fromiter(chain.from_iterable(chunks), np.int64, num_tokens)


def _block_tables(scheduled: Sequence[ScheduledRequest]) -> Integers:
    width = max(len(each.request.block_ids) for each in scheduled)
    tables = np.zeros((len(scheduled), width), np.int64)
    for row, each in zip(tables, scheduled, strict=True):
        row[: len(each.request.block_ids)] = each.request.block_ids
    return tables


def _sampled_rows(scheduled: Sequence[ScheduledRequest], query_start_loc: Integers) -> list[int]:
    last_rows = (query_start_loc[1:] - 1).tolist()
    return [row for row, each in zip(last_rows, scheduled, strict=True) for _ in each.sampled]


def _fill_up(rows: list[int], numbers: Sequence[int]) -> list[int]:
    index = bisect_left(numbers, len(rows))
    return rows + rows[-1:] * (numbers[index] - len(rows)) if index < len(numbers) else rows
