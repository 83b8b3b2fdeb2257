"""One node type, one spec, one geometry -> the engine that runs there, or why none does. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass

from octavo_engine.capacity import (
    Capacity,
    Limits,
    plan_capacity,
    resolve_kv_cache_dtype,
    resolve_weight_dtype,
    shard,
    weight_bytes,
)
from octavo_engine.config import EngineConfig
from octavo_engine.errors import CapacityError
from octavo_engine.geometry import Geometry
from octavo_kernels.hardware import HARDWARE, Hardware, min_capability

from octavo_operator.api import Engine, InferenceServiceSpec
from octavo_operator.decision import Requests
from octavo_operator.errors import NoLeaderWorkerSetsError
from octavo_operator.nodes import NodeType
from octavo_operator.parallelism import Split, asked_split, split_of, splits
from octavo_operator.quantities import GIB, MIB

MEMORY_UTILIZATION = 0.9
# Of a pod with several GPUs, for each: where their processes exchange what does not go over NVLink.
# https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/troubleshooting.html
SHARED_MEMORY_BYTES = GIB
# A node also runs what every node runs; an engine that asked for all of a node would never be placed.
CPU_NODE_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class Candidate:
    """A node type that the model fits, with its engine worked out."""

    node_type: NodeType
    config: EngineConfig
    capacity: Capacity | None
    requests: Requests

    @property
    def split(self) -> Split:
        """Over how many GPUs and nodes a replica is spread."""
        return split_of(self.config)

    @property
    def tokens_per_s(self) -> float:
        """Predicted decode rate of a replica; by bandwidth alone while the geometry is unknown."""
        if self.capacity is None:
            return self.node_type.hardware.memory_bandwidth_gbps * self.split.tensor
        return self.capacity.max_num_seqs / self.capacity.predicted_decode_ms * 1e3


def fit(
    spec: InferenceServiceSpec, node_type: NodeType, geometry: Geometry | None, *, has_leader_worker_sets: bool = True
) -> Candidate:
    """Work out the engine for one node type, on the fewest of its GPUs that hold the model.

    has_leader_worker_sets: whether the cluster has LeaderWorkerSets, which start an engine over several nodes
    Raises CapacityError if the model does not fit there, NoLeaderWorkerSetsError if it would over several nodes.
    """
    asked = asked_split(spec)
    tried = splits(asked, node_type, geometry.num_heads if geometry else 0)
    candidate = (
        _fit_unknown(spec, node_type, next(tried)) if geometry is None else _first(spec, node_type, geometry, tried)
    )
    if candidate.split.num_nodes > 1 and not has_leader_worker_sets:
        raise NoLeaderWorkerSetsError(str(candidate.split))
    return candidate


def _first(spec: InferenceServiceSpec, node_type: NodeType, geometry: Geometry, tried: Iterable[Split]) -> Candidate:
    """The first of the splits that holds the model; else the error of the very first."""
    problem: CapacityError | None = None
    dtype, _ = data_types(spec.engine or Engine(), node_type.hardware, geometry)
    weights = weight_bytes(geometry, node_type.hardware, dtype, limits_of(spec.engine or Engine()).quantization)
    for split in tried:
        if problem is not None and weights > split.num_gpus * node_type.memory_bytes:
            # Working out what cannot be, for each number of GPUs and nodes, is what takes a plan's time.
            continue
        try:
            return _fit_split(spec, node_type, geometry, split)
        except CapacityError as error:
            problem = problem or error
    assert problem is not None
    raise problem


def _fit_split(spec: InferenceServiceSpec, node_type: NodeType, geometry: Geometry, split: Split) -> Candidate:
    engine = spec.engine or Engine()
    dtype, kv_cache_dtype = data_types(engine, node_type.hardware, geometry)
    part = shard(geometry, tensor=split.tensor, pipeline=split.pipeline)
    memory = node_type.memory_bytes if node_type.is_gpu else int(node_type.memory_bytes * CPU_NODE_SHARE)
    planned = plan_capacity(
        part,
        node_type.hardware,
        memory,
        dtype=dtype,
        kv_cache_dtype=kv_cache_dtype,
        limits=limits_of(engine),
        memory_utilization=MEMORY_UTILIZATION,
    ).of_stages(split.pipeline)
    settings: dict[str, object] = {}
    if node_type.is_gpu:
        requests = _gpu_requests(node_type, planned.weight_bytes, split)
        if node_type.num_sharers > 1:
            # Every sharer sees the whole device's memory; each is told its part.
            settings = {"memory_gib": node_type.memory_bytes / GIB}
    else:
        memory_mib = -(-int(planned.total_bytes / MEMORY_UTILIZATION) // MIB) + 1
        requests = Requests(_cpu_request(node_type), memory_mib * MIB, 0)
        settings = {"memory_gib": memory_mib / 1024, "num_kv_blocks": planned.num_kv_blocks}
    config = _config(
        spec,
        node_type,
        split,
        dtype=dtype,
        kv_cache_dtype="fp8" if engine.kv_cache_dtype == "fp8" else kv_cache_dtype,
        max_model_len=planned.max_model_len,
        max_num_seqs=planned.max_num_seqs,
        max_num_batched_tokens=planned.max_num_batched_tokens,
        **settings,
    )
    return Candidate(node_type, config, planned, requests)


def _fit_unknown(spec: InferenceServiceSpec, node_type: NodeType, split: Split) -> Candidate:
    """Without a geometry: what the user fixed, a whole GPU or half a CPU node, and the engine finds its limits."""
    engine = spec.engine or Engine()
    settings: dict[str, object] = {
        "dtype": engine.dtype,
        "kv_cache_dtype": engine.kv_cache_dtype,
        "max_model_len": engine.max_model_len,
        "max_num_seqs": engine.max_num_seqs,
        "max_num_batched_tokens": engine.max_num_batched_tokens,
    }
    if node_type.is_gpu:
        requests = _gpu_requests(node_type, 0, split)
    else:
        memory_mib = node_type.memory_bytes // 2 // MIB
        requests = Requests(_cpu_request(node_type), memory_mib * MIB, 0)
        settings["memory_gib"] = max(memory_mib, 1) / 1024
    if node_type.num_sharers > 1:
        settings["memory_gib"] = node_type.memory_bytes / GIB
    return Candidate(node_type, _config(spec, node_type, split, **settings), None, requests)


def _config(spec: InferenceServiceSpec, node_type: NodeType, split: Split, **settings: object) -> EngineConfig:
    values = {
        "model": model_address(spec),
        "served_model_name": spec.model.served_name,
        "device": "cuda" if node_type.is_gpu else "cpu",
        "kernel_variant": _kernel_variant(spec.engine, node_type.hardware),
        "quantization": spec.engine.quantization if spec.engine else None,
        "memory_utilization": MEMORY_UTILIZATION,
        "tensor_parallel_size": split.tensor,
        "pipeline_parallel_size": split.pipeline,
        "num_nodes": split.num_nodes,
        **settings,
    }
    return EngineConfig.model_validate({name: value for name, value in values.items() if value is not None})


def _kernel_variant(engine: Engine | None, hardware: Hardware) -> str | None:
    """The set of kernels that the engine is told to run; CapacityError if the device is too old for what was asked."""
    asked = (engine.kernel_variant if engine else None) or hardware.kernel_variant
    needed, capability = min_capability(asked), hardware.compute_capability
    if needed is None or capability is None:
        return None
    if capability < needed:
        raise CapacityError(
            "engine.kernelVariant {} is made for compute capability {}.{} and above; {} has {}.{}".format(
                asked, *needed, hardware.title, *capability
            )
        )
    return asked


def limits_of(engine: Engine) -> Limits:
    """What the spec fixes of the capacity plan."""
    return Limits(
        max_model_len=engine.max_model_len,
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        quantization=engine.quantization or "none",
    )


def data_types(engine: Engine, hardware: Hardware, geometry: Geometry) -> tuple[str, str]:
    """Of weights, and of the KV cache. Raises CapacityError where the hardware lacks what was asked for."""
    dtype = resolve_weight_dtype(engine.dtype or "auto", geometry, hardware)
    return dtype, resolve_kv_cache_dtype(engine.kv_cache_dtype or "auto", dtype, hardware)


def _cpu_request(node_type: NodeType) -> int:
    """Half of a node's cores, so that a rollout has room; engines use what is idle beyond it."""
    return max(100, min(node_type.cpu_millicores // 2, 8000) // 100 * 100)


def _gpu_requests(node_type: NodeType, weights: int, split: Split) -> Requests:
    """A pod's GPUs and their share of the host: the weights pass through host memory on their way to a device.

    weights: bytes on one GPU
    """
    num_gpus, shares = split.gpus_per_node, max(1, node_type.devices_per_node)
    shared_memory = SHARED_MEMORY_BYTES if num_gpus > 1 else 0
    per_gpu = min(weights + 4 * GIB + shared_memory, int(node_type.host_memory_bytes * CPU_NODE_SHARE) // shares)
    cpu = min(4000, int(node_type.cpu_millicores * CPU_NODE_SHARE) // shares)
    return Requests(max(cpu // 100 * 100, 100) * num_gpus, max(per_gpu // MIB, 1) * MIB * num_gpus, num_gpus)


def smallest_fitting_hardware(spec: InferenceServiceSpec, geometry: Geometry) -> Hardware | None:
    """The GPU of the table with the least memory that holds the model as the spec asks for it."""
    engine = spec.engine or Engine()
    for row in sorted((row for row in HARDWARE if row.is_gpu), key=lambda row: row.memory_mib):
        try:
            dtype, kv_cache_dtype = data_types(engine, row, geometry)
            plan_capacity(
                geometry,
                row,
                row.memory_mib * MIB,
                dtype=dtype,
                kv_cache_dtype=kv_cache_dtype,
                limits=limits_of(engine),
                memory_utilization=MEMORY_UTILIZATION,
            )
        except CapacityError:
            continue
        return row
    return None


def model_address(spec: InferenceServiceSpec) -> str:
    """The model's address with its revision, as the engine takes it."""
    return f"{spec.model.uri}@{spec.model.revision}" if spec.model.revision else spec.model.uri
