"""What a model would need that no engine runs: too large for one device, or of a kind that the engine lacks. Pure."""

from octavo_engine.capacity import Parallelism, find_parallelism, plan_capacity
from octavo_engine.errors import CapacityError
from octavo_engine.geometry import Geometry

from octavo_operator.api import Engine, InferenceServiceSpec
from octavo_operator.fit import CPU_NODE_SHARE, MEMORY_UTILIZATION, data_types, limits_of
from octavo_operator.nodes import NodeType
from octavo_operator.quantities import format_gib


def on_more_devices(spec: InferenceServiceSpec, node_type: NodeType, geometry: Geometry) -> str:
    """How many GPUs of that type would hold a model that one does not, in a sentence; empty where none would."""
    if not node_type.is_gpu:
        return ""
    try:
        found = _parallelism(spec, node_type, geometry)
    except CapacityError:
        return ""
    return f"; it would fit on {_devices(found)}, but an engine uses one GPU"


def what_it_needs(spec: InferenceServiceSpec, node_type: NodeType, geometry: Geometry) -> str:
    """The memory of a model that cannot be served, on that node type, in a sentence."""
    try:
        found = _parallelism(spec, node_type, geometry)
    except CapacityError as error:
        return str(error)
    capacity = found.capacity
    place = _devices(found) if node_type.is_gpu else "a node"
    weights = f"{format_gib(capacity.weight_bytes)} of weights{' in each' if found.num_devices > 1 else ''}"
    return f"it would fit on {place}: {weights}, and KV cache for {capacity.num_kv_tokens:,} tokens"


def _parallelism(spec: InferenceServiceSpec, node_type: NodeType, geometry: Geometry) -> Parallelism:
    engine = spec.engine or Engine()
    dtype, kv_cache_dtype = data_types(engine, node_type.hardware, geometry)
    limits = limits_of(engine)
    if not node_type.is_gpu:
        memory = int(node_type.memory_bytes * CPU_NODE_SHARE)
        capacity = plan_capacity(
            geometry,
            node_type.hardware,
            memory,
            dtype=dtype,
            kv_cache_dtype=kv_cache_dtype,
            limits=limits,
            memory_utilization=MEMORY_UTILIZATION,
        )
        return Parallelism(1, 1, capacity)
    return find_parallelism(
        geometry,
        node_type.hardware,
        node_type.memory_bytes,
        devices_per_node=max(1, node_type.num_devices // max(node_type.num_nodes, 1)),
        dtype=dtype,
        kv_cache_dtype=kv_cache_dtype,
        limits=limits,
        memory_utilization=MEMORY_UTILIZATION,
    )


def _devices(found: Parallelism) -> str:
    if found.num_devices == 1:
        return "one GPU"
    if found.pipeline == 1:
        return f"{found.num_devices} GPUs of a node"
    return f"{found.num_devices} GPUs, {found.tensor} in each of {found.pipeline} nodes"
