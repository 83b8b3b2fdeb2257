"""cuBLASLt's algorithms on a GPU, each against float32; and a table that another version of the library made."""

import ctypes
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from octavo_kernels.linear_choice import Choice, LinearShape, read_choices, understood, write_choices
from octavo_kernels.ops import cublaslt_linear
from octavo_kernels.ops.cublaslt_linear import Launch
from octavo_kernels.ops.gemv import reference
from octavo_kernels.ops.linear import GpuLinear

LAUNCH = Launch(algorithm="00" * 64, workspace_bytes=0, version=cublaslt_linear.version())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_tokens", [1, 33, 256])
def test_every_proposal_equals_the_reference(num_tokens: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(num_tokens, 512, dtype=dtype, device="cuda")
    weight = torch.randn(768, 512, dtype=dtype, device="cuda") * 0.05
    expected = reference(hidden, weight, None)
    launches = cublaslt_linear.candidates(num_tokens, 768, 512, dtype)
    assert launches
    for launch in launches:
        output = cublaslt_linear.cublaslt_linear(hidden, weight, launch)
        assert output.dtype == dtype
        error = (output.float() - expected).norm() / expected.norm()
        assert error < 1e-2, launch


@pytest.mark.gpu
def test_serves_fewer_tokens_than_it_was_chosen_for_and_a_bias() -> None:
    torch.manual_seed(0)
    weight = torch.randn(768, 512, dtype=torch.bfloat16, device="cuda") * 0.05
    bias = torch.randn(768, dtype=torch.bfloat16, device="cuda")
    for launch in cublaslt_linear.candidates(256, 768, 512, torch.bfloat16):
        layer = GpuLinear(weight, bias, {LinearShape(768, 512): (launch,) * 257})
        for num_tokens in (129, 144, 200, 256):
            wide = torch.randn(num_tokens, 600, dtype=torch.bfloat16, device="cuda")
            hidden = wide[:, :512]
            expected = reference(hidden, weight, bias)
            error = (layer(hidden).float() - expected).norm() / expected.norm()
            assert error < 1e-2, launch


def test_multiplies_with_the_tensors_device_current(
    monkeypatch: pytest.MonkeyPatch, entered_devices: list[torch.device]
) -> None:
    called: list[tuple[str, torch.device]] = []
    problem = cublaslt_linear._Problem(*(ctypes.c_void_p() for _ in range(4)))
    monkeypatch.setattr(cublaslt_linear, "_problem", lambda *sizes: problem)
    monkeypatch.setattr(cublaslt_linear, "_handle", lambda device: ctypes.c_void_p())
    monkeypatch.setattr(cublaslt_linear, "_workspace", lambda device: torch.empty(0))
    monkeypatch.setattr(cublaslt_linear, "_call", lambda name, *_: called.append((name, *entered_devices)))
    hidden = torch.empty(4, 16, dtype=torch.bfloat16)
    cublaslt_linear.cublaslt_linear(hidden, hidden, LAUNCH)
    assert called == [("cublasLtMatmul", hidden.device)]


def test_a_table_keeps_algorithms(tmp_path: Path) -> None:
    choice = Choice(LinearShape(8, 16), 4, LAUNCH, 1.0, 2.0)
    write_choices(tmp_path / "gpu.json", [choice], [])
    assert read_choices(tmp_path / "gpu.json") == [choice]


def test_an_algorithm_of_another_version_is_not_used() -> None:
    choice = Choice(LinearShape(8, 16), 4, LAUNCH, 1.0, 2.0)
    assert understood(choice).launch == LAUNCH
    older = replace(choice, launch=replace(LAUNCH, version=LAUNCH.version - 1))
    assert understood(older).launch is None
