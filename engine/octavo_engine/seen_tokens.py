"""What each running sequence has seen, kept on a GPU beside the slot tables, so that penalties need no token's value.

A row is written when its sequence first samples in that slot. From then on the device counts what it samples, also
what the host has yet to learn.
"""

from collections.abc import Sequence

import numpy as np
import torch
from octavo_kernels.ops.penalties import (
    TokenTables,
    add_output_tokens,
    add_prompt_tokens,
    allocate_tables,
    apply_penalties_,
    reset_slot,
)

from octavo_engine.request import Request
from octavo_engine.staging import upload


class SeenTokens:
    """The tables of `octavo_kernels.ops.penalties`, for those sequences whose requests ask for penalties.

    They take 4 bytes for each slot and token of the vocabulary, from the first such request on, which warming up makes.
    The capacity plan holds three matrices of that size for sampling.
    """

    def __init__(self, num_slots: int, device: torch.device) -> None:
        self._num_slots, self._device = num_slots, device
        self._tables: TokenTables | None = None
        # Slot -> whose tokens its row counts, and how many of the generated ones.
        self._counted: dict[int, tuple[Request, int]] = {}

    def penalise(self, logits: torch.Tensor, requests: Sequence[Request]) -> None:
        """Apply each sequence's penalties to its row, in place.

        logits: [len(requests), vocab_size] float32
        """
        if not any(request.params.has_penalties for request in requests):
            return
        tables = self._tables = self._tables or allocate_tables(self._num_slots, logits.shape[1], self._device)
        for request in requests:
            if request.params.has_penalties and self._counted.get(request.slot) != (request, request.num_output_tokens):
                self._write_row(tables, request)
        params = [request.params for request in requests]
        apply_penalties_(
            logits,
            tables,
            self._slots(requests),
            self._upload([each.repetition_penalty for each in params], np.float32),
            self._upload([each.presence_penalty for each in params], np.float32),
            self._upload([each.frequency_penalty for each in params], np.float32),
        )

    def count(self, requests: Sequence[Request], token_ids: torch.Tensor) -> None:
        """Add what these sequences have just sampled. token_ids: [len(requests)] int64 on the device."""
        if self._tables is None or not any(request.params.has_penalties for request in requests):
            return
        add_output_tokens(self._tables, self._slots(requests), token_ids)
        for request in requests:
            if request.params.has_penalties:
                self._counted[request.slot] = (request, request.num_output_tokens + 1)

    def _slots(self, requests: Sequence[Request]) -> torch.Tensor:
        """Rows of the tables, [len(requests)] int32; -1 for a sequence that has none."""
        return self._upload([request.slot if request.params.has_penalties else -1 for request in requests], np.int32)

    def _upload(self, values: Sequence[float], dtype: type[np.generic]) -> torch.Tensor:
        """Memory of its own for each argument of a kernel: Triton compiles another one for a pointer within."""
        return upload(np.array(values, dtype), self._device)

    def _write_row(self, tables: TokenTables, request: Request) -> None:
        """A sequence that comes to a slot: new, forked, or back after a preemption."""
        assert not request.num_promised, "a sequence in its slot is counted as it samples"
        reset_slot(tables, request.slot)
        prompt = request.token_ids[: request.num_prompt_tokens]
        add_prompt_tokens(tables, request.slot, self._upload(prompt, np.int64))
        generated = self._upload(request.output_token_ids, np.int64)
        slots = torch.full(generated.shape, request.slot, dtype=torch.int32, device=self._device)
        add_output_tokens(tables, slots, generated)
