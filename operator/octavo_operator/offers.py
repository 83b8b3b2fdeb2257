"""What one node offers to pods: its CPU, or GPUs, MIG slices, time-sliced shares and claimable devices. Pure.

GPUs are recognised by the labels of NVIDIA's GPU feature discovery or by the attributes of claimable devices,
numerically and exactly; memory is the device's, never the node's. A GPU node may offer several kinds of devices at once
(MIG's mixed strategy), each under an extended resource of its own.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from octavo_kernels.hardware import ComputeCapability, Match, normalise_product
from octavo_kernels.slices import mig_slice, parse_mig_profile, profile_of, time_share

from octavo_operator.claims import ClaimableDevices
from octavo_operator.observe import GPU_DOMAIN, GPU_RESOURCE, ObservedNode
from octavo_operator.profiles import HardwareTable

ARCH_LABEL = "kubernetes.io/arch"
PRODUCT_LABEL = f"{GPU_RESOURCE}.product"
MEMORY_LABEL = f"{GPU_RESOURCE}.memory"
REPLICAS_LABEL = f"{GPU_RESOURCE}.replicas"
MAJOR_LABEL = f"{GPU_RESOURCE}.compute.major"
MINOR_LABEL = f"{GPU_RESOURCE}.compute.minor"
DRIVER_LABEL = f"{GPU_DOMAIN}cuda.driver.major"

_SHARED_LABEL_SUFFIX = "-SHARED"
_SHARED_RESOURCE_SUFFIX = ".shared"
# With a slice's profile, -shared and -arm64 behind it the name is still a label's value.
_MAX_BASE = 32
_MIG_RESOURCE = f"{GPU_DOMAIN}mig-"


@dataclass(frozen=True, slots=True)
class Offer:
    """Equal devices of one node, as pods get them.

    name:         of the node type
    match:        row of the table, of the slice or the share where it is one
    product:      the product label; empty for cpu and where no label tells
    resource:     the extended resource that a pod asks for; empty for cpu and for claims
    claim:        what a pod claims instead of a resource
    is_part:      a MIG slice or a time-sliced share
    driver_major: of the GPU's driver; 0 where nothing says it
    problem:      why no pod can use it, empty if one can
    """

    node: ObservedNode
    name: str
    match: Match
    num_devices: int
    memory_mib: int = 0
    product: str = ""
    resource: str = ""
    claim: ClaimableDevices | None = None
    is_part: bool = False
    num_sharers: int = 1
    driver_major: int = 0
    problem: str = ""


def find_offers(node: ObservedNode, table: HardwareTable) -> list[Offer]:
    """Everything that pods can be given on this node; at least one offer, if only one with a problem."""
    if not has_gpu(node):
        match = Match(table.cpu, "cpu", "no GPU")
        return [Offer(node, _name(match, node), match, num_devices=1)]
    plugged = list(_plugged(node, table))
    if plugged:
        return plugged
    if node.claimable:
        return [_claimed(node, each, table) for each in node.claimable]
    match = _identify(node, table)
    return [
        Offer(
            node,
            _name(match, node, node.labels.get(PRODUCT_LABEL, "")),
            match,
            num_devices=0,
            problem=f"has a {node.labels.get(PRODUCT_LABEL, 'GPU')}, but offers no {GPU_RESOURCE}: neither the device "
            "plugin nor a DRA driver runs there",
        )
    ]


def has_gpu(node: ObservedNode) -> bool:
    """Whether the node is labelled as one with a GPU, or offers one."""
    return PRODUCT_LABEL in node.labels or any(node.gpu_resources.values()) or bool(node.claimable)


def architecture(node: ObservedNode) -> str:
    """The node's CPU architecture; amd64 where a node does not say."""
    return node.labels.get(ARCH_LABEL, "amd64")


def compute_capability(labels: Mapping[str, str]) -> ComputeCapability | None:
    """(major, minor) as numbers, if both labels are there."""
    if not labels.get(MAJOR_LABEL, "").isdigit() or not labels.get(MINOR_LABEL, "").isdigit():
        return None
    return int(labels[MAJOR_LABEL]), int(labels[MINOR_LABEL])


