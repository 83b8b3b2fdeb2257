"""How one replica is spread over GPUs: what may be tried on a node type, the fewest nodes and GPUs first. Pure.

Which split holds the model is `fit.py`'s to find out.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from octavo_engine.config import EngineConfig
from octavo_engine.errors import CapacityError

from octavo_operator.api import InferenceServiceSpec
from octavo_operator.nodes import NodeType

MOST_NODES = 16


@dataclass(frozen=True, slots=True)
class Split:
    """How many GPUs do what.

    tensor:    that share every layer
    pipeline:  stages, each with its own layers, as many on one node as on another
    num_nodes: of a replica, each with the same number of its GPUs
    """

    tensor: int = 1
    pipeline: int = 1
    num_nodes: int = 1

    @property
    def num_gpus(self) -> int:
        """GPUs of a replica."""
        return self.tensor * self.pipeline

    @property
    def gpus_per_node(self) -> int:
        """GPUs of each of its pods."""
        return self.num_gpus // self.num_nodes

    def __str__(self) -> str:
        if self.num_gpus == 1:
            return "one GPU"
        if self.num_nodes == 1:
            return f"{self.num_gpus} GPUs of a node"
        return f"{self.num_gpus} GPUs, {self.gpus_per_node} in each of {self.num_nodes} nodes"


@dataclass(frozen=True, slots=True)
class Asked:
    """What the spec fixes; None leaves it open."""

    tensor: int | None
    pipeline: int | None
    num_gpus: int | None

    @property
    def is_open(self) -> bool:
        """Whether nothing is fixed."""
        return self == Asked(None, None, None)

    def allows(self, split: Split) -> bool:
        """Whether a split is what was asked for."""
        wanted = ((self.tensor, split.tensor), (self.pipeline, split.pipeline), (self.num_gpus, split.num_gpus))
        return all(asked in (None, value) for asked, value in wanted)

    def __str__(self) -> str:
        fields = {
            "parallelism.tensor": self.tensor,
            "parallelism.pipeline": self.pipeline,
            "hardware.gpusPerReplica": self.num_gpus,
        }
        return ", ".join(f"{name}: {value}" for name, value in fields.items() if value is not None)


def split_of(config: EngineConfig) -> Split:
    """How an engine is told to spread."""
    return Split(config.tensor_parallel_size, config.pipeline_parallel_size, config.num_nodes)


def asked_split(spec: InferenceServiceSpec) -> Asked:
    """What `parallelism` and `hardware.gpusPerReplica` fix."""
    parallelism, hardware = spec.parallelism, spec.hardware
    return Asked(
        parallelism.tensor if parallelism else None,
        parallelism.pipeline if parallelism else None,
        hardware.gpus_per_replica if hardware else None,
    )


def splits(asked: Asked, node_type: NodeType, num_heads: int) -> Iterator[Split]:
    """What may be tried on a node type, best first: the fewest nodes, then the fewest GPUs.

    num_heads: of the model's attention; 0 where they are not known
    A degree that does not divide the heads is tried only if it is asked for: the error then says why it cannot be.
    Raises CapacityError that says why there is nothing to try.
    """
    if node_type.is_part or not node_type.is_gpu:
        if not asked.allows(Split()):
            what = "a slice or a share of a GPU" if node_type.is_part else "a CPU"
            raise CapacityError(f"{asked} asks for several GPUs, and an engine on {what} is not spread")
        yield Split()
        return
    is_any = False
    for num_nodes in range(1, min(MOST_NODES, max(1, node_type.num_nodes)) + 1):
        for each in _over(num_nodes, node_type.devices_per_node, {1, num_nodes, asked.pipeline or 1}):
            if asked.tensor is None and num_heads % each.tensor:
                continue
            # Those that one node has are there even if it is away.
            if asked.allows(each) and (num_nodes == 1 or num_pods(node_type, each) >= num_nodes):
                is_any = True
                yield each
    if not is_any:
        raise CapacityError(
            f"{asked} cannot be had: there are {node_type.num_nodes} nodes of this type with up to "
            f"{node_type.devices_per_node} GPUs each, a replica has the same number on each of its nodes"
            f"{f', and its GPUs divide the {num_heads} heads of the model' if num_heads else ''}"
        )


def _over(num_nodes: int, devices_per_node: int, stages: Collection[int]) -> list[Split]:
    """Every split over so many nodes. A stage in each node comes first: it exchanges far less than tensor parallelism.

    stages: numbers of them to try
    """
    found = [
        Split(num_gpus // pipeline, pipeline, num_nodes)
        for num_gpus in range(num_nodes, num_nodes * devices_per_node + 1, num_nodes)
        for pipeline in stages
        if num_gpus % pipeline == 0 and (pipeline == 1 or pipeline % num_nodes == 0)
    ]
    return sorted(found, key=lambda each: (each.pipeline != num_nodes, each.num_gpus, each.pipeline))


def num_pods(node_type: NodeType, split: Split, *, free: bool = False) -> int:
    """Pods of a split for which the ready nodes have the devices; `free`: that no other resource holds."""
    left = (each.total - (each.taken if free else 0) for each in node_type.devices)
    return sum(max(0, each) // split.gpus_per_node for each in left)


def num_replicas(node_type: NodeType, split: Split, *, free: bool = False) -> int:
    """Replicas for which there is room."""
    return num_pods(node_type, split, free=free) // split.num_nodes
