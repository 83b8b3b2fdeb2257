"""Starting an engine: find the model, plan its memory, load it, allocate the KV cache, and say what came of it."""

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from octavo_kernels.kernel_cache import use_kernel_cache

from octavo_engine import __version__
from octavo_engine.capacity import GIB, Capacity, Limits, plan_capacity, resolve_kv_cache_dtype, shard
from octavo_engine.config import EngineConfig
from octavo_engine.device import Device, open_device, resolve_dtype
from octavo_engine.errors import CapacityError, ConfigError
from octavo_engine.geometry import Geometry, check_served, read_geometry
from octavo_engine.loading.loader import load_model
from octavo_engine.loading.tokenizer import read_eos_token_ids
from octavo_engine.loading.upload import ProgressCallback, Uploader
from octavo_engine.model_source import resolve_model
from octavo_engine.models import Model
from octavo_engine.parallel import Ranks
from octavo_engine.protocol import EnginePhase, EngineReady, Seat
from octavo_engine.scheduler import SchedulerLimits

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Started:
    """What an engine stands on.

    kv_cache: [num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim]: all of one block lies together, so that
              one copy forks, moves or swaps it
    geometry: of what is on this device: the model, or this rank's share of it
    ranks:    those that share it; None: there is one
    under_way: what brings the weights
    """

    model: Model
    kv_cache: torch.Tensor
    device: Device
    geometry: Geometry
    capacity: Capacity
    eos_token_ids: frozenset[int]
    enable_prefix_caching: bool
    enable_cuda_graphs: bool
    actual_weight_bytes: int
    kernels: dict[str, str]
    under_way: Uploader
    ranks: Ranks | None = None

    def finish_loading(self, on_progress: ProgressCallback) -> None:
        """Wait until all weights are there, on all ranks. Raises ModelSourceError or UnsupportedModelError."""
        self.under_way.wait(on_progress)
        if self.ranks:
            self.ranks.tell_all("loaded", "")  # some disks are slower than others, by more than a step may take

    @property
    def scheduler_limits(self) -> SchedulerLimits:
        """The capacity plan, as the scheduler needs it."""
        return SchedulerLimits(
            num_blocks=self.capacity.num_kv_blocks,
            block_size=self.capacity.block_size,
            max_num_seqs=self.capacity.max_num_seqs,
            max_num_batched_tokens=self.capacity.max_num_batched_tokens,
            max_model_len=self.capacity.max_model_len,
            enable_prefix_caching=self.enable_prefix_caching,
        )

    def ready(self) -> EngineReady:
        """The engine's word to the front end."""
        return EngineReady(
            max_model_len=self.capacity.max_model_len,
            max_num_seqs=self.capacity.max_num_seqs,
            max_num_batched_tokens=self.capacity.max_num_batched_tokens,
            num_kv_blocks=self.capacity.num_kv_blocks,
            block_size=self.capacity.block_size,
            memory=self._memory(),
            hardware=self.device.hardware.name,
            kernels=self.kernels,
        )

    def _memory(self) -> dict[str, dict[str, int]]:
        """Predicted and actual bytes by use; on a GPU also of everything, other processes on it included."""
        memory = {
            "weights": {"predicted": self.capacity.weight_bytes, "actual": self.actual_weight_bytes},
            "kv_cache": {"predicted": self.capacity.kv_bytes, "actual": self.kv_cache.nbytes},
        }
        if self.device.torch_device.type == "cuda":
            num_free, num_all = torch.cuda.mem_get_info(self.device.torch_device)
            memory["total"] = {"predicted": self.capacity.total_bytes, "actual": num_all - num_free}
        return memory


def start(config: EngineConfig, on_phase: Callable[[EnginePhase], None], seat: Seat | None = None) -> Started:
    """Bring up everything but the loop. Weights may still be `under_way`.

    seat: this rank's, of an engine with several
    Raises ConfigError, ModelSourceError, UnsupportedModelError or CapacityError, each with what to do about it.
    """
    on_phase(EnginePhase("starting"))
    if config.num_ranks > 1 and seat is None:
        raise ConfigError(f"{config.num_ranks} GPUs need a process each: only `octavo serve` runs them")
    device = open_device(config, seat)
    if device.torch_device.type == "cuda":
        _open_kernel_cache(config, device)
    files = resolve_model(
        config.model, on_progress=lambda fraction, text: on_phase(EnginePhase("downloading", fraction, text))
    )
    geometry = read_geometry(files.path)
    check_served(geometry)
    part = _shard(geometry, config)
    ranks = Ranks.join(seat, config.tensor_parallel_size, device.torch_device) if seat else None
    if ranks:
        device = _agree(device, ranks)
    dtype = resolve_dtype(config, geometry, device)
    kv_cache_dtype = resolve_kv_cache_dtype(config.kv_cache_dtype, _name(dtype), device.hardware)
    capacity = plan_capacity(
        part,
        device.hardware,
        device.memory_bytes,
        dtype=_name(dtype),
        kv_cache_dtype=kv_cache_dtype,
        limits=limits_of(config),
        memory_utilization=config.memory_utilization,
    )
    if seat is None or seat.rank == 0:
        _log_plan(config, device, dtype, capacity)
    _check_free_memory(device, capacity)
    on_phase(EnginePhase("loading"))
    loaded = load_model(
        files,
        geometry,
        dtype=dtype,
        device=device.torch_device,
        quantization=config.quantization,
        max_model_len=capacity.max_model_len,
        load_format=config.load_format,
        ranks=ranks,
        on_progress=lambda fraction, text: on_phase(EnginePhase("loading", fraction, text)),
        may_return_early=True,
    )
    with loaded.under_way:
        if ranks:
            ranks.tell_all("allocated", "")  # graphs are captured by all of them together
        if ranks and ranks.pipeline:  # the plan is that of the fullest stage
            num_layers = len(ranks.pipeline.layers(geometry.num_layers))
            part = replace(part, num_layers=num_layers, num_full_layers=min(part.num_full_layers, num_layers))
        return Started(
            model=loaded.model,
            kv_cache=allocate_kv_cache(part, capacity, getattr(torch, kv_cache_dtype), device.torch_device),
            device=device,
            geometry=part,
            capacity=capacity,
            eos_token_ids=frozenset(read_eos_token_ids(files)),
            enable_prefix_caching=config.enable_prefix_caching,
            enable_cuda_graphs=config.enable_cuda_graphs,
            actual_weight_bytes=loaded.weight_bytes,
            kernels=loaded.kernels,
            under_way=loaded.under_way,
            ranks=ranks,
        )


