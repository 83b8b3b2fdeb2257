"""Decode steps as CUDA graphs: one launch for a whole step, whatever the model's number of kernels.

A graph is captured once for each of a few batch sizes; a step takes the next larger one and pads. All that changes
from step to step lies in device memory: slots, positions, block tables, the last tokens. A graph ends with the
likeliest tokens written where its next replay reads them, so that greedy sequences go on without the host.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from octavo_kernels.ops.argmax import argmax_rows
from octavo_kernels.ops.attention_metadata import AttentionMetadata
from octavo_kernels.ops.prepare_decode import PADDING, UNKNOWN, DecodeInputs, DecodeRows, empty_inputs, prepare_decode_

from octavo_engine.capacity import decode_graph_sizes
from octavo_engine.graph_capture import capture
from octavo_engine.models import Model
from octavo_engine.parallel import Pipeline
from octavo_engine.request import Request
from octavo_engine.slot_tables import SlotTables
from octavo_engine.staging import upload


@dataclass(frozen=True, slots=True, eq=False)
class DecodeGraph:
    """A captured step of `num_rows` rows. logits, token_ids: overwritten by each `replay`, which does not wait."""

    num_rows: int
    replay: Callable[[], None]
    logits: torch.Tensor
    token_ids: torch.Tensor


class DecodeGraphs:
    """The captured steps of one model."""

    def __init__(
        self,
        model: Model,
        kv_cache: torch.Tensor,
        tables: SlotTables,
        pipeline: Pipeline | None,
        max_num_seqs: int,
        pool: Any,
        on_progress: Callable[[float], None],
    ) -> None:
        """Capture every size, the largest first, since the smaller ones fit into its memory."""
        self._model, self._kv_cache, self._tables, self._pipeline = model, kv_cache, tables, pipeline
        self._device, self._block_size = kv_cache.device, kv_cache.shape[3]
        self._sizes = decode_graph_sizes(max_num_seqs)
        self._rows = torch.empty(3 * max_num_seqs, dtype=torch.int32, device=self._device)
        self._inputs = empty_inputs(max_num_seqs, tables.block_tables.shape[1], self._device)
        self._query_starts = torch.arange(max_num_seqs + 1, device=self._device)
        self._graphs: dict[int, DecodeGraph] = {}
        # What the device's rows say after the last step: how many they are, whose, in which slots, the next positions.
        self._next_rows: tuple[int, list[Request], list[int], list[int]] | None = None
        for count, num_rows in enumerate(reversed(self._sizes), 1):
            self._graphs[num_rows] = self._capture(num_rows, pool)
            on_progress(count / len(self._sizes))

    def begin(self, requests: list[Request], first_tokens: list[int], num_rounds: int) -> DecodeGraph:
        """The graph whose `num_rounds` replays each compute the next token's logits of each request, and its likeliest
        token.

        first_tokens: position of each request's token to compute first
        The device moves its rows on by itself, so that nothing is sent where a step goes on with the one before it.
        """
        graph = self._graphs[self._sizes[bisect_left(self._sizes, len(requests))]]
        slots = [request.slot for request in requests]
        if self._next_rows != (graph.num_rows, requests, slots, first_tokens):
            self._send_rows(graph.num_rows, requests, first_tokens)
        self._next_rows = graph.num_rows, requests, slots, [position + num_rounds for position in first_tokens]
        return graph

    def interrupt(self) -> None:
        """Tell of a step of another kind, after which a sequence may have a token that only the host knows."""
        self._next_rows = None

    def _send_rows(self, num_rows: int, requests: Sequence[Request], first_tokens: Sequence[int]) -> None:
        host = np.empty((3, num_rows), np.int32)
        num_real = len(requests)
        host[0, :num_real] = [request.slot for request in requests]
        host[0, num_real:] = self._tables.padding_slot
        host[1, :num_real] = first_tokens
        host[1, num_real:] = PADDING
        host[2, :num_real] = [
            request.token_ids[position] for request, position in zip(requests, first_tokens, strict=True)
        ]
        host[2, num_real:] = UNKNOWN
        self._rows[: host.size].copy_(upload(host.reshape(-1), self._device), non_blocking=True)

    def _capture(self, num_rows: int, pool: Any) -> DecodeGraph:
        rows = DecodeRows(*self._rows[: 3 * num_rows].view(3, num_rows).unbind())
        rows.slots.fill_(self._tables.padding_slot)
        rows.positions.fill_(PADDING)
        rows.token_ids.fill_(UNKNOWN)
        captured = capture(partial(self._step, rows), self._device, pool)
        logits, token_ids = captured.outputs
        return DecodeGraph(num_rows, captured.replay, logits, token_ids)

    @torch.inference_mode()
    def _step(self, rows: DecodeRows) -> tuple[torch.Tensor, torch.Tensor]:
        num_rows = len(rows.slots)
        inputs = _first_rows(self._inputs, num_rows)
        prepare_decode_(rows, self._tables.last_tokens, self._tables.block_tables, self._block_size, inputs)
        metadata = AttentionMetadata(
            block_tables=inputs.block_tables,
            seq_lens=inputs.seq_lens,
            query_start_loc=self._query_starts[: num_rows + 1],
            slot_mapping=inputs.slot_mapping,
            num_decodes=num_rows,
            query_lens=(1,) * num_rows,
            context_lens=(),
        )
        hidden = self._model.forward(inputs.input_ids, inputs.positions, self._kv_cache, metadata)
        logits = self._model.compute_logits(hidden)
        token_ids = argmax_rows(logits)
        if self._pipeline:
            self._pipeline.share_tokens(token_ids)
        self._tables.last_tokens.index_copy_(0, rows.slots.long(), token_ids)
        return logits, token_ids


def _first_rows(inputs: DecodeInputs, num_rows: int) -> DecodeInputs:
    return DecodeInputs(
        inputs.input_ids[:num_rows],
        inputs.positions[:num_rows],
        inputs.slot_mapping[:num_rows],
        inputs.seq_lens[:num_rows],
        inputs.block_tables[:num_rows],
    )
