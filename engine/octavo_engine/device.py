"""The device that the engine runs on, its row in the hardware table, and the memory that it may use."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from octavo_kernels.hardware import CPU, ComputeCapability, Hardware, Match, identify_gpu, min_capability
from octavo_kernels.launch import use_variant
from octavo_kernels.slices import mig_slice, parse_mig_profile, profile_of

from octavo_engine.capacity import GIB, check_kv_cache_dtype, resolve_weight_dtype
from octavo_engine.config import EngineConfig
from octavo_engine.errors import ConfigError
from octavo_engine.geometry import Geometry
from octavo_engine.protocol import Seat

logger = logging.getLogger(__name__)

CGROUP_MEMORY_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
CGROUP_CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")


@dataclass(frozen=True, slots=True)
class Device:
    """Where the engine runs. `memory_bytes`: what the engine may count on, before `memory_utilization`."""

    torch_device: torch.device
    hardware: Hardware
    memory_bytes: int


def open_device(config: EngineConfig, seat: Seat | None = None) -> Device:
    """The device that the configuration names, or the best there is.

    seat: this rank's, of an engine with several: each has a GPU of its own, or its share of the CPU
    Raises ConfigError if there are too few GPUs or cores; CapacityError if a GPU lacks the cache's type.
    """
    device = _find_device(config, seat)
    check_kv_cache_dtype(config.kv_cache_dtype, device.hardware)
    return device


def _find_device(config: EngineConfig, seat: Seat | None) -> Device:
    has_gpu = torch.cuda.is_available()
    if config.device == "cuda" and not has_gpu:
        raise ConfigError("device cuda was asked for, but torch sees no NVIDIA GPU here; use device cpu or auto")
    if config.device == "cuda" or (config.device == "auto" and has_gpu):
        return _open_gpu(config, seat)
    if config.kernel_variant:
        raise ConfigError(
            f"kernel_variant {config.kernel_variant} was asked for, but it is for GPUs, and this is a CPU"
        )
    num_ranks, num_cpus = seat.num_local_ranks if seat else 1, _available_cpus()
    if num_ranks > num_cpus:
        raise ConfigError(f"{num_ranks} ranks on this node need a core each, and there are {num_cpus}")
    # What torch found, which OMP_NUM_THREADS may have lowered.
    torch.set_num_threads(config.num_threads or min(torch.get_num_threads(), num_cpus // num_ranks))
    memory = int(config.memory_gib * GIB) if config.memory_gib else _available_memory()
    return Device(torch.device("cpu"), CPU, memory // num_ranks)


def resolve_dtype(config: EngineConfig, geometry: Geometry, device: Device) -> torch.dtype:
    """The weights' data type: what was asked for; else float32 on a CPU, and the checkpoint's on a GPU."""
    name = resolve_weight_dtype(config.dtype, geometry, device.hardware)
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _open_gpu(config: EngineConfig, seat: Seat | None) -> Device:
    # What steps of one shape free, those of another can take: otherwise the allocator keeps pieces of every size.
    torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    if seat and seat.num_local_ranks > torch.cuda.device_count():
        raise ConfigError(
            f"{seat.num_local_ranks} ranks on this node need a GPU each, and torch sees {torch.cuda.device_count()}"
        )
    if seat:
        torch.cuda.set_device(seat.local_rank)
    torch_device = torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(torch_device)
    match = identify_gpu(properties.name, (properties.major, properties.minor), properties.total_memory >> 20)
    _log_match(match)
    _choose_kernels(config.kernel_variant, (properties.major, properties.minor))
    memory = int(config.memory_gib * GIB) if config.memory_gib else properties.total_memory
    hardware = _slice_of(match.hardware, properties.name, properties.total_memory >> 20)
    return Device(torch_device, hardware, memory)


def _slice_of(row: Hardware, name: str, memory_mib: int) -> Hardware:
    """The row of the MIG slice that the driver's name tells of; the GPU's own row where it tells of none."""
    profile = parse_mig_profile(profile_of(name))
    if profile is None:
        return row
    try:
        return mig_slice(row, profile, memory_mib)
    except ValueError as error:
        logger.warning("predictions are those of a whole GPU: %s", error)
        return row


def _choose_kernels(variant: str | None, capability: ComputeCapability) -> None:
    """Have the kernels run in the variant that was asked for. Raises ConfigError if the GPU is too old for it."""
    needed = min_capability(variant) if variant else None
    if needed is not None and capability < needed:
        raise ConfigError(
            "kernel_variant {} is made for compute capability {}.{} and above; this GPU has {}.{}".format(
                variant, *needed, *capability
            )
        )
    use_variant(variant or "")


def _log_match(match: Match) -> None:
    level = logging.WARNING if match.how == "generic" else logging.INFO
    logger.log(level, "hardware=%s chosen by %s: %s", match.hardware.name, match.how, match.detail)


def _available_memory() -> int:
    """The container's limit if there is one, else the machine's memory. In bytes."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    texts = (path.read_text().strip() for path in CGROUP_MEMORY_LIMITS if path.exists())
    return min([machine, *(int(text) for text in texts if text.isdigit())])


def _available_cpus() -> int:
    """CPUs that this process may use, at least 1: its affinity, cut to the container's quota."""
    num_cpus = len(os.sched_getaffinity(0))
    if CGROUP_CPU_LIMIT.exists():
        quota, _, period = CGROUP_CPU_LIMIT.read_text().partition(" ")
        if quota.isdigit():
            num_cpus = min(num_cpus, max(1, int(quota) // int(period)))
    return num_cpus
