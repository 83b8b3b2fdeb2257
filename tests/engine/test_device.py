"""The device that the engine opens runs the kernels that it was told to, or the engine does not start."""

from types import SimpleNamespace

import pytest
import torch
from octavo_engine.config import EngineConfig, load_config
from octavo_engine.device import open_device
from octavo_engine.errors import ConfigError
from octavo_kernels.launch import use_variant, variant_of


@pytest.fixture
def h100(monkeypatch):
    """torch as it is beside an H100, as far as opening the device goes."""
    properties = SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0, total_memory=81_559 << 20)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 5)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    yield
    use_variant("")


@pytest.mark.parametrize(("asked", "runs"), [(None, "hopper"), ("grace-hopper", "grace-hopper"), ("ampere", "ampere")])
def test_runs_the_kernels_that_were_asked_for(h100, asked, runs):
    device = open_device(EngineConfig(model="m", device="cuda", kernel_variant=asked))
    assert device.hardware.name == "h100"
    assert variant_of(device.torch_device) == runs


def test_a_mig_slice_has_its_share_of_the_gpu(h100, monkeypatch):
    properties = SimpleNamespace(name="NVIDIA H100 80GB HBM3 MIG 1g.10gb", major=9, minor=0, total_memory=9_984 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    device = open_device(EngineConfig(model="m", device="cuda"))
    assert (device.hardware.name, device.hardware.memory_bandwidth_gbps) == ("h100", 3_350 / 8)
    assert device.memory_bytes == 9_984 << 20


def test_a_gpu_that_is_too_old_for_them_is_an_error(h100):
    with pytest.raises(ConfigError, match=r"for compute capability 10\.0 and above; this GPU has 9\.0"):
        open_device(EngineConfig(model="m", device="cuda", kernel_variant="blackwell"))


def test_a_cpu_runs_none_of_them():
    with pytest.raises(ConfigError, match="it is for GPUs, and this is a CPU"):
        open_device(EngineConfig(model="m", device="cpu", kernel_variant="hopper"))


def test_an_unknown_set_of_kernels_is_named_with_the_known_ones():
    with pytest.raises(ConfigError, match="volta is no set of kernels: there are ada, ampere, blackwell"):
        load_config({"model": "m", "kernel_variant": "volta"}, {})
