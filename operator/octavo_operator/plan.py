"""The decision: a spec, the cluster's node types and the model's geometry -> which engines run where. Pure.

All defaults live here. The same function serves the operator and `octavo plan`.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from octavo_engine.capacity import Capacity, Limits, activation_dtype, plan_capacity
from octavo_engine.config import EngineConfig
from octavo_engine.errors import CapacityError
from octavo_engine.geometry import DTYPE_BYTES, Geometry
from octavo_kernels.hardware import HARDWARE, Hardware

from octavo_operator.api import Engine, InferenceServiceSpec
from octavo_operator.nodes import NodeType, NodeTypes, find_node_types
from octavo_operator.observe import ModelGeometry, ObservedNode, Running
from octavo_operator.quantities import GIB, MIB, format_gib

MEMORY_UTILIZATION = 0.9
# A node also runs what every node runs; an engine that asked for all of a node would never be placed.
CPU_NODE_SHARE = 0.9

# Seconds to get the weights, by where they come from: a hub at 50 MB/s, a local disk at 200 MB/s.
_BYTES_PER_SECOND = {"hub": 50e6, "local": 200e6}
_STARTUP_BASE_S = 180
_STARTUP_UNKNOWN_S = 3600

ProblemReason = Literal[
    "NoNodes", "NoFittingHardware", "HardwareAway", "ModelDoesNotFit", "ModelNotSupported", "InvalidEngineSettings"
]


@dataclass(frozen=True, slots=True)
class Defaults:
    """What the operator was started with, where a spec leaves it open."""

    engine_image: str


@dataclass(frozen=True, slots=True)
class Requests:
    """What one engine pod asks of its node."""

    cpu_millicores: int
    memory_bytes: int
    num_gpus: int


@dataclass(frozen=True, slots=True)
class Variant:
    """The engines of one node type: one Deployment.

    capacity:  None while the geometry is unknown; the engine then decides its limits itself
    startup_s: seconds that loading may take
    is_surge:  whether a new pod starts before an old one stops
    """

    node_type: NodeType
    replicas: int
    image: str
    config: EngineConfig
    capacity: Capacity | None
    requests: Requests
    startup_s: int
    deadline_s: int
    is_surge: bool
    why: str

    @property
    def reserve_bytes(self) -> int:
        """What the engine may take but does not plan to."""
        if self.capacity is None:
            return 0
        total = int((self.config.memory_gib or 0) * GIB) or self.node_type.memory_bytes
        return max(0, total - self.capacity.total_bytes)


@dataclass(frozen=True, slots=True)
class Rejected:
    """A node type, or nodes, that are not used."""

    node_type: str
    why: str


@dataclass(frozen=True, slots=True)
class Problem:
    """Why there is nothing to run, in a sentence that says what would do."""

    reason: ProblemReason
    message: str


@dataclass(frozen=True)
class Plan:
    """What should run. No variants and a problem, or variants and none."""

    variants: tuple[Variant, ...]
    rejected: tuple[Rejected, ...]
    problem: Problem | None
    model: ModelGeometry

    @cached_property
    def hash(self) -> str:
        """Changes with what the engines are told and where they run, not with replicas or explanations."""
        parts = [
            [variant.node_type.name, variant.image, variant.config.to_yaml(), variant.requests.memory_bytes]
            for variant in self.variants
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]

    @property
    def num_replicas(self) -> int:
        """Replicas over all variants."""
        return sum(variant.replicas for variant in self.variants)

    @property
    def hardware(self) -> str:
        """The variants in one line: `h100 x2, cpu x1`."""
        return ", ".join(f"{variant.node_type.name} x{variant.replicas}" for variant in self.variants)


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A node type that the model fits, with its engine worked out."""

    node_type: NodeType
    config: EngineConfig
    capacity: Capacity | None
    requests: Requests

    @property
    def tokens_per_s(self) -> float:
        """Predicted decode rate of a replica; by bandwidth alone while the geometry is unknown."""
        if self.capacity is None:
            return self.node_type.hardware.memory_bandwidth_gbps
        return self.capacity.max_num_seqs / self.capacity.predicted_decode_ms * 1e3


