"""Nodes -> node types: groups of equal devices. Pure.

A node type is what one engine configuration is right for: same device (or slice, or share of one), same CPU
architecture, asked for in the same way. What a node offers is in `offers.py`.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from octavo_kernels.hardware import Hardware

from octavo_operator.api import Scheduling, Toleration
from octavo_operator.claims import ClaimableDevices
from octavo_operator.observe import GPU_RESOURCE, ObservedNode, Taint
from octavo_operator.offers import Offer, architecture, find_offers, has_gpu
from octavo_operator.profiles import HardwareTable
from octavo_operator.quantities import MIB

OS_LABEL = "kubernetes.io/os"
GPU_TAINT = GPU_RESOURCE
# The engine's image brings CUDA 13, which starts on drivers of the 580 series and above: an older one ends in a crash
# loop. https://docs.nvidia.com/cuda/cuda-toolkit-release-notes/
MIN_DRIVER_MAJOR = 580


@dataclass(frozen=True, slots=True, order=True)
class NodeDevices:
    """Equal devices of one node: all of them, and those that engines of other resources hold."""

    total: int
    taken: int = 0


@dataclass(frozen=True, slots=True)
class NodeType:
    """Devices that are equal to an engine.

    name:            in status, in names of Deployments, in messages
    hardware:        row of the table; of the slice or the share where it is one
    recognised_by:   how the row was found, in words
    is_exact:        found by product, not by likeness
    products:        the product labels that its nodes have; none for cpu, and where nothing labels nodes
    resource:        extended resource that a pod asks for; empty for cpu and claims
    claim:           what a pod claims instead
    is_part:         a MIG slice or a time-sliced share
    num_sharers:     pods that take turns on one device
    memory_bytes:    of one device as a pod gets it (a MIG slice, a share); for cpu the largest node's allocatable
    cpu_millicores:  allocatable on the smallest of the nodes that have that memory
    host_memory_bytes: allocatable on the smallest node
    num_away:        that are not ready, or cordoned
    devices:         of each node that is ready and takes pods, most first; for cpu the node itself
    devices_per_node: on the largest node, even if it is away
    min_driver_major: what pods have to demand of their node's driver; 0 where the nodes do not tell their drivers
    """

    name: str
    hardware: Hardware
    recognised_by: str
    is_exact: bool
    products: tuple[str, ...]
    arch: str
    resource: str
    claim: ClaimableDevices | None
    is_part: bool
    num_sharers: int
    memory_bytes: int
    cpu_millicores: int
    host_memory_bytes: int
    num_away: int
    devices: tuple[NodeDevices, ...] = ()
    devices_per_node: int = 1
    min_driver_major: int = 0

    @property
    def num_nodes(self) -> int:
        """Nodes that are ready and take pods."""
        return len(self.devices)

    @property
    def num_devices(self) -> int:
        """Devices on those nodes; for cpu the nodes themselves."""
        return sum(each.total for each in self.devices)

    @property
    def num_taken(self) -> int:
        """Those of them that engines of other resources hold."""
        return sum(each.taken for each in self.devices)

    @property
    def is_gpu(self) -> bool:
        """Whether pods ask for a GPU."""
        return self.hardware.is_gpu

    @property
    def product(self) -> str:
        """The product for people; empty for cpu."""
        return self.products[0] if self.products else (self.claim.product if self.claim else "")

    @property
    def hardware_name(self) -> str:
        """What hardware.types calls it: the table's row, or generic where the product is not in the table."""
        return self.hardware.name if self.is_exact else "generic"

    def is_called(self, name: str) -> bool:
        """Whether a name in hardware.types means it: a row's name means whole devices, a part has a name of its own."""
        return name == self.name or (name == self.hardware_name and not self.is_part)

    def belongs_to(self, name: str) -> bool:
        """Whether a name in hardware.exclude means it: a row's name means the device and all its parts."""
        return name in (self.name, self.hardware_name)


@dataclass(frozen=True, slots=True)
class UnusableNodes:
    """Nodes that do not count for this resource, and why."""

    names: tuple[str, ...]
    why: str

    @property
    def title(self) -> str:
        """The nodes in a few words."""
        shown = ", ".join(self.names[:3])
        return f"{shown} and {len(self.names) - 3} more" if len(self.names) > 3 else shown


@dataclass(frozen=True, slots=True)
class NodeTypes:
    """The cluster as one resource sees it; types in order of their names."""

    types: tuple[NodeType, ...]
    unusable: tuple[UnusableNodes, ...]


