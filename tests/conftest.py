"""What all tests share: a real Kubernetes, started only if a test asks for it; Triton's interpreter without a GPU."""

import os
from pathlib import Path

# Before anything imports a kernel: Triton reads it when a kernel is defined.
if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from interpreter_memcheck import check_memory_of_launches
from quick_interpreter import quicken_interpreter

check_memory_of_launches()
quicken_interpreter()


pytest_plugins = ["plugin"]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """The marker `gpu` says all that a test has to say of it."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs an NVIDIA GPU")