def make_plan(
    spec: InferenceServiceSpec,
    nodes: Sequence[ObservedNode],
    model: ModelGeometry,
    defaults: Defaults,
    running: Running | None = None,
) -> Plan:
    """Choose node types, limits and replicas.

    A variant that serves is not moved because a faster node type appeared: that would restart it. One whose nodes are
    all away moves if another type fits, and else waits for them.
    """
    running = running or Running()
    found = find_node_types(nodes, spec.scheduling)
    rejected = [Rejected(each.title, each.why) for each in found.unusable]
    if model.is_unsupported:
        return Plan((), tuple(rejected), Problem("ModelNotSupported", model.problem), model)
    if not nodes:
        return Plan((), (), Problem("NoNodes", "the cluster has no nodes"), model)

    allowed, refused = _allowed_types(spec, found, running)
    rejected += refused
    candidates: list[_Candidate] = []
    misfits: list[Rejected] = []
    for node_type in allowed:
        try:
            candidates.append(_fit(spec, node_type, model.geometry))
        except CapacityError as error:
            misfits.append(Rejected(node_type.name, str(error)))
    rejected += misfits
    if not candidates:
        problem = _explain_nothing(spec, found, allowed, model.geometry)
        return Plan((), tuple(rejected), problem, model)

    ranked = sorted(candidates, key=lambda each: _rank(each, running))
    num_replicas = wanted_replicas(spec)
    chosen = _spread(spec, ranked, num_replicas)
    rejected += [
        Rejected(each.node_type.name, _why_not(each, ranked[0], spec)) for each in ranked if each not in chosen
    ]
    variants = tuple(
        _variant(spec, each, chosen[each], ranked, model, defaults, running) for each in ranked if each in chosen
    )
    return Plan(variants, tuple(rejected), None, model)


def wanted_replicas(spec: InferenceServiceSpec) -> int:
    """Replicas that should run; none while suspended."""
    if spec.suspend:
        return 0
    return 1 if spec.scaling is None or spec.scaling.replicas is None else spec.scaling.replicas


def model_address(spec: InferenceServiceSpec) -> str:
    """The model's address with its revision, as the engine takes it."""
    return f"{spec.model.uri}@{spec.model.revision}" if spec.model.revision else spec.model.uri


def _allowed_types(
    spec: InferenceServiceSpec, found: NodeTypes, running: Running
) -> tuple[list[NodeType], list[Rejected]]:
    """The node types that the spec lets in, and the others with the reason."""
    named = (spec.hardware.types if spec.hardware else None) or []
    excluded = (spec.hardware.exclude if spec.hardware else None) or []
    wanted: list[NodeType] = []
    rejected: list[Rejected] = []
    for node_type in found.types:
        if node_type.hardware_name in excluded:
            rejected.append(Rejected(node_type.name, "hardware.exclude names it"))
        elif named and node_type.hardware_name not in named:
            rejected.append(Rejected(node_type.name, f"hardware.types asks for {', '.join(named)}"))
        else:
            wanted.append(node_type)
    has_gpus = any(node_type.is_gpu for node_type in wanted)
    allowed: list[NodeType] = []
    for node_type in wanted:
        if has_gpus and not node_type.is_gpu and not named:
            rejected.append(
                Rejected(node_type.name, "there are GPU nodes; hardware.types: [cpu] would choose it all the same")
            )
        elif node_type.num_nodes == 0 and node_type.name not in running.node_types:
            rejected.append(Rejected(node_type.name, _away(node_type)))
        else:
            allowed.append(node_type)
    return allowed, rejected


def _away(node_type: NodeType) -> str:
    return f"none of its {node_type.num_away} nodes is ready and takes pods"


def _rank(candidate: _Candidate, running: Running) -> tuple[bool, bool, bool, float, str]:
    """Ready nodes first, then where it already serves, then GPUs, then the fastest; the name decides a tie."""
    node_type = candidate.node_type
    return (
        node_type.num_nodes == 0,
        node_type.name not in running.serving,
        not node_type.is_gpu,
        -candidate.tokens_per_s,
        node_type.name,
    )


