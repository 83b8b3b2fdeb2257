"""What one device does not hold: how many would, side by side in a node (tensor) and one node after another (pipeline).

These functions say what each device gets of a model, and how many devices a model needs.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from octavo_kernels.hardware import Hardware

from octavo_engine.capacity.budget import Capacity, Limits, plan_capacity
from octavo_engine.errors import CapacityError
from octavo_engine.geometry import Experts, Geometry

_MOST_NODES = 16


@dataclass(frozen=True, slots=True)
class Parallelism:
    """tensor: devices that share every layer. pipeline: groups of them, each with its own layers.

    capacity: of the fullest device. Its predicted times are of its own work, without the exchange between devices.
    """

    tensor: int
    pipeline: int
    capacity: Capacity

    @property
    def num_devices(self) -> int:
        """Devices of one replica."""
        return self.tensor * self.pipeline


def shard(geometry: Geometry, *, tensor: int = 1, pipeline: int = 1) -> Geometry:
    """What the fullest of tensor x pipeline devices holds.

    Heads, MLPs and the vocabulary are divided; norms, routers and compressed keys and values are on every device, and
    a KV head is on several where there are fewer heads than devices, and every one gets all logits. A pipeline's ends
    hold one embedding each.
    Raises CapacityError that names what does not divide.
    """
    heads, kv_heads, experts = geometry.num_heads, geometry.num_kv_heads, geometry.experts
    for name, value in (("heads", heads), ("MLP features", geometry.intermediate_size), *_expert_widths(experts)):
        if value % tensor:
            raise CapacityError(f"{value} {name} cannot be divided among {tensor} devices")
    if kv_heads % tensor and tensor % kv_heads:
        raise CapacityError(f"{kv_heads} KV heads cannot be divided among {tensor} devices")
    if pipeline > geometry.num_layers:
        raise CapacityError(f"{geometry.num_layers} layers cannot be divided among {pipeline} stages")
    num_layers = -(-geometry.num_layers // pipeline)
    return replace(
        geometry,
        num_layers=num_layers,
        num_full_layers=min(geometry.num_full_layers, num_layers),
        num_heads=heads // tensor,
        num_kv_heads=max(1, kv_heads // tensor),
        intermediate_size=geometry.intermediate_size // tensor,
        vocab_size=-(-geometry.vocab_size // tensor),
        gathered_vocab_size=geometry.vocab_size if tensor > 1 else None,
        tie_word_embeddings=geometry.tie_word_embeddings or pipeline > 1,
        experts=_shard_experts(experts, tensor, num_layers) if experts else None,
    )


def _expert_widths(experts: Experts | None) -> list[tuple[str, int]]:
    if experts is None:
        return []
    return [
        ("features of an expert", experts.intermediate_size),
        ("features of the shared expert", experts.shared_intermediate_size),
    ]


def _shard_experts(experts: Experts, tensor: int, num_layers: int) -> Experts:
    return replace(
        experts,
        num_layers=min(experts.num_layers, num_layers),
        intermediate_size=experts.intermediate_size // tensor,
        shared_intermediate_size=experts.shared_intermediate_size // tensor,
    )


def find_parallelism(
    geometry: Geometry,
    hardware: Hardware,
    memory_bytes: int,
    *,
    devices_per_node: int,
    dtype: str,
    kv_cache_dtype: str,
    limits: Limits,
    memory_utilization: float = 0.9,
) -> Parallelism:
    """The fewest devices that hold the model: the smallest tensor parallelism in a node, else over several nodes.

    Raises CapacityError where nothing up to 16 nodes does, with the reason of the last attempt.
    """
    problem = "there is no device"
    for tensor, pipeline in _attempts(geometry, devices_per_node):
        try:
            capacity = plan_capacity(
                shard(geometry, tensor=tensor, pipeline=pipeline),
                hardware,
                memory_bytes,
                dtype=dtype,
                kv_cache_dtype=kv_cache_dtype,
                limits=limits,
                memory_utilization=memory_utilization,
            )
        except CapacityError as error:
            problem = str(error)
            continue
        return Parallelism(tensor, pipeline, capacity)
    raise CapacityError(problem)


def _attempts(geometry: Geometry, devices_per_node: int) -> Iterator[tuple[int, int]]:
    """In a node: every degree that divides the heads, the smallest first. Over nodes: the largest of them in each."""
    degrees = [each for each in range(1, devices_per_node + 1) if geometry.num_heads % each == 0]
    yield from ((each, 1) for each in degrees)
    for pipeline in range(2, min(_MOST_NODES, geometry.num_layers) + 1):
        yield from ((each, pipeline) for each in reversed(degrees))
