"""What a model would need that does not run: more GPUs than there are, or an engine that knows it. Pure."""

from dataclasses import replace

from octavo_engine.errors import CapacityError
from octavo_engine.geometry import Geometry

from octavo_operator.api import InferenceServiceSpec
from octavo_operator.fit import Candidate, fit
from octavo_operator.nodes import NodeDevices, NodeType
from octavo_operator.parallelism import MOST_NODES
from octavo_operator.quantities import format_gib


def on_more_nodes(spec: InferenceServiceSpec, node_type: NodeType, geometry: Geometry) -> str:
    """How many GPUs of that type would hold a model that all of its nodes do not; empty where none would."""
    if not node_type.is_gpu:
        return ""
    try:
        found = _with_enough(spec, node_type, geometry)
    except CapacityError:
        return ""
    return f"; it would fit on {found.split}" if found.split.num_nodes > node_type.num_nodes else ""


def what_it_needs(spec: InferenceServiceSpec, node_type: NodeType, geometry: Geometry) -> str:
    """The memory of a model that cannot be served, on that node type, in a sentence."""
    try:
        found = _with_enough(spec, node_type, geometry)
    except CapacityError as error:
        return str(error)
    capacity = found.capacity
    assert capacity is not None
    place = str(found.split) if node_type.is_gpu else "a node"
    weights = f"{format_gib(capacity.weight_bytes)} of weights{' in each' if found.split.num_gpus > 1 else ''}"
    return f"it would fit on {place}: {weights}, and KV cache for {capacity.num_kv_tokens:,} tokens"


def _with_enough(spec: InferenceServiceSpec, node_type: NodeType, geometry: Geometry) -> Candidate:
    """As if there were as many nodes of the type as an engine can take."""
    nodes = (NodeDevices(node_type.devices_per_node),) * MOST_NODES
    return fit(spec, replace(node_type, devices=nodes), geometry)
