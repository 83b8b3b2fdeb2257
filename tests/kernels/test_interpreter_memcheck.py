"""The tests' own check of memory: what a kernel reads or writes outside its tensors ends its launch with an error."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="compute-sanitizer's on a GPU")


@triton.jit
def copy_kernel(target_ptr, source_ptr, num_read, num_written, BLOCK: tl.constexpr):  # noqa: N803 (Triton's convention)
    offsets = tl.arange(0, BLOCK)  # [BLOCK]
    values = tl.load(source_ptr + offsets, mask=offsets < num_read)
    tl.store(target_ptr + offsets, values, mask=offsets < num_written)


@triton.jit
def count_kernel(counter_ptr, offset):
    tl.atomic_add(counter_ptr + offset, 1)


def test_what_lies_within_the_tensors_passes() -> None:
    source, target = torch.arange(24.0)[2:22:2], torch.zeros(10)
    copy_kernel[(1,)](target, source, 19, 10, BLOCK=32)
    assert target.tolist() == list(range(2, 12))


@pytest.mark.parametrize(
    ("num_read", "num_written", "message"),
    [
        (11, 10, r"1 of 11 addresses of a load of 4 bytes lie outside .*, the first one 0 bytes from"),
        (10, 13, r"3 of 13 addresses of a store of 4 bytes lie outside"),
    ],
)
def test_what_lies_outside_is_an_error(num_read: int, num_written: int, message: str) -> None:
    memory = torch.zeros(64)
    with pytest.raises(InterpreterError, match=message):
        copy_kernel[(1,)](memory[40:50], memory[20:30], num_read, num_written, BLOCK=16)


def test_an_atomic_operation_outside_is_an_error() -> None:
    memory = torch.zeros(8, dtype=torch.int32)
    count_kernel[(1,)](memory[:4], 3)
    assert memory[3] == 1
    with pytest.raises(InterpreterError, match="atomic operation"):
        count_kernel[(1,)](memory[:4], 4)
