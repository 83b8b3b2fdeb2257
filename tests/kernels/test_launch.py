"""Every op has launch parameters and examples for every variant of the hardware table."""

import importlib
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType, SimpleNamespace

import pytest
import torch
from octavo_kernels import launch
from octavo_kernels.launch import FLOAT8_VARIANTS, VARIANTS, use_variant, variant_of
from octavo_kernels.pdl import pdl_options

OPS = ("gelu", "layer_norm", "rms_norm", "rotary", "rotate_and_write_kv", "silu_and_mul")


@pytest.fixture(params=OPS)
def op(request: pytest.FixtureRequest) -> ModuleType:
    return importlib.import_module(f"octavo_kernels.ops.{request.param}")


def test_variants_are_those_of_the_table_and_the_generic_one() -> None:
    assert set(VARIANTS) == {
        "hopper", "grace-hopper", "blackwell", "blackwell-workstation", "ampere", "ada", "generic"
    }  # fmt: skip


def test_only_old_and_unknown_gpus_lack_float8() -> None:
    assert set(VARIANTS) - FLOAT8_VARIANTS == {"ampere", "generic"}


def test_tensors_of_a_cpu_run_the_generic_variant() -> None:
    assert variant_of(torch.device("cpu")) == "generic"


@pytest.mark.parametrize(
    ("name", "capability", "variant"),
    [
        ("NVIDIA H100 80GB HBM3", (9, 0), "hopper"),
        ("NVIDIA GH200 480GB", (9, 0), "grace-hopper"),
        ("NVIDIA Something New", (12, 0), "blackwell-workstation"),
        ("NVIDIA Something Newer", (13, 0), "generic"),
    ],
)
def test_a_gpu_runs_the_variant_of_its_row(
    name: str, capability: tuple[int, int], variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties = SimpleNamespace(name=name, major=capability[0], minor=capability[1], total_memory=80 << 30)
    monkeypatch.setattr(launch.torch.cuda, "get_device_properties", lambda _: properties)
    variant_of.cache_clear()
    assert variant_of(torch.device("cuda", 7)) == variant
    variant_of.cache_clear()


def test_every_op_knows_every_variant(op: ModuleType) -> None:
    assert set(op.LAUNCH) == set(VARIANTS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_examples_name_every_argument_of_their_kernel(op: ModuleType, variant: str) -> None:
    examples = op.compile_examples(variant)
    assert len({example.name for example in examples}) == len(examples)
    for example in examples:
        assert sorted([*example.signature, *example.constexprs]) == sorted(example.function.arg_names)


def test_the_variant_that_was_asked_for_wins_over_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 7)
    properties = SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0, total_memory=81_559 << 20)
    monkeypatch.setattr(launch.torch.cuda, "get_device_properties", lambda _: properties)
    assert pdl_options(device)["launch_pdl"]
    use_variant("ampere")
    try:
        with ThreadPoolExecutor(1) as another_thread:
            variant_of.cache_clear()
            assert another_thread.submit(variant_of, device).result() == "ampere"
        assert variant_of(device) == "ampere"
        assert not pdl_options(device)["launch_pdl"]
        assert variant_of(torch.device("cpu")) == "generic"
    finally:
        use_variant("")
    assert variant_of(device) == "hopper"
    assert pdl_options(device)["launch_pdl"]
    variant_of.cache_clear()