def _spread(spec: InferenceServiceSpec, ranked: Sequence[_Candidate], num_replicas: int) -> dict[_Candidate, int]:
    """Replicas of each chosen candidate: all on the best, or evenly over all if several types are named.

    An even share stops at the devices that a type has, as long as another type has one left.
    """
    named = (spec.hardware.types if spec.hardware else None) or []
    if len(named) < 2 or num_replicas < 2:
        return {ranked[0]: num_replicas}
    shares = dict.fromkeys(ranked, 0)
    for _ in range(num_replicas):
        open_types = [each for each in ranked if shares[each] < each.node_type.num_devices] or list(ranked)
        emptiest = min(open_types, key=lambda each: shares[each])
        shares[emptiest] += 1
    return {each: share for each, share in shares.items() if share}


def _why_not(candidate: _Candidate, best: _Candidate, spec: InferenceServiceSpec) -> str:
    named = (spec.hardware.types if spec.hardware else None) or []
    if len(named) > 1:
        return "fits, but there are fewer replicas than node types"
    if candidate.node_type.num_nodes == 0:
        return _away(candidate.node_type)
    if candidate.tokens_per_s > best.tokens_per_s:
        ratio = candidate.tokens_per_s / best.tokens_per_s
        return (
            f"fits and is predicted to be {ratio:.1f}x as fast, but the model serves on {best.node_type.name} already, "
            f"and moving it would restart it: hardware.types: [{candidate.node_type.hardware_name}] moves it"
        )
    ratio = best.tokens_per_s / candidate.tokens_per_s
    return f"fits, but {best.node_type.name} is predicted to be {ratio:.1f}x as fast"


def _variant(
    spec: InferenceServiceSpec,
    candidate: _Candidate,
    replicas: int,
    ranked: Sequence[_Candidate],
    model: ModelGeometry,
    defaults: Defaults,
    running: Running,
) -> Variant:
    engine = spec.engine or Engine()
    startup_s = _startup_s(spec, model.geometry)
    deadline_s = spec.rollout.progress_deadline_seconds if spec.rollout else None
    return Variant(
        node_type=candidate.node_type,
        replicas=replicas,
        image=engine.image or defaults.engine_image,
        config=candidate.config,
        capacity=candidate.capacity,
        requests=candidate.requests,
        startup_s=startup_s,
        # Past the last moment at which the startup probe would still let the engine load.
        deadline_s=deadline_s or startup_s + 60,
        is_surge=_is_surge(spec, candidate, running),
        why=_why_chosen(spec, candidate, ranked, running),
    )


def _why_chosen(
    spec: InferenceServiceSpec, candidate: _Candidate, ranked: Sequence[_Candidate], running: Running
) -> str:
    node_type = candidate.node_type
    named = (spec.hardware.types if spec.hardware else None) or []
    recognised = f" ({node_type.recognised_by})" if not node_type.is_exact else ""
    if node_type.num_nodes == 0:
        return f"it runs here; {_away(node_type)}, and no other node type fits{recognised}"
    if len(named) > 1:
        return f"hardware.types names it: one of {len(ranked)} that fit{recognised}"
    if len(ranked) == 1:
        return f"the only node type that fits{recognised}"
    if node_type.name in running.serving:
        return f"it serves here already{recognised}"
    unit = "GB/s of memory bandwidth" if candidate.capacity is None else "tokens/s predicted"
    return f"the fastest of {len(ranked)} that fit: {candidate.tokens_per_s:,.0f} {unit}{recognised}"


