"""What each running sequence has seen, kept on a GPU beside the slot tables, so that penalties need no token's value.

A row is written when its sequence first samples in that slot. From then on the device counts what it samples, also
what the host has yet to learn.
"""

from collections.abc import Sequence
from typing import Final

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
from octavo_engine.staging import Array, upload, upload_together

# In the place of a sequence's slot, where it asks for no penalty.
NO_SLOT: Final = -1


class SeenTokens:
    """The tables of `octavo_kernels.ops.penalties`, for those sequences whose requests ask for penalties.

    They take 4 bytes for each slot and token of the vocabulary, which the capacity plan counts, from the first such
    request on, which warming up makes.
    """

    def __init__(self, num_slots: int, device: torch.device) -> None:
        self._num_slots, self._device = num_slots, device
        self._tables: TokenTables | None = None
        # Slot -> whose tokens its row counts, and how many of the generated ones.
        self._counted: dict[int, tuple[Request, int]] = {}
        self._slots: torch.Tensor | None = None  # of the step's sequences, while it is sampled

    def penalise(self, logits: torch.Tensor, requests: Sequence[Request]) -> None:
        """Apply each sequence's penalties to its row, in place.

        logits: [len(requests), vocab_size] float32
        """
        self._slots = None
        if not any(request.params.has_penalties for request in requests):
            return
        tables = self._tables = self._tables or allocate_tables(self._num_slots, logits.shape[1], self._device)
        for request in requests:
            if request.params.has_penalties and self._counted.get(request.slot) != (request, request.num_output_tokens):
                self._write_row(tables, request)
        params = [request.params for request in requests]
        slots = [request.slot if request.params.has_penalties else NO_SLOT for request in requests]
        arrays: dict[str, Array] = {
            "slots": np.array(slots, np.int32),
            "repetition": np.array([each.repetition_penalty for each in params], np.float32),
            "presence": np.array([each.presence_penalty for each in params], np.float32),
            "frequency": np.array([each.frequency_penalty for each in params], np.float32),
        }
        uploaded = upload_together(arrays, self._device)
        self._slots = uploaded["slots"]
        apply_penalties_(logits, tables, *uploaded.values())

    def count(self, requests: Sequence[Request], token_ids: torch.Tensor) -> None:
        """Add what these sequences have just sampled, after `penalise`.

        token_ids: [len(requests)] int64 on the device
        """
        if self._tables is None or self._slots is None:
            return
        add_output_tokens(self._tables, self._slots, token_ids)
        for request in requests:
            if request.params.has_penalties:
                self._counted[request.slot] = (request, request.num_output_tokens + 1)

    def _write_row(self, tables: TokenTables, request: Request) -> None:
        """A sequence that comes to a slot: new, forked, or back after a preemption."""
        assert not request.num_promised, "a sequence in its slot is counted as it samples"
        self._counted = {slot: counted for slot, counted in self._counted.items() if counted[0].slot == slot}
        reset_slot(tables, request.slot)
        prompt = request.token_ids[: request.num_prompt_tokens]
        add_prompt_tokens(tables, request.slot, upload(np.array(prompt, np.int64), self._device))
        generated = upload(np.array(request.output_token_ids, np.int64), self._device)
        slots = torch.full(generated.shape, request.slot, dtype=torch.int32, device=self._device)
        add_output_tokens(tables, slots, generated)
