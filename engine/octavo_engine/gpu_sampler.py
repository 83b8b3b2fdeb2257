"""From logits to tokens on a GPU, without waiting for it: what is penalised and drawn stays there.

The same steps as `sampler.py`'s in the same order, by the kernels of `octavo_kernels.ops`; draws come from random
numbers of their own.
"""

from collections.abc import Sequence

import numpy as np
import torch
from octavo_kernels.ops.argmax import argmax_rows
from octavo_kernels.ops.penalties import add_logit_bias_, forbid_tokens_
from octavo_kernels.ops.sample_tokens import sample_rows
from octavo_kernels.ops.sampling_tensors import SamplingTensors

from octavo_engine.request import Request
from octavo_engine.sampler import forbidden_tokens, has_filters
from octavo_engine.seen_tokens import SeenTokens
from octavo_engine.staging import Array, upload_together


class GpuSampler:
    """Samples for the sequences of one step, each in its slot. `eos_token_ids` as for `Sampler`."""

    def __init__(self, eos_token_ids: Sequence[int], num_slots: int, device: torch.device) -> None:
        self._eos_token_ids = tuple(eos_token_ids)
        self._device = device
        self._seen_tokens = SeenTokens(num_slots, device)

    def sample(self, logits: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
        """One token for each sequence: [len(requests)] int64 on the device.

        logits: [len(requests), vocab_size] float32; rows that ask for constraints are changed in place
        """
        self._add_bias(logits, requests)
        self._forbid(logits, requests)
        self._seen_tokens.penalise(logits, requests)
        token_ids = self._draw(logits, requests)
        self._seen_tokens.count(requests, token_ids)
        return token_ids

    def _add_bias(self, logits: torch.Tensor, requests: Sequence[Request]) -> None:
        biases = {row: request.params.logit_bias for row, request in enumerate(requests) if request.params.logit_bias}
        if biases:
            arrays: dict[str, Array] = {
                "rows": np.array([row for row, bias in biases.items() for _ in bias], np.int32),
                "token_ids": np.array([token_id for bias in biases.values() for token_id in bias], np.int32),
                "values": np.array([value for bias in biases.values() for value in bias.values()], np.float32),
            }
            add_logit_bias_(logits, *upload_together(arrays, self._device).values())

    def _forbid(self, logits: torch.Tensor, requests: Sequence[Request]) -> None:
        forbidden = {row: forbidden_tokens(request, self._eos_token_ids) for row, request in enumerate(requests)}
        if any(forbidden.values()):
            arrays: dict[str, Array] = {
                "rows": np.array([row for row, token_ids in forbidden.items() for _ in token_ids], np.int32),
                "token_ids": np.array([token_id for each in forbidden.values() for token_id in each], np.int32),
            }
            forbid_tokens_(logits, *upload_together(arrays, self._device).values())

    def _draw(self, logits: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
        params = [request.params for request in requests]
        if all(each.temperature == 0 for each in params):
            return argmax_rows(logits)

        seeds = np.array([request.seed % 2**64 for request in requests], np.uint64)
        arrays: dict[str, Array] = {
            "temperatures": np.array([each.temperature for each in params], np.float32),
            "top_k": np.array([each.top_k for each in params], np.int32),
            "top_p": np.array([each.top_p for each in params], np.float32),
            "min_p": np.array([each.min_p for each in params], np.float32),
            "seeds": seeds.view(np.int64),
            "indices": np.array([request.index for request in requests], np.int32),
            "positions": np.array([request.num_tokens for request in requests], np.int32),
        }
        sampling = SamplingTensors(**upload_together(arrays, self._device))
        return sample_rows(logits, sampling, any_filters=any(has_filters(each) for each in params))
