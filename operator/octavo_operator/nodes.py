"""Nodes -> node types, through the hardware table. Pure.

A node type is a group of nodes on which one engine configuration is right: same device, same CPU architecture. GPUs are
recognised by the labels of NVIDIA's GPU feature discovery, numerically and exactly; memory is the GPU's, never the
node's. A node without a GPU is of the type cpu.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from octavo_kernels.hardware import CPU, ComputeCapability, Hardware, Match, identify_gpu, normalise_product

from octavo_operator.api import Scheduling, Toleration
from octavo_operator.observe import GPU_RESOURCE, ObservedNode, Taint
from octavo_operator.quantities import MIB

ARCH_LABEL = "kubernetes.io/arch"
OS_LABEL = "kubernetes.io/os"
PRODUCT_LABEL = f"{GPU_RESOURCE}.product"
MEMORY_LABEL = f"{GPU_RESOURCE}.memory"
REPLICAS_LABEL = f"{GPU_RESOURCE}.replicas"
MAJOR_LABEL = f"{GPU_RESOURCE}.compute.major"
MINOR_LABEL = f"{GPU_RESOURCE}.compute.minor"

GPU_TAINT = GPU_RESOURCE


@dataclass(frozen=True, slots=True)
class NodeType:
    """Nodes that are equal to an engine.

    name:            in status, in names of Deployments, in messages
    hardware:        row of the table
    recognised_by:   how the row was found, in words
    is_exact:        found by product, not by likeness
    product:         the product label, as it is on the nodes; empty for cpu
    memory_bytes:    of one device as a pod gets it (a MIG slice, a share); for cpu the largest node's allocatable
    cpu_millicores:  allocatable on the smallest of the nodes that have that memory
    host_memory_bytes: allocatable on the smallest node
    num_nodes:       that are ready and take pods
    num_away:        that are not ready, or cordoned
    num_devices:     on ready nodes; for cpu the nodes themselves
    """

    name: str
    hardware: Hardware
    recognised_by: str
    is_exact: bool
    product: str
    arch: str
    memory_bytes: int
    cpu_millicores: int
    host_memory_bytes: int
    num_nodes: int
    num_away: int
    num_devices: int

    @property
    def is_gpu(self) -> bool:
        """Whether pods ask for a GPU."""
        return self.hardware.is_gpu

    @property
    def hardware_name(self) -> str:
        """What hardware.types calls it: the table's row, or generic where the product is not in the table."""
        return self.hardware.name if self.is_exact else "generic"


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


def find_node_types(nodes: Iterable[ObservedNode], scheduling: Scheduling | None = None) -> NodeTypes:
    """Group the nodes that the resource's nodeSelector and tolerations allow; explain the others.

    The resource's own affinity is not evaluated: the scheduler does that.
    """
    groups: dict[str, list[ObservedNode]] = defaultdict(list)
    unusable: dict[str, list[str]] = defaultdict(list)
    for node in sorted(nodes, key=lambda each: each.name):
        why = _why_unusable(node, scheduling)
        if why:
            unusable[why].append(node.name)
        else:
            groups[node_type_name(node)].append(node)
    return NodeTypes(
        types=tuple(_node_type(name, groups[name]) for name in sorted(groups)),
        unusable=tuple(UnusableNodes(tuple(names), why) for why, names in sorted(unusable.items())),
    )


def has_gpu(node: ObservedNode) -> bool:
    """Whether the node is labelled as one with a GPU, or offers one."""
    return PRODUCT_LABEL in node.labels or node.num_gpus > 0


def match_hardware(node: ObservedNode) -> Match:
    """The node's row of the hardware table."""
    if not has_gpu(node):
        return Match(CPU, "cpu", "no GPU")
    labels = node.labels
    return identify_gpu(labels.get(PRODUCT_LABEL, ""), compute_capability(labels), _integer(labels, MEMORY_LABEL))


def compute_capability(labels: Mapping[str, str]) -> ComputeCapability | None:
    """(major, minor) as numbers, if both labels are there."""
    if not labels.get(MAJOR_LABEL, "").isdigit() or not labels.get(MINOR_LABEL, "").isdigit():
        return None
    return int(labels[MAJOR_LABEL]), int(labels[MINOR_LABEL])


def node_type_name(node: ObservedNode) -> str:
    """A DNS label: the table's name for a known product, else the product itself; slices and shares say so."""
    match = match_hardware(node)
    product = node.labels.get(PRODUCT_LABEL, "")
    known = match.how in ("product", "cpu")
    name = match.hardware.name if known else _slug(normalise_product(product)) or "generic"
    if "-MIG-" in product:
        name += f"-mig-{_slug(product.split('-MIG-', 1)[1].removesuffix('-SHARED'))}"
    if product.endswith("-SHARED"):
        name += "-shared"
    usual = "arm64" if "amd64" not in match.hardware.cpu_architectures else "amd64"
    arch = architecture(node)
    return name if arch == usual else f"{name}-{arch}"


def architecture(node: ObservedNode) -> str:
    """The node's CPU architecture; amd64 where a node does not say."""
    return node.labels.get(ARCH_LABEL, "amd64")


def _node_type(name: str, nodes: list[ObservedNode]) -> NodeType:
    match = match_hardware(nodes[0])
    ready = [node for node in nodes if node.is_ready and not node.is_cordoned]
    counted = ready or nodes
    largest = max(counted, key=lambda node: (node.memory_bytes, node.cpu_millicores))
    is_gpu = match.hardware.is_gpu
    return NodeType(
        name=name,
        hardware=match.hardware,
        recognised_by=match.detail,
        is_exact=match.how in ("product", "cpu"),
        product=nodes[0].labels.get(PRODUCT_LABEL, ""),
        arch=architecture(nodes[0]),
        memory_bytes=min(_device_memory(node, match.hardware) for node in counted) if is_gpu else largest.memory_bytes,
        cpu_millicores=min(node.cpu_millicores for node in counted) if is_gpu else largest.cpu_millicores,
        host_memory_bytes=min(node.memory_bytes for node in counted),
        num_nodes=len(ready),
        num_away=len(nodes) - len(ready),
        num_devices=sum(node.num_gpus for node in ready) if is_gpu else len(ready),
    )


def _device_memory(node: ObservedNode, hardware: Hardware) -> int:
    """Bytes of one device: the label's (for a MIG slice it is the slice's), shared between time-sliced replicas."""
    mib = _integer(node.labels, MEMORY_LABEL) or hardware.memory_mib
    shares = _integer(node.labels, REPLICAS_LABEL) if node.labels.get(PRODUCT_LABEL, "").endswith("-SHARED") else 1
    return mib * MIB // max(shares, 1)


def _why_unusable(node: ObservedNode, scheduling: Scheduling | None) -> str:
    if node.labels.get(OS_LABEL, "linux") != "linux":
        return f"runs {node.labels[OS_LABEL]}; the engine's image is for Linux"
    if has_gpu(node) and node.num_gpus == 0:
        return (
            f"has a {node.labels[PRODUCT_LABEL]}, but offers no {GPU_RESOURCE}: the device plugin does not run there, "
            "or it offers MIG slices under names of their own"
        )
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


def _integer(labels: Mapping[str, str], name: str) -> int:
    text = labels.get(name, "")
    return int(text) if text.isdigit() else 0


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40].rstrip("-")
