"""What each row of logits asks of sampling, as the kernels read it."""

from dataclasses import dataclass
from typing import Final

import torch


@dataclass(frozen=True, slots=True, eq=False)
class SamplingTensors:
    """What each row asks for, on the device of the logits; each [num_rows], contiguous.

    temperatures: float32; 0 is greedy
    top_k:        int32; 0 is off. 1 is greedy
    top_p, min_p: float32; 1 and 0 are off
    seeds:        int64, all 64 bits used
    indices:      int32, which of the request's sequences
    positions:    int32, of the token to draw
    """

    temperatures: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seeds: torch.Tensor
    indices: torch.Tensor
    positions: torch.Tensor


_DTYPES: Final = {
    "temperatures": torch.float32,
    "top_k": torch.int32,
    "top_p": torch.float32,
    "min_p": torch.float32,
    "seeds": torch.int64,
    "indices": torch.int32,
    "positions": torch.int32,
}


def check_sampling(logits: torch.Tensor, sampling: SamplingTensors) -> None:
    """Raises ValueError unless there is one contiguous value of the right type for each row of the logits."""
    for name, dtype in _DTYPES.items():
        tensor = getattr(sampling, name)
        if tensor.shape != logits.shape[:1] or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(
                f"{name}: {tensor.dtype} {tuple(tensor.shape)}; expected contiguous {dtype} [{logits.shape[0]}]"
            )


def example_inputs(num_rows: int, vocab_size: int, *, device: str = "cpu") -> tuple[torch.Tensor, SamplingTensors]:
    """Logits, and rows that are greedy, unfiltered, and filtered in each way, by turns."""
    turns = torch.arange(num_rows, device=device) % 6
    sampling = SamplingTensors(
        temperatures=torch.where(turns == 0, 0.0, 0.8),
        top_k=torch.where((turns == 2) | (turns == 5), 20, 0).int(),
        top_p=torch.where((turns == 3) | (turns == 5), 0.95, 1.0),
        min_p=torch.where(turns == 4, 0.05, 0.0),
        seeds=torch.randint(-(2**63), 2**63 - 1, (num_rows,), device=device),
        indices=torch.zeros(num_rows, dtype=torch.int32, device=device),
        positions=torch.randint(1, 4096, (num_rows,), dtype=torch.int32, device=device),
    )
    return torch.randn(num_rows, vocab_size, device=device) * 3, sampling
