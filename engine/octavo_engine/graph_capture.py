"""CUDA graphs: a computation recorded once, launched as a whole ever after.

Graphs of one pool never run at the same time, so they share all memory, that of their outputs, too: dozens of graphs
would otherwise each keep logits for a whole vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Outputs = tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Captured:
    """replay: computes again from what the inputs hold now, without waiting.

    outputs: overwritten by it, and by any other graph of the pool
    """

    replay: Callable[[], None]
    outputs: Outputs


def graph_pool(device: torch.device) -> Any:
    """Memory that graphs share which never run at the same time."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None


def capture(compute: Callable[[], Outputs], device: torch.device, pool: Any) -> Captured:
    """Record a computation. Where there are no graphs, in Triton's interpreter, a replay is a plain call."""
    outputs = compute()  # compiles what is not compiled yet
    if device.type != "cuda":
        return Captured(lambda: _copy(compute(), outputs), outputs)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    # Other threads may use the device meanwhile: NCCL's asks how far earlier exchanges are.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        outputs = compute()
    return Captured(graph.replay, tuple(_borrow(output) for output in outputs))


class _Memory:
    """Memory of a device as other libraries describe theirs to torch, which then does not own it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        pointer = tensor.data_ptr(), False
        self.__cuda_array_interface__ = {"shape": (tensor.nbytes,), "typestr": "|u1", "data": pointer, "version": 3}


def _borrow(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory, left to the pool for the graphs that are captured next."""
    assert tensor.is_contiguous()
    return torch.as_tensor(_Memory(tensor), device=tensor.device).view(tensor.dtype).view(tensor.shape)


def _copy(sources: Outputs, destinations: Outputs) -> None:
    for source, destination in zip(sources, destinations, strict=True):
        destination.copy_(source)
