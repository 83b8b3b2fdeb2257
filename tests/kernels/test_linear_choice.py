"""Which kernel a linear layer gets where its weight or its GPU was not measured."""

from dataclasses import astuple

import pytest
import torch
from octavo_kernels import linear_choice
from octavo_kernels.hardware import BY_NAME, HARDWARE
from octavo_kernels.launch import VARIANTS, next_power_of_2
from octavo_kernels.linear_choice import Choice, Launch, LinearShape, by_num_tokens, launches_for, shipped_choices
from octavo_kernels.ops import cublaslt_linear, gemv, small_m_linear, wgmma_linear
from octavo_kernels.ops.gemv import reference
from octavo_kernels.ops.linear import GpuLinear, compile_examples, linear_silu_and_mul

GEMV = gemv.Launch(8, 512, 4)
DOT = small_m_linear.Launch(64, 64, 2, 4, 3)
WGMMA = wgmma_linear.Launch(128, 2)
CUBLASLT = cublaslt_linear.Launch("00", workspace_bytes=0, version=1)
H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"


def measured(out_features: int, in_features: int, *launches: Launch | None, is_gated: bool = False) -> list[Choice]:
    """For one token, two and so on."""
    shape = LinearShape(out_features, in_features, is_gated)
    return [Choice(shape, i, launch, 1.0, 2.0) for i, launch in enumerate(launches, 1)]


def test_a_measured_weight_has_what_was_measured() -> None:
    choices = by_num_tokens(measured(4096, 4096, GEMV, CUBLASLT, None) + measured(4096, 4104, DOT))
    assert launches_for(choices, LinearShape(4096, 4096)) == (None, GEMV, CUBLASLT, None)


def test_another_weight_has_own_kernels_of_the_nearest() -> None:
    near, far = measured(4096, 4096, GEMV, CUBLASLT, DOT, None, WGMMA), measured(7000, 4096, DOT)
    choices = by_num_tokens(far + near)
    assert launches_for(choices, LinearShape(4608, 3584)) == (None, GEMV, None, DOT, None, WGMMA)
    assert launches_for(choices, LinearShape(14000, 8192)) == (None, DOT)


@pytest.mark.parametrize("shape", [(4096, 2047), (2047, 4096), (8193, 4096), (4096, 8193)])
def test_a_weight_far_from_all_runs_on_cublas(shape: tuple[int, int]) -> None:
    assert launches_for(by_num_tokens(measured(4096, 4096, GEMV)), LinearShape(*shape)) == ()
    assert launches_for({}, LinearShape(*shape)) == ()


def test_a_gate_follows_gates_only() -> None:
    choices = by_num_tokens(measured(4096, 4096, GEMV) + measured(4096, 2208, DOT, is_gated=True))
    assert launches_for(choices, LinearShape(4096, 4096, is_gated=True)) == (None, DOT)
    assert launches_for(choices, LinearShape(4096, 2208)) == (None, GEMV)


@pytest.mark.parametrize(
    ("out_features", "in_features", "is_gated", "fit"),
    [
        (4000, 4096, False, {GEMV, DOT, WGMMA}),
        (4001, 4096, False, {GEMV, DOT}),
        (4008, 4096, True, {GEMV, DOT}),
        (4000, 4088, False, {WGMMA}),
        (4000, 4090, False, set()),
    ],
)
def test_a_kernel_gets_no_rows_that_it_cannot_load_fast(
    out_features: int, in_features: int, is_gated: bool, fit: set[Launch]
) -> None:
    choices = by_num_tokens(measured(4096, 4096, GEMV, DOT, WGMMA, is_gated=is_gated))
    launches = launches_for(choices, LinearShape(out_features, in_features, is_gated))
    assert launches == (None, *(launch if launch in fit else None for launch in (GEMV, DOT, WGMMA)))


@pytest.mark.parametrize("num_tokens", [1, 2, 3])
def test_a_layer_that_was_not_measured_equals_reference(num_tokens: int, device: torch.device) -> None:
    hidden = torch.randn(num_tokens, 208, device=device)
    weight, bias = torch.randn(90, 208, device=device), torch.randn(90, device=device)
    choices = measured(128, 256, GEMV, DOT) + measured(128, 256, DOT, GEMV, is_gated=True)
    layer = GpuLinear(weight, bias, by_num_tokens(choices))
    torch.testing.assert_close(layer(hidden), reference(hidden, weight, bias), atol=2e-3, rtol=2e-3)
    gated = reference(hidden, weight, bias, is_gated=True)
    torch.testing.assert_close(linear_silu_and_mul(layer, hidden), gated, atol=2e-2, rtol=2e-3)


@pytest.mark.parametrize(
    ("product", "like"),
    [
        (H100, H100),
        (H200, H200),
        ("NVIDIA H100 NVL", H100),
        ("NVIDIA GH200 480GB", H100),
        ("NVIDIA GH200 144G HBM3e", H200),
    ],
)
def test_a_product_follows_the_nearest_measured_one_of_its_chip(product: str, like: str) -> None:
    own, others = shipped_choices(product), shipped_choices(like)
    assert own.keys() == others.keys()
    for shape, launches in own.items():
        for launch, other in zip(launches, others[shape], strict=True):
            if product == like:
                assert launch == other
            else:
                assert launch == (None if isinstance(other, cublaslt_linear.Launch) else other)


@pytest.mark.parametrize("product", ["NVIDIA H100 PCIe", "NVIDIA A100-SXM4-80GB", "NVIDIA B200", "Voodoo 2"])
def test_another_chip_runs_on_cublas(product: str) -> None:
    assert shipped_choices(product) == {}


@pytest.mark.parametrize(
    "product", [f"{H100} MIG 1g.10gb", "NVIDIA-H200-MIG-3g.71gb", "NVIDIA GH200 480GB MIG 1g.12gb"]
)
def test_a_slice_of_a_gpu_runs_on_cublas(product: str) -> None:
    assert shipped_choices(product) == {}


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_a_gpu_may_launch_for_few_tokens_is_compiled(variant: str) -> None:
    examples = compile_examples(variant)
    assert len({each.name for each in examples}) == len(examples)
    assert {(each.constexprs["IS_EVEN_K"], each.constexprs["HAS_BIAS"]) for each in examples} == {(1, 0), (0, 1)}
    compiled = {
        (
            each.constexprs["BLOCK_N"], each.constexprs["BLOCK_K"], each.constexprs.get("NUM_SPLITS"), each.num_warps,
            each.num_stages, each.constexprs.get("NUM_TOKENS") or each.constexprs["BLOCK_M"],
            each.constexprs["IS_GATED"],
        )
        for each in examples
    }  # fmt: skip
    products = [name for row in HARDWARE if row.kernel_variant == variant for name in row.products]
    for shape, launches in (item for name in products for item in shipped_choices(name).items()):
        for num_tokens, launch in enumerate(launches):
            if isinstance(launch, gemv.Launch):
                launched = (launch.block_n, launch.block_k, None, launch.num_warps, 1, num_tokens, shape.is_gated)
                assert launched in compiled
            elif isinstance(launch, small_m_linear.Launch):
                block_m = max(16, next_power_of_2(num_tokens))
                assert (*astuple(launch), block_m, shape.is_gated) in compiled


def test_shipped_choices_are_for_gpus_of_the_hardware_table() -> None:
    paths = list(linear_choice.DIRECTORY.glob("*.json"))
    assert paths
    for path in paths:
        assert path.stem in BY_NAME
        assert by_num_tokens(linear_choice.read_choices(path))
