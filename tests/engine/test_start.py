"""What an engine settles before it loads a model."""

from pathlib import Path

import pytest
import torch
from octavo_engine.capacity import Limits, plan_capacity
from octavo_engine.config import EngineConfig
from octavo_engine.device import Device
from octavo_engine.errors import CapacityError, ConfigError
from octavo_engine.geometry import read_geometry
from octavo_engine.start import _check_free_memory, kernel_cache_folder, start
from octavo_kernels.hardware import BY_NAME


@pytest.mark.parametrize(
    ("fields", "environment", "folder"),
    [
        ({"kernel_cache_dir": "/mnt/kernels"}, {"XDG_CACHE_HOME": "/xdg"}, "/mnt/kernels"),
        ({}, {"XDG_CACHE_HOME": "/xdg"}, "/xdg/octavo/kernels"),
        ({}, {}, "~/.cache/octavo/kernels"),
    ],
    ids=["configured", "XDG", "home"],
)
def test_compiled_kernels_are_kept_where_the_user_says(fields, environment, folder: str) -> None:
    assert kernel_cache_folder(EngineConfig(model="m", **fields), environment) == Path(folder)


def test_a_kernel_cache_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(
        "octavo_engine.start.open_device", lambda config, seat: Device(torch.device("cuda"), BY_NAME["h100"], 1)
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    config = EngineConfig(model="/nowhere", kernel_cache_dir=str(tmp_path / "file" / "kernels"))
    with pytest.raises(ConfigError, match=r"cannot be kept in .*kernels \(Not a directory\): set kernel_cache_dir"):
        start(config, lambda phase: None)


def test_memory_that_something_else_holds_is_told(tiny_llama_dir, monkeypatch: pytest.MonkeyPatch) -> None:
    h100, gib = BY_NAME["h100"], 1 << 30
    capacity = plan_capacity(
        read_geometry(tiny_llama_dir()), h100, 80 * gib, dtype="bfloat16", kv_cache_dtype="bfloat16",
        limits=Limits(num_kv_blocks=5_000_000),
    )  # fmt: skip
    needed = capacity.total_bytes - capacity.runtime_bytes
    device = Device(torch.device("cuda"), h100, 80 * gib)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (needed, 80 * gib))
    _check_free_memory(device, capacity)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (needed - 1, 80 * gib))
    with pytest.raises(CapacityError, match=r"needs \d+\.\d GiB of GPU memory, and \d+\.\d of 80\.0 GiB are free: end"):
        _check_free_memory(device, capacity)
