"""Where an op's tests run.

A test of an op as the CPU runs it goes twice: with the C kernels and on torch alone. A test of a Triton kernel asks for
`device`, or its module has an `implementation` of its own, and it goes once: on the GPU, or without one in Triton's
interpreter.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from octavo_kernels import native

# Modules that run no op as a CPU does: nothing in them goes through twice.
OTHER_MODULES = frozenset(
    {"test_compile", "test_cublaslt_linear", "test_hardware", "test_interpreter_memcheck", "test_launch", "test_native",
     "test_prompt_attention", "test_slices", "test_targets", "test_wgmma_linear"}
)  # fmt: skip


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    is_other = metafunc.module.__name__.rpartition(".")[2] in OTHER_MODULES
    if not is_other and "device" not in metafunc.fixturenames and not hasattr(metafunc.module, "implementation"):
        metafunc.parametrize("implementation", ["c", "torch"], indirect=True)


@pytest.fixture(autouse=True)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = getattr(request, "param", "c")
    if name == "torch":
        monkeypatch.setattr(native, "cpu_kernels", lambda: None)
    elif hasattr(request, "param") and native.cpu_kernels() is None:
        pytest.skip("there is no C compiler")
    return name


@pytest.fixture
def device() -> Iterator[torch.device]:
    """What Triton's kernels run on here, with NaN in the memory of every new tensor, so that a gap shows."""
    has_gpu = torch.cuda.is_available()
    if not has_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton's kernels need a GPU or TRITON_INTERPRET=1")
    torch.use_deterministic_algorithms(True)
    yield torch.device("cuda", torch.cuda.current_device()) if has_gpu else torch.device("cpu")
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def entered_devices(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """The devices that `torch.cuda.device` has made current, without a GPU."""
    entered: list[torch.device] = []

    @contextmanager
    def enter(device: torch.device) -> Iterator[None]:
        entered.append(device)
        yield
        entered.pop()

    monkeypatch.setattr(torch.cuda, "device", enter)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    return entered