def _shard(geometry: Geometry, config: EngineConfig) -> Geometry:
    """What one rank holds of the model. Raises ConfigError that names what does not divide."""
    tensor, pipeline = config.tensor_parallel_size, config.pipeline_parallel_size
    if config.num_ranks == 1:
        return geometry
    try:
        return shard(geometry, tensor=tensor, pipeline=pipeline)
    except CapacityError as error:
        sizes = f"tensor_parallel_size={tensor} and pipeline_parallel_size={pipeline}"
        raise ConfigError(f"the model does not take {sizes}: {error}") from None


def _agree(device: Device, ranks: Ranks) -> Device:
    """The device with the least memory that any rank has, so that all plan the same.

    Raises ConfigError where the ranks have different hardware.
    """
    everyone = [text.split("/") for text in ranks.tell_all("device", f"{device.hardware.name}/{device.memory_bytes}")]
    names = [name for name, _ in everyone]
    if len(set(names)) > 1:
        raise ConfigError(f"the ranks of an engine need the same hardware; these have {', '.join(names)}")
    return replace(device, memory_bytes=min(int(memory) for _, memory in everyone))


def _check_free_memory(device: Device, capacity: Capacity) -> None:
    """Raise CapacityError where the plan is for memory that something else holds, or that the GPU does not have."""
    if device.torch_device.type != "cuda":
        return
    free_bytes, all_bytes = torch.cuda.mem_get_info(device.torch_device)
    needed_bytes = capacity.total_bytes - capacity.runtime_bytes  # of which the process has taken its part by now
    if needed_bytes > free_bytes:
        raise CapacityError(
            f"the plan needs {needed_bytes / GIB:.1f} GiB of GPU memory, and {free_bytes / GIB:.1f} of "
            f"{all_bytes / GIB:.1f} GiB are free: end what else runs there (a predecessor may still be ending), or "
            "lower memory_gib or memory_utilization"
        )


def limits_of(config: EngineConfig) -> Limits:
    """What the configuration fixes of the capacity plan."""
    return Limits(
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        num_kv_blocks=config.num_kv_blocks,
        block_size=config.block_size,
        quantization=config.quantization,
        enable_cuda_graphs=config.enable_cuda_graphs,
    )


def allocate_kv_cache(geometry: Geometry, capacity: Capacity, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The KV cache. Zeros, since on a CPU the operating system then hands out the pages only when they are written."""
    shape = (
        capacity.num_kv_blocks,
        geometry.num_layers,
        2,
        capacity.block_size,
        geometry.num_kv_heads,
        geometry.head_dim,
    )
    return torch.zeros(shape, dtype=dtype, device=device)


def kernel_cache_folder(config: EngineConfig, environment: Mapping[str, str]) -> Path:
    """Where compiled kernels are kept, by the configuration or the user's cache folder (XDG base directories)."""
    if config.kernel_cache_dir:
        return Path(config.kernel_cache_dir)
    return Path(environment.get("XDG_CACHE_HOME") or "~/.cache") / "octavo" / "kernels"


def _open_kernel_cache(config: EngineConfig, device: Device) -> None:
    folder = kernel_cache_folder(config, os.environ)
    try:
        use_kernel_cache(folder, __version__, torch.cuda.get_device_capability(device.torch_device))
    except OSError as error:
        raise ConfigError(
            f"compiled kernels cannot be kept in {folder} ({error.strerror}): set kernel_cache_dir to a folder that "
            "can be written"
        ) from None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _log_plan(config: EngineConfig, device: Device, dtype: torch.dtype, capacity: Capacity) -> None:
    logger.info(
        "model=%s hardware=%s x%d dtype=%s quantization=%s on each: weights=%.2fGiB kv_cache=%.2fGiB blocks=%d "
        "block_size=%d max_model_len=%d max_num_seqs=%d max_num_batched_tokens=%d",
        config.model_name,
        device.hardware.name,
        config.num_ranks,
        _name(dtype),
        config.quantization,
        capacity.weight_bytes / GIB,
        capacity.kv_bytes / GIB,
        capacity.num_kv_blocks,
        capacity.block_size,
        capacity.max_model_len,
        capacity.max_num_seqs,
        capacity.max_num_batched_tokens,
    )