def _is_surge(spec: InferenceServiceSpec, candidate: _Candidate, running: Running) -> bool:
    """Whether a rollout may start a pod beside the old ones: asked for, or a place for it is free."""
    strategy = (spec.rollout.strategy if spec.rollout else None) or "Auto"
    if strategy != "Auto":
        return strategy == "Surge"
    node_type, requests = candidate.node_type, candidate.requests
    if node_type.name in running.stuck:
        return False
    places = node_type.num_devices
    if not node_type.is_gpu:
        places *= min(
            node_type.memory_bytes // max(requests.memory_bytes, 1),
            node_type.cpu_millicores // max(requests.cpu_millicores, 1),
        )
    return places > running.num_in_use.get(node_type.name, 0)


def _startup_s(spec: InferenceServiceSpec, geometry: Geometry | None) -> int:
    """Seconds that an engine may take from its start until it is ready."""
    if geometry is None:
        return _STARTUP_UNKNOWN_S
    source = "hub" if spec.model.uri.startswith("hf://") else "local"
    num_bytes = geometry.num_parameters * DTYPE_BYTES.get(geometry.dtype, 2)
    return _STARTUP_BASE_S + int(num_bytes / _BYTES_PER_SECOND[source])


def _fit(spec: InferenceServiceSpec, node_type: NodeType, geometry: Geometry | None) -> _Candidate:
    """Work out the engine for one node type. Raises CapacityError if the model does not fit there."""
    engine = spec.engine or Engine()
    if geometry is None:
        return _fit_unknown(spec, engine, node_type)
    dtype = _dtype(engine, node_type.hardware, geometry)
    kv_cache_dtype = _explicit(engine.kv_cache_dtype) or activation_dtype(dtype, node_type.hardware)
    limits = _limits(engine)

    def capacity(memory_bytes: int, limits: Limits) -> Capacity:
        return plan_capacity(
            geometry,
            node_type.hardware,
            memory_bytes,
            dtype=dtype,
            kv_cache_dtype=kv_cache_dtype,
            limits=limits,
            memory_utilization=MEMORY_UTILIZATION,
        )

    if node_type.is_gpu:
        planned = capacity(node_type.memory_bytes, limits)
        requests = _gpu_requests(node_type, planned.weight_bytes)
        settings: dict[str, object] = {}
    else:
        planned = capacity(int(node_type.memory_bytes * CPU_NODE_SHARE), limits)
        memory_mib = -(-int(planned.total_bytes / MEMORY_UTILIZATION) // MIB) + 1
        requests = Requests(_cpu_request(node_type), memory_mib * MIB, 0)
        settings = {"memory_gib": memory_mib / 1024, "num_kv_blocks": planned.num_kv_blocks}
    config = _config(
        spec,
        node_type,
        dtype=dtype,
        kv_cache_dtype=kv_cache_dtype,
        max_model_len=planned.max_model_len,
        max_num_seqs=planned.max_num_seqs,
        max_num_batched_tokens=planned.max_num_batched_tokens,
        **settings,
    )
    return _Candidate(node_type, config, planned, requests)


def _fit_unknown(spec: InferenceServiceSpec, engine: Engine, node_type: NodeType) -> _Candidate:
    """Without a geometry: what the user fixed, a whole GPU or half a CPU node, and the engine finds its limits."""
    settings: dict[str, object] = {
        "dtype": engine.dtype,
        "kv_cache_dtype": engine.kv_cache_dtype,
        "max_model_len": engine.max_model_len,
        "max_num_seqs": engine.max_num_seqs,
        "max_num_batched_tokens": engine.max_num_batched_tokens,
    }
    if node_type.is_gpu:
        requests = _gpu_requests(node_type, 0)
    else:
        memory_mib = node_type.memory_bytes // 2 // MIB
        requests = Requests(_cpu_request(node_type), memory_mib * MIB, 0)
        settings["memory_gib"] = max(memory_mib, 1) / 1024
    return _Candidate(node_type, _config(spec, node_type, **settings), None, requests)


def _config(spec: InferenceServiceSpec, node_type: NodeType, **settings: object) -> EngineConfig:
    values = {
        "model": model_address(spec),
        "served_model_name": spec.model.served_name,
        "device": "cuda" if node_type.is_gpu else "cpu",
        "quantization": spec.engine.quantization if spec.engine else None,
        "memory_utilization": MEMORY_UTILIZATION,
        **settings,
    }
    return EngineConfig.model_validate({name: value for name, value in values.items() if value is not None})


def _limits(engine: Engine) -> Limits:
    return Limits(
        max_model_len=engine.max_model_len,
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        quantization=engine.quantization or "none",
    )


def _explicit(dtype: str | None) -> str | None:
    return None if dtype == "auto" else dtype


def _dtype(engine: Engine, hardware: Hardware, geometry: Geometry) -> str:
    """The data type that `auto` means: float32 on a CPU, on a GPU the model's if it computes that."""
    asked = _explicit(engine.dtype)
    if asked:
        return asked
    if not hardware.is_gpu:
        return "float32"
    served = ("float32", "bfloat16", "float16")
    return geometry.dtype if geometry.dtype in served and geometry.dtype in hardware.dtypes else "bfloat16"


def _cpu_request(node_type: NodeType) -> int:
    """Half of a node's cores, so that a rollout has room; engines use what is idle beyond it."""
    return max(100, min(node_type.cpu_millicores // 2, 8000) // 100 * 100)


def _gpu_requests(node_type: NodeType, weights: int) -> Requests:
    """One GPU and its share of the host: the weights pass through host memory on their way to the device."""
    shares = max(1, node_type.num_devices // max(node_type.num_nodes, 1))
    memory = min(weights + 4 * GIB, int(node_type.host_memory_bytes * CPU_NODE_SHARE) // shares)
    cpu = min(4000, int(node_type.cpu_millicores * CPU_NODE_SHARE) // shares)
    return Requests(max(cpu // 100 * 100, 100), max(memory // MIB, 1) * MIB, 1)


def _explain_nothing(
    spec: InferenceServiceSpec, found: NodeTypes, allowed: Sequence[NodeType], geometry: Geometry | None
) -> Problem:
    """Why no node type is left, and what would do."""
    if allowed and geometry is not None:
        offered = ", ".join(f"{each.name} ({format_gib(each.memory_bytes)})" for each in allowed)
        return Problem(
            "ModelDoesNotFit", f"the model fits none of the node types {offered}: {_what_would_fit(spec, geometry)}"
        )
    named = (spec.hardware.types if spec.hardware else None) or []
    away = [each for each in found.types if each.num_nodes == 0 and (not named or each.hardware_name in named)]
    if away:
        names = ", ".join(f"{each.name} ({each.num_away} nodes)" for each in away)
        return Problem("HardwareAway", f"no node of a type that would do is ready and takes pods: {names}")
    present = ", ".join(each.name for each in found.types) or "no usable nodes"
    asked = f"hardware.types asks for {', '.join(named)}; " if named else ""
    reasons = "; ".join(f"{each.title} {each.why}" for each in found.unusable[:3])
    return Problem("NoFittingHardware", f"{asked}the cluster has {present}{': ' + reasons if reasons else ''}")


def _what_would_fit(spec: InferenceServiceSpec, geometry: Geometry) -> str:
    smallest = smallest_fitting_hardware(spec, geometry)
    if smallest is None:
        return "no GPU of the hardware table holds it; lower engine.maxModelLen, or set engine.quantization: int8"
    return f"the smallest GPU that would fit is {smallest.title} ({format_gib(smallest.memory_mib * MIB)})"


def smallest_fitting_hardware(spec: InferenceServiceSpec, geometry: Geometry) -> Hardware | None:
    """The GPU of the table with the least memory that holds the model as the spec asks for it."""
    engine = spec.engine or Engine()
    for row in sorted((row for row in HARDWARE if row.is_gpu), key=lambda row: row.memory_mib):
        dtype = _dtype(engine, row, geometry)
        try:
            plan_capacity(
                geometry,
                row,
                row.memory_mib * MIB,
                dtype=dtype,
                kv_cache_dtype=_explicit(engine.kv_cache_dtype) or activation_dtype(dtype, row),
                limits=_limits(engine),
                memory_utilization=MEMORY_UTILIZATION,
            )
        except CapacityError:
            continue
        return row
    return None
