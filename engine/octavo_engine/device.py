"""The device that the engine runs on, its row in the hardware table, and the memory that it may use."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from octavo_kernels.hardware import CPU, Hardware, Match, identify_gpu

from octavo_engine.capacity import GIB
from octavo_engine.config import EngineConfig
from octavo_engine.errors import ConfigError
from octavo_engine.geometry import Geometry

logger = logging.getLogger(__name__)

CGROUP_MEMORY_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
CGROUP_CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")


@dataclass(frozen=True, slots=True)
class Device:
    """Where the engine runs. `memory_bytes`: what the engine may count on, before `memory_utilization`."""

    torch_device: torch.device
    hardware: Hardware
    memory_bytes: int


def open_device(config: EngineConfig) -> Device:
    """The device that the configuration names, or the best there is.

    Raises ConfigError if a GPU is asked for and there is none.
    """
    has_gpu = torch.cuda.is_available()
    if config.device == "cuda" and not has_gpu:
        raise ConfigError("device cuda was asked for, but torch sees no NVIDIA GPU here; use device cpu or auto")
    if config.device == "cuda" or (config.device == "auto" and has_gpu):
        return _open_gpu(config)
    torch.set_num_threads(config.num_threads or _available_cpus())
    memory = int(config.memory_gib * GIB) if config.memory_gib else _available_memory()
    return Device(torch.device("cpu"), CPU, memory)


def resolve_dtype(config: EngineConfig, geometry: Geometry, device: Device) -> torch.dtype:
    """The weights' data type: what was asked for; else float32 on a CPU, and the checkpoint's on a GPU."""
    name: str
    if config.dtype != "auto":
        name = config.dtype
    elif device.hardware.is_gpu:
        name = geometry.dtype if geometry.dtype in ("bfloat16", "float16") else "bfloat16"
    else:
        name = "float32"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _open_gpu(config: EngineConfig) -> Device:
    torch_device = torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(torch_device)
    match = identify_gpu(properties.name, (properties.major, properties.minor), properties.total_memory >> 20)
    _log_match(match)
    memory = int(config.memory_gib * GIB) if config.memory_gib else properties.total_memory
    return Device(torch_device, match.hardware, memory)


def _log_match(match: Match) -> None:
    level = logging.WARNING if match.how == "generic" else logging.INFO
    logger.log(level, "hardware=%s chosen by %s: %s", match.hardware.name, match.how, match.detail)


def _available_memory() -> int:
    """The container's limit if there is one, else the machine's memory. In bytes."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    texts = (path.read_text().strip() for path in CGROUP_MEMORY_LIMITS if path.exists())
    return min([machine, *(int(text) for text in texts if text.isdigit())])


def _available_cpus() -> int:
    """CPUs that this process may use: what torch found (OMP_NUM_THREADS, affinity), cut to the container's quota."""
    num_cpus = torch.get_num_threads()
    if CGROUP_CPU_LIMIT.exists():
        quota, _, period = CGROUP_CPU_LIMIT.read_text().partition(" ")
        if quota.isdigit():
            num_cpus = min(num_cpus, max(1, int(quota) // int(period)))
    return num_cpus
