"""What a file of weights looks like to the loader: named tensors that are read when they are wanted."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

# What is wanted of a tensor, a slice for each of its first dimensions; none: all of it.
Part = tuple[slice, ...]


class Read(Protocol):
    """Fetches a tensor, or a part of it, to the CPU."""

    def __call__(self, part: Part = ()) -> torch.Tensor:
        """Only the part is copied."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """name: the checkpoint's, in Hugging Face's spelling; num_bytes: in the file."""

    name: str
    num_bytes: int
    shape: tuple[int, ...]
    read: Read


class WeightSource(Protocol):
    """A checkpoint's tensors, in the order of the file."""

    @property
    def num_bytes(self) -> int:
        """Of all tensors, in the file."""

    def __iter__(self) -> Iterator[StoredTensor]:
        """Each tensor once."""
