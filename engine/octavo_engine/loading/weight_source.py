"""What a file of weights looks like to the loader: named tensors that are read when they are wanted."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """name: the checkpoint's, in Hugging Face's spelling; num_bytes: in the file; read: fetches it to the CPU."""

    name: str
    num_bytes: int
    read: Callable[[], torch.Tensor]


class WeightSource(Protocol):
    """A checkpoint's tensors, in the order of the file."""

    @property
    def num_bytes(self) -> int:
        """Of all tensors, in the file."""

    def __iter__(self) -> Iterator[StoredTensor]:
        """Each tensor once."""