def find_node_types(
    nodes: Iterable[ObservedNode],
    scheduling: Scheduling | None = None,
    table: HardwareTable | None = None,
    min_driver_major: int = MIN_DRIVER_MAJOR,
    num_taken: Mapping[tuple[str, str], int] | None = None,
) -> NodeTypes:
    """Group what the nodes offer that the resource's nodeSelector and tolerations allow; explain the others.

    min_driver_major: of the driver that the engine's image needs; 0 asks nothing of it
    num_taken:        (node, node type) -> devices that engines of other resources hold there
    The resource's own affinity is not evaluated: the scheduler does that.
    """
    table = table or HardwareTable()
    groups: dict[str, list[Offer]] = defaultdict(list)
    unusable: dict[str, list[str]] = defaultdict(list)
    for node in sorted(nodes, key=lambda each: each.name):
        node_problem = _why_unusable(node, scheduling)
        for offer in find_offers(node, table):
            why = node_problem or offer.problem or _driver_problem(offer, min_driver_major)
            if not why:
                groups[offer.name].append(offer)
            elif node.name not in unusable[why]:
                unusable[why].append(node.name)
    return NodeTypes(
        types=tuple(_node_type(name, groups[name], min_driver_major, num_taken or {}) for name in sorted(groups)),
        unusable=tuple(UnusableNodes(tuple(names), why) for why, names in sorted(unusable.items())),
    )


def _node_type(
    name: str, offers: list[Offer], min_driver_major: int, num_taken: Mapping[tuple[str, str], int]
) -> NodeType:
    ready = [each for each in offers if each.node.is_ready and not each.node.is_cordoned]
    counted = ready or offers
    # An engine that is right for the least of them is right for all.
    least = min(counted, key=lambda each: (each.memory_mib, each.match.hardware.memory_bandwidth_gbps))
    largest = max((each.node for each in counted), key=lambda node: (node.memory_bytes, node.cpu_millicores))
    match = least.match
    is_gpu = match.hardware.is_gpu
    tells_driver = all(each.driver_major and not each.claim for each in offers)
    per_node: Counter[str] = Counter()
    for each in counted:
        per_node[each.node.name] += each.num_devices
    devices = [NodeDevices(count, num_taken.get((node, name), 0)) for node, count in per_node.items() if ready]
    return NodeType(
        name=name,
        hardware=match.hardware,
        recognised_by=match.detail,
        is_exact=match.how in ("product", "cpu"),
        products=tuple(sorted({each.product for each in offers} - {""})),
        arch=architecture(least.node),
        resource=least.resource,
        claim=replace(least.claim, count=1) if least.claim else None,
        is_part=least.is_part,
        num_sharers=least.num_sharers,
        memory_bytes=least.memory_mib * MIB if is_gpu else largest.memory_bytes,
        cpu_millicores=min(each.node.cpu_millicores for each in counted) if is_gpu else largest.cpu_millicores,
        host_memory_bytes=min(each.node.memory_bytes for each in counted),
        num_away=len({each.node.name for each in offers} - {each.node.name for each in ready}),
        devices=tuple(sorted(devices, reverse=True)),
        devices_per_node=max(per_node.values()),
        min_driver_major=min_driver_major if is_gpu and tells_driver else 0,
    )


def _driver_problem(offer: Offer, min_driver_major: int) -> str:
    if not offer.driver_major or offer.driver_major >= min_driver_major:
        return ""
    return (
        f"offers {offer.name}, but its NVIDIA driver {offer.driver_major} is too old: the engine's image brings "
        f"CUDA 13, which needs driver {min_driver_major} or above"
    )


def _why_unusable(node: ObservedNode, scheduling: Scheduling | None) -> str:
    if node.labels.get(OS_LABEL, "linux") != "linux":
        return f"runs {node.labels[OS_LABEL]}; the engine's image is for Linux"
    wanted = (scheduling.node_selector if scheduling else None) or {}
    for label, value in sorted(wanted.items()):
        if node.labels.get(label) != value:
            return f"lacks the label {label}={value} of scheduling.nodeSelector"
    tolerations = (scheduling.tolerations if scheduling else None) or []
    for taint in node.taints:
        if not is_tolerated(taint, tolerations, is_gpu=has_gpu(node)):
            return f"has the taint {taint}, which scheduling.tolerations does not accept"
    return ""


def is_tolerated(taint: Taint, tolerations: Iterable[Toleration], *, is_gpu: bool) -> bool:
    """Whether a pod with these tolerations is let onto a node with this taint, by the scheduler's rules."""
    if taint.effect == "PreferNoSchedule" or (is_gpu and taint.key == GPU_TAINT):
        return True
    return any(_tolerates(each, taint) for each in tolerations)


def _tolerates(toleration: Toleration, taint: Taint) -> bool:
    if toleration.effect not in (None, taint.effect):
        return False
    if toleration.operator == "Exists":
        return toleration.key in (None, "", taint.key)
    return toleration.key == taint.key and (toleration.value or "") == taint.value
