"""Where a test runs: on the CPU, and on a GPU where there is one."""

from collections.abc import Callable

import pytest
import torch

GPU_MARKS = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU")]
DEVICES = [pytest.param("cpu", id="cpu"), pytest.param("cuda", id="cuda", marks=GPU_MARKS)]


def on_gpu(test: Callable[..., None]) -> Callable[..., None]:
    for mark in GPU_MARKS:
        test = mark(test)
    return test
