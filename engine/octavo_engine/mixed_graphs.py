"""Steps with prompts in them as CUDA graphs, as long as they are short: a few hundred kernels take a slow host longer
to launch than such a step takes to compute.

A graph is captured once for each of some numbers of tokens; a step takes the next larger one and pads. Which rows are
decodes, which belong to which chunk and where their blocks lie is read from device memory. A graph covers the model up
to its last hidden states: what is sampled from them differs too much from step to step.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from octavo_kernels.ops.attention_metadata import AttentionMetadata

from octavo_engine.batch import Batch
from octavo_engine.graph_capture import Captured, capture
from octavo_engine.models import Model

# Chunks of a step that has a graph. A step with more of them has most often more tokens, too.
MAX_CHUNKS: Final = 32
# Of the tokens that a device computes as long as a host launches their kernels: it falls short of the chip's rates.
_HIDDEN_PART: Final = 0.75
_ABSENT: Final = -1  # the length of a decode that is not there, the slot of a row that is not stored


def mixed_graph_sizes(max_tokens: int) -> list[int]:
    """Numbers of tokens to capture: close enough that padding costs little, few enough that start-up is short."""
    steps = [
        16,
        32,
        *range(64, 512, 64),
        *range(512, 1024, 128),
        *range(1024, 2048, 256),
        *range(2048, max_tokens, 512),
    ]
    return [*(size for size in steps if size < max_tokens), max_tokens]


def hides_launches(num_tokens: int, launch_bound_tokens: int) -> bool:
    """Whether a device at work computes such a step about as long as a host launches the kernels of the next one."""
    return num_tokens > _HIDDEN_PART * launch_bound_tokens


@dataclass(frozen=True, slots=True, eq=False)
class _Inputs:
    """What a graph of `num_tokens` tokens reads; decodes in front, then chunks, as in `AttentionMetadata`.

    input_ids, positions, slot_mapping: [num_tokens]
    block_tables, seq_lens: [num_decodes + MAX_CHUNKS, ...]; query_start_loc: one more
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    block_tables: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    num_decodes: int

    def first(self, num_tokens: int) -> "_Inputs":
        """Those of a smaller graph, in the same memory."""
        num_decodes = min(num_tokens, self.num_decodes)
        unused = self.num_decodes - num_decodes
        return _Inputs(
            self.input_ids[:num_tokens],
            self.positions[:num_tokens],
            self.slot_mapping[:num_tokens],
            self.block_tables[unused:],
            self.seq_lens[unused:],
            self.query_start_loc[unused:],
            num_decodes,
        )

    def fill(self, batch: Batch) -> None:
        """Copy a batch of at most as many tokens, on the device."""
        metadata, num_tokens = batch.metadata, len(batch.input_ids)
        num_present, first_chunk = metadata.num_decodes, self.num_decodes
        end_chunk = first_chunk + len(metadata.seq_lens) - num_present
        self.input_ids[:num_tokens] = batch.input_ids
        self.positions[:num_tokens] = batch.positions
        self.slot_mapping[:num_tokens] = metadata.slot_mapping
        self.slot_mapping[num_tokens:] = _ABSENT
        self.block_tables[:num_present, : metadata.block_tables.shape[1]] = metadata.block_tables[:num_present]
        self.block_tables[first_chunk:end_chunk, : metadata.block_tables.shape[1]] = metadata.block_tables[num_present:]
        self.seq_lens[:num_present] = metadata.seq_lens[:num_present]
        self.seq_lens[num_present:first_chunk] = _ABSENT
        self.seq_lens[first_chunk:end_chunk] = metadata.seq_lens[num_present:]
        self.query_start_loc[first_chunk:end_chunk] = metadata.query_start_loc[num_present:-1]
        self.query_start_loc[end_chunk:] = num_tokens

    def metadata(self) -> AttentionMetadata:
        """For a step of unknown lengths."""
        return AttentionMetadata(
            self.block_tables,
            self.seq_lens,
            self.query_start_loc,
            self.slot_mapping,
            num_decodes=self.num_decodes,
            query_lens=(1,) * len(self.seq_lens),
            context_lens=(),
            max_chunk_tokens=len(self.input_ids),
        )


class MixedGraphs:
    """The captured forward passes of one model."""

    def __init__(
        self,
        model: Model,
        kv_cache: torch.Tensor,
        block_tables: torch.Tensor,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        launch_bound_tokens: int,
        pool: Any,
        on_progress: Callable[[float], None],
    ) -> None:
        """Capture every size, the largest first, since the smaller ones fit into its memory.

        block_tables: [..., max_blocks] int32, as those of the batches that will be run
        launch_bound_tokens: as in `Capacity`
        """
        self._model, self._kv_cache = model, kv_cache
        self._launch_bound_tokens = launch_bound_tokens
        self._sizes = mixed_graph_sizes(min(max_num_batched_tokens, launch_bound_tokens))
        self._inputs = _empty_inputs(self._sizes[-1], min(max_num_seqs, self._sizes[-1]), block_tables)
        self._graphs: dict[int, Captured] = {}
        for count, num_tokens in enumerate(reversed(self._sizes), 1):
            forward = partial(self._forward, self._inputs.first(num_tokens))
            self._graphs[num_tokens] = capture(forward, kv_cache.device, pool)
            on_progress(count / len(self._sizes))

    def suits(self, batch: Batch, *, is_device_idle: bool) -> bool:
        """Whether `run` takes this batch and is faster than to launch its kernels one by one.

        It pads and knows no lengths. A device at work hides the launches of a step that it computes about as long.
        """
        num_chunks = len(batch.metadata.seq_lens) - batch.metadata.num_decodes
        num_tokens = len(batch.input_ids)
        is_hidden = not is_device_idle and hides_launches(num_tokens, self._launch_bound_tokens)
        return not is_hidden and num_tokens <= self._sizes[-1] and num_chunks <= MAX_CHUNKS

    def run(self, batch: Batch) -> torch.Tensor:
        """Hidden states [num_tokens, hidden_size], valid until the next call."""
        num_tokens = len(batch.input_ids)
        size = self._sizes[bisect_left(self._sizes, num_tokens)]
        self._inputs.first(size).fill(batch)
        graph = self._graphs[size]
        graph.replay()
        return graph.outputs[0][:num_tokens]

    @torch.inference_mode()
    def _forward(self, inputs: _Inputs) -> tuple[torch.Tensor]:
        return (self._model.forward(inputs.input_ids, inputs.positions, self._kv_cache, inputs.metadata()),)


def _empty_inputs(num_tokens: int, num_decodes: int, block_tables: torch.Tensor) -> _Inputs:
    """Of a step without any request."""

    def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=block_tables.device)

    num_seqs = num_decodes + MAX_CHUNKS
    return _Inputs(
        zeros(num_tokens),
        zeros(num_tokens),
        zeros(num_tokens).fill_(_ABSENT),
        zeros(num_seqs, block_tables.shape[1], dtype=block_tables.dtype),
        zeros(num_seqs, dtype=torch.int32).fill_(_ABSENT),
        zeros(num_seqs + 1),
        num_decodes,
    )
