"""What compute-sanitizer is on a GPU: Triton's interpreter reads and writes the tensors of a launch, and nothing else.

The interpreter hands a kernel's addresses to the processor as they are. One outside every tensor is a value of some
other object, most of the time, and the end of the process at others.
"""

from typing import Any

import numpy as np
import torch
import triton.runtime.interpreter as interpreter


def check_memory_of_launches() -> None:
    """Have a kernel that leaves the tensors of its launch end with an error that says where."""
    launches: list[_Memory] = []
    _note_launches(launches)
    _check_accesses(launches)


class _Memory:
    """The addresses that one launch may touch: those of the tensors it was given."""

    def __init__(self, arguments: list[Any]) -> None:
        spans = sorted({(tensor.data_ptr(), _end(tensor)) for tensor in _tensors(arguments) if tensor.numel()})
        merged: list[list[int]] = []
        for start, end in spans:
            if merged and start <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], end)
            else:
                merged.append([start, end])
        self._starts = np.array([start for start, _ in merged], np.uint64)
        self._ends = np.array([end for _, end in merged], np.uint64)

    def check(self, addresses: Any, mask: Any, access: str) -> None:
        pointers = addresses.data
        if mask is not None:
            pointers = np.broadcast_to(pointers, mask.data.shape)[np.asarray(mask.data, bool)]
        if not pointers.size:
            return
        num_bytes = addresses.get_element_ty().primitive_bitwidth // 8
        lowest, highest = pointers.min(), pointers.max()
        span = int(np.searchsorted(self._starts, lowest, side="right")) - 1
        if span >= 0 and highest + np.uint64(num_bytes) <= self._ends[span]:
            return
        spans = np.searchsorted(self._starts, pointers, side="right").astype(np.int64) - 1
        is_outside = (spans < 0) | (pointers + np.uint64(num_bytes) > self._ends[np.maximum(spans, 0)])
        if is_outside.any():
            number, first = int(is_outside.sum()), int(pointers[is_outside].flat[0])
            distance = min((int(edge) - first for edge in (*self._starts, *self._ends)), key=abs)
            raise MemoryError(
                f"{number} of {pointers.size} addresses of a {access} of {num_bytes} bytes lie outside every tensor of"
                f" the launch, the first one {-distance} bytes from the nearest tensor's edge"
            )


def _end(tensor: torch.Tensor) -> int:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr() + (last + 1) * tensor.element_size()


def _tensors(arguments: list[Any]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for argument in arguments:
        argument = getattr(argument, "base", argument)
        if isinstance(argument, torch.Tensor):
            found.append(argument)
        elif isinstance(argument, tuple):
            found += _tensors(list(argument))
    return found


def _note_launches(launches: list[_Memory]) -> None:
    to_host, launch = interpreter.GridExecutor._init_args_hst, interpreter.GridExecutor.__call__

    def note(self: Any, arguments: Any, keywords: Any) -> Any:
        on_host = to_host(self, arguments, keywords)
        launches.append(_Memory([*on_host[0], *on_host[1].values()]))
        return on_host

    def forget(self: Any, *arguments: Any, **keywords: Any) -> None:
        running = len(launches)
        try:
            launch(self, *arguments, **keywords)
        finally:
            del launches[running:]

    interpreter.GridExecutor._init_args_hst, interpreter.GridExecutor.__call__ = note, forget


def _check_accesses(launches: list[_Memory]) -> None:
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    swap, modify = builder.create_atomic_cas, builder.create_atomic_rmw

    def checked_load(self: Any, ptrs: Any, mask: Any, *rest: Any, **keywords: Any) -> Any:
        launches[-1].check(ptrs, mask, "load")
        return load(self, ptrs, mask, *rest, **keywords)

    def checked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any, **keywords: Any) -> Any:
        launches[-1].check(ptrs, mask, "store")
        return store(self, ptrs, value, mask, *rest, **keywords)

    def checked_swap(self: Any, ptr: Any, *rest: Any, **keywords: Any) -> Any:
        launches[-1].check(ptr, None, "atomic swap")
        return swap(self, ptr, *rest, **keywords)

    def checked_modify(self: Any, operation: Any, ptr: Any, value: Any, mask: Any, *rest: Any, **keywords: Any) -> Any:
        launches[-1].check(ptr, mask, "atomic operation")
        return modify(self, operation, ptr, value, mask, *rest, **keywords)

    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store
    builder.create_atomic_cas, builder.create_atomic_rmw = checked_swap, checked_modify