def _plugged(node: ObservedNode, table: HardwareTable) -> Iterator[Offer]:
    """What the device plugin offers: whole GPUs or slices as `nvidia.com/gpu`, slices as `nvidia.com/mig-1g.10gb`."""
    for resource, count in sorted(node.gpu_resources.items()):
        plain = resource.removesuffix(_SHARED_RESOURCE_SUFFIX)
        if not count or not (plain == GPU_RESOURCE or plain.startswith(_MIG_RESOURCE)):
            continue
        product = node.labels.get(PRODUCT_LABEL, "")
        of_resource = node.labels.get(f"{plain}.product", product)
        profile = plain.removeprefix(_MIG_RESOURCE) if plain != GPU_RESOURCE else profile_of(product)
        is_shared = plain != resource or of_resource.endswith(_SHARED_LABEL_SUFFIX)
        num_sharers = max(_integer(node.labels, f"{plain}.replicas"), 1) if is_shared else 1
        labelled_mib = _integer(node.labels, f"{plain}.memory")
        match, problem = _part(_identify(node, table), profile, labelled_mib, num_sharers)
        yield Offer(
            node,
            _name(match, node, product, profile, is_shared=is_shared),
            match,
            num_devices=count,
            memory_mib=labelled_mib // num_sharers or match.hardware.memory_mib,
            product=product,
            resource=resource,
            is_part=bool(profile) or is_shared,
            num_sharers=num_sharers,
            driver_major=_integer(node.labels, DRIVER_LABEL),
            problem=problem,
        )


def _claimed(node: ObservedNode, devices: ClaimableDevices, table: HardwareTable) -> Offer:
    # A slice's memory tells nothing of the device that it is a slice of.
    memory_mib = 0 if devices.profile else devices.memory_mib
    whole = table.identify(devices.product, devices.compute_capability, memory_mib, architecture(node))
    match, problem = _part(whole, devices.profile, devices.memory_mib, 1)
    return Offer(
        node,
        _name(match, node, devices.product, devices.profile),
        match,
        num_devices=devices.count,
        memory_mib=devices.memory_mib or match.hardware.memory_mib,
        product=node.labels.get(PRODUCT_LABEL, ""),
        claim=devices,
        is_part=bool(devices.profile),
        driver_major=devices.driver_major,
        problem=problem,
    )


def _identify(node: ObservedNode, table: HardwareTable) -> Match:
    """The row of the node's whole GPU. The memory label of a node in MIG's single strategy is a slice's."""
    product = node.labels.get(PRODUCT_LABEL, "")
    memory_mib = 0 if profile_of(product) else _integer(node.labels, MEMORY_LABEL)
    return table.identify(product, compute_capability(node.labels), memory_mib, architecture(node))


def _part(whole: Match, profile: str, labelled_mib: int, num_sharers: int) -> tuple[Match, str]:
    """The match with the row of the slice or share that a pod gets, and why there is none."""
    hardware = whole.hardware
    if profile:
        parsed = parse_mig_profile(profile)
        if parsed is None:
            return whole, f"offers slices of an unknown MIG profile {profile}"
        try:
            hardware = mig_slice(hardware, parsed, labelled_mib)
        except ValueError as error:
            return whole, f"offers slices that its GPU cannot have: {error}"
    if num_sharers > 1:
        hardware = time_share(hardware, num_sharers)
    return replace(whole, hardware=hardware), ""


def _name(match: Match, node: ObservedNode, product: str = "", profile: str = "", *, is_shared: bool = False) -> str:
    """A DNS label: the table's name for a known product, else the product itself; slices and shares say so."""
    known = match.how in ("product", "cpu")
    name = match.hardware.name if known else _slug(normalise_product(product)) or "generic"
    if profile:
        name += f"-mig-{_slug(profile)}"
    if is_shared:
        name += "-shared"
    usual = "arm64" if "amd64" not in match.hardware.cpu_architectures else "amd64"
    arch = architecture(node)
    return name if arch == usual else f"{name}-{arch}"


def _integer(labels: Mapping[str, str], name: str) -> int:
    text = labels.get(name, "")
    return int(text) if text.isdigit() else 0


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:_MAX_BASE].rstrip("-")
