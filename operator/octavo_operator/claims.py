"""Devices that a ResourceSlice offers to claims (Dynamic Resource Allocation), as values. Pure.

Of NVIDIA's driver only. Names of attributes: https://github.com/kubernetes-sigs/dra-driver-nvidia-gpu
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from octavo_kernels.hardware import ComputeCapability

from octavo_operator.quantities import MIB, parse_quantity

GPU_DRIVER = "gpu.nvidia.com"
GPU_CLASS = "gpu.nvidia.com"
MIG_CLASS = "mig.nvidia.com"


@dataclass(frozen=True, slots=True)
class ClaimableDevices:
    """Equal devices of one node.

    product: the driver's name of the GPU, with spaces
    profile: of a MIG slice; empty for a whole GPU
    driver_major: 0 where the driver does not say
    """

    product: str
    compute_capability: ComputeCapability | None
    memory_mib: int
    driver_major: int
    profile: str
    count: int = 1

    @property
    def device_class(self) -> str:
        """Name of the DeviceClass that the driver's chart makes for such devices."""
        return MIG_CLASS if self.profile else GPU_CLASS

    @property
    def selector(self) -> str:
        """A CEL expression that is true of these devices alone."""
        attributes = {"productName": self.product, "profile": self.profile}
        own = f"device.attributes['{GPU_DRIVER}']"
        return " && ".join(f"{own}.{name} == '{value}'" for name, value in attributes.items() if value)


def observe_slice(manifest: Mapping[str, Any]) -> tuple[str, tuple[ClaimableDevices, ...]]:
    """The node that a ResourceSlice is about, and its devices; no node where they are not a node's, or not ours."""
    spec = manifest.get("spec") or {}
    node = str(spec.get("nodeName") or "")
    if spec.get("driver") != GPU_DRIVER or not node:
        return "", ()
    return node, group(_device(each) for each in spec.get("devices") or [])


def group(devices: Iterable[ClaimableDevices]) -> tuple[ClaimableDevices, ...]:
    """Equal devices together, in a fixed order."""
    counts: Counter[ClaimableDevices] = Counter()
    for each in devices:
        counts[replace(each, count=1)] += each.count
    found = (replace(each, count=count) for each, count in counts.items())
    return tuple(sorted(found, key=lambda each: (each.product, each.profile, each.memory_mib, each.driver_major)))


def _device(device: Mapping[str, Any]) -> ClaimableDevices:
    # The first versions of the API had the attributes one level deeper.
    body = device.get("basic") or device
    attributes = {_short(name): value for name, value in (body.get("attributes") or {}).items()}
    capacity = {_short(name): value for name, value in (body.get("capacity") or {}).items()}
    version = _numbers(attributes, "cudaComputeCapability")
    memory = (capacity.get("memory") or {}).get("value", 0)
    return ClaimableDevices(
        product=str((attributes.get("productName") or {}).get("string", "")),
        compute_capability=(version[0], version[1]) if len(version) > 1 else None,
        memory_mib=int(parse_quantity(memory)) // MIB,
        driver_major=next(iter(_numbers(attributes, "driverVersion")), 0),
        profile=str((attributes.get("profile") or {}).get("string", "")),
    )


def _short(name: str) -> str:
    return name.removeprefix(f"{GPU_DRIVER}/")


def _numbers(attributes: Mapping[str, Any], name: str) -> list[int]:
    """`9.0.0` -> [9, 0, 0]; nothing where it is no version."""
    parts = str((attributes.get(name) or {}).get("version", "")).split(".")
    return [int(each) for each in parts] if all(each.isdigit() for each in parts) else []
