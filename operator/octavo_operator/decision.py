"""What a plan says: which engines run where, what is not used, and why. Values only; `plan.py` decides them."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from octavo_engine.capacity import Capacity
from octavo_engine.config import EngineConfig

from octavo_operator.nodes import NodeType
from octavo_operator.observe import LEADER_WORKER_SET_KIND, ModelGeometry
from octavo_operator.parallelism import Split, split_of
from octavo_operator.quantities import GIB

ProblemReason = Literal[
    "NoNodes",
    "NoFittingHardware",
    "HardwareAway",
    "ModelDoesNotFit",
    "LeaderWorkerSetMissing",
    "ModelNotSupported",
    "ModelNotFound",
    "ModelAccessDenied",
    "ModelUnreadable",
    "InvalidEngineSettings",
]


@dataclass(frozen=True, slots=True)
class Defaults:
    """What the operator was started with, where a spec leaves it open."""

    engine_image: str


@dataclass(frozen=True, slots=True)
class Requests:
    """What one engine pod asks of its node; a replica over several nodes has one on each."""

    cpu_millicores: int
    memory_bytes: int
    num_gpus: int


@dataclass(frozen=True, slots=True)
class Variant:
    """The engines of one node type: one Deployment, or one LeaderWorkerSet where a replica takes several nodes.

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
    def identity(self) -> str:
        """What the engine is told, where it runs and what it asks of its node; not how many there are, nor why."""
        node_type = self.node_type
        parts = [
            node_type.name, node_type.products, node_type.arch, node_type.resource, node_type.min_driver_major,
            node_type.claim.selector if node_type.claim else "", node_type.hardware.kernel_variant,
            self.image, self.config.model_dump_json(), self.requests.cpu_millicores, self.requests.memory_bytes,
        ]  # fmt: skip
        return json.dumps(parts)

    @property
    def split(self) -> Split:
        """Over how many GPUs and nodes a replica is spread."""
        return split_of(self.config)

    @property
    def reserve_bytes(self) -> int:
        """What the engine may take but does not plan to."""
        if self.capacity is None:
            return 0
        total = int((self.config.memory_gib or 0) * GIB) or self.node_type.memory_bytes
        return max(0, total - self.capacity.total_bytes)


def workload_kind(variant: Variant) -> str:
    """The kind of object that makes its pods."""
    return LEADER_WORKER_SET_KIND if variant.split.num_nodes > 1 else "Deployment"


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
    """What should run. No variants and a problem, or variants and none.

    outdated: what a plan that is made as if nothing served yet would do otherwise; empty if nothing
    """

    variants: tuple[Variant, ...]
    rejected: tuple[Rejected, ...]
    problem: Problem | None
    model: ModelGeometry
    outdated: str = ""

    @cached_property
    def hash(self) -> str:
        """Changes with what the engines are told and where they run, not with replicas or explanations."""
        parts = sorted(variant.identity for variant in self.variants)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]

    @property
    def num_replicas(self) -> int:
        """Replicas over all variants."""
        return sum(variant.replicas for variant in self.variants)

    @property
    def hardware(self) -> str:
        """The variants in one line: `h100 x2, cpu x1`."""
        return ", ".join(f"{variant.node_type.name} x{variant.replicas}" for variant in self.variants)
