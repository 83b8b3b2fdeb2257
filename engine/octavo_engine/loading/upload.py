"""Weights on their way to a device: several tensors at once, so that reading files and copying to a GPU overlap.

A thread reads a piece of a tensor into memory that the GPU's copy engine can reach, and reads the next one while that
is copied. One thread alone would leave most of the bus idle, however fast the files are.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from threading import local
from types import TracebackType
from typing import Self

import torch

NUM_THREADS = 8
PIECE_BYTES = 32 << 20

# (share of the bytes that are there, what has come last)
ProgressCallback = Callable[[float, str], None]


@dataclass(frozen=True, slots=True)
class _Item:
    name: str
    num_bytes: int


class Uploader:
    """Fills tensors of a device from threads of its own; on a CPU from one, one after the other.

    As a context it begins nothing more after an error: the process, which ends with it, would wait for all weights.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = ThreadPoolExecutor(NUM_THREADS if device.type == "cuda" else 1, "upload")
        self._thread = local()
        self._tasks: dict[Future[None], _Item] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self._end()

    def submit(self, fill: "Callable[[Uploader], None]", name: str, num_bytes: int) -> None:
        """Have a thread call `fill`, which reads something and `copy`s it."""
        # What the caller's stream has begun, such as zeros for a tensor, comes first.
        begun = torch.cuda.current_stream(self._device).record_event() if self._device.type == "cuda" else None
        self._tasks[self._pool.submit(self._run, fill, begun)] = _Item(name, num_bytes)

    @property
    def progress(self) -> float:
        """The share of the bytes that are there."""
        num_done = sum(item.num_bytes for task, item in self._tasks.items() if task.done())
        return num_done / (sum(item.num_bytes for item in self._tasks.values()) or 1) if self._tasks else 1.0

    def wait(self, on_progress: ProgressCallback) -> None:
        """Return when everything is there, each told of once. Raises what one of the fillings raised."""
        try:
            for task in as_completed(self._tasks):
                task.result()
                on_progress(self.progress, self._tasks[task].name)
        finally:
            self._end()

    def _end(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _run(self, fill: "Callable[[Uploader], None]", begun: torch.cuda.Event | None) -> None:
        if begun is None:
            fill(self)
            return
        if not hasattr(self._thread, "stream"):
            self._thread.stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            self._thread.pieces = [_Piece(), _Piece()]
        with torch.inference_mode(), torch.cuda.stream(self._thread.stream):
            self._thread.stream.wait_event(begun)
            fill(self)
            self._thread.stream.synchronize()

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the CPU on the device, as it is."""
        if self._device.type != "cuda":
            return tensor
        uploaded = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
        self.copy(uploaded, tensor)
        return uploaded

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """As destination.copy_(source), from the CPU to the device. destination: contiguous

        Another type of the source's is converted on the host: the device needs no memory beside the destination.
        """
        if self._device.type != "cuda":
            destination.copy_(source)
            return
        flat, values = destination.view(-1), source.reshape(-1)
        num_elements = PIECE_BYTES // flat.itemsize
        for start in range(0, len(values), num_elements):
            piece = self._thread.pieces[0]
            self._thread.pieces.reverse()
            part = values[start : start + num_elements]
            piece.copy(flat[start : start + len(part)], part)


class _Piece:
    """Memory of the host that the copy engine reads."""

    def __init__(self) -> None:
        self._memory = torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True)
        self._read = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        self._read.synchronize()  # the copy before this one
        staged = self._memory[: destination.nbytes].view(destination.dtype)
        staged.copy_(source)
        destination.copy_(staged, non_blocking=True)
        self._read.record()
