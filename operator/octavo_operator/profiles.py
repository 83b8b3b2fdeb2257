"""HardwareProfiles -> the hardware table of one cluster. Pure.

A profile that contradicts itself, the table or an older profile is left out as a whole and says so in its status: half
of one would plan with numbers that nobody wrote.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from octavo_kernels.hardware import (
    BY_NAME,
    CPU,
    GENERIC,
    HARDWARE,
    ComputeCapability,
    CpuArchitecture,
    Hardware,
    Match,
    identify_gpu,
    min_capability,
    normalise_product,
)
from pydantic import ValidationError

from octavo_operator.errors import ProfileError, explain_validation
from octavo_operator.profile_api import HardwareProfile, HardwareProfileSpec

_MIN_CAPABILITY_OF_FP8 = (8, 9)
_MIN_CAPABILITY_OF_FP4 = (10, 0)


@dataclass(frozen=True)
class HardwareTable:
    """The rows that a cluster's nodes are recognised by, its own before the built-in ones.

    prices: row name -> price of a device for an hour
    """

    rows: tuple[Hardware, ...] = HARDWARE
    prices: Mapping[str, float] = field(default_factory=dict)

    @property
    def cpu(self) -> Hardware:
        """The row of nodes without a GPU."""
        return next(row for row in self.rows if row.name == CPU.name)

    @property
    def names(self) -> list[str]:
        """What hardware.types may name."""
        return [*(row.name for row in self.rows), GENERIC.name]

    def row(self, name: str) -> Hardware | None:
        """The row of this name."""
        return next((row for row in (*self.rows, GENERIC) if row.name == name), None)

    def identify(
        self, product: str, compute_capability: ComputeCapability | None, memory_mib: int, cpu_architecture: str
    ) -> Match:
        """A GPU's row; see `identify_gpu`."""
        return identify_gpu(product, compute_capability, memory_mib, cpu_architecture, self.rows)


@dataclass(frozen=True, slots=True)
class ProfileVerdict:
    """What became of one profile; `reason` and `problem` are empty if it is in the table."""

    name: str
    reason: str = ""
    problem: str = ""


def read_profiles(manifests: Iterable[Mapping[str, Any]]) -> tuple[HardwareTable, list[ProfileVerdict]]:
    """The table that the built-in rows and these HardwareProfiles make, and a verdict on each profile.

    Of two that claim one product, the older is used; without dates (from a file) the first by name.
    """
    verdicts: list[ProfileVerdict] = []
    own: dict[str, Hardware] = {}
    prices: dict[str, float] = {}
    for manifest in sorted(manifests, key=_age):
        name = str(manifest["metadata"]["name"])
        try:
            profile = _parse(manifest)
            row = _row(profile)
            _check_products(row, profile, own.values())
        except ProfileError as error:
            verdicts.append(ProfileVerdict(name, error.reason, str(error)))
            continue
        own[name] = row
        if profile.spec.price_per_hour is not None:
            prices[name] = float(profile.spec.price_per_hour)
        verdicts.append(ProfileVerdict(name))
    claimed = {product for row in own.values() for product in row.products}
    built_in = (replace(row, products=row.products - claimed) for row in HARDWARE if row.name not in own)
    return HardwareTable((*own.values(), *built_in), prices), verdicts


def _age(manifest: Mapping[str, Any]) -> tuple[str, str]:
    metadata = manifest["metadata"]
    return str(metadata.get("creationTimestamp") or ""), str(metadata["name"])


def _parse(manifest: Mapping[str, Any]) -> HardwareProfile:
    try:
        return HardwareProfile.model_validate(manifest)
    except ValidationError as error:
        raise ProfileError("InvalidSpec", explain_validation(error)) from None


def _row(profile: HardwareProfile) -> Hardware:
    """The profile's row. Raises ProfileError."""
    name, spec = profile.metadata.name, profile.spec
    base = _base(name, spec)
    capability = _capability(spec) or base.compute_capability
    own = BY_NAME.get(name)
    if own is None and not (spec.products or spec.compute_capability):
        raise ProfileError("Incomplete", "products or computeCapability is missing: nothing would be recognised by it")
    changes: dict[str, Any] = {
        "name": name,
        "title": spec.title or (own.title if own else name),
        "compute_capability": capability,
        "kernel_variant": spec.kernel_variant,
        "memory_mib": spec.memory_mib,
        "memory_bandwidth_gbps": spec.memory_bandwidth_gbps,
        "bf16_tflops": spec.bf16_tflops,
        "fp8_tflops": spec.fp8_tflops,
        "fp4_tflops": spec.fp4_tflops,
        "l2_mib": spec.l2_mib,
        "num_sms": spec.num_multiprocessors,
        "num_slices": spec.num_mig_slices,
        "cpu_architectures": _architectures(spec),
        "host_link": spec.host_link.kind if spec.host_link else None,
        "host_link_gbps": spec.host_link.gigabytes_per_second if spec.host_link else None,
        "products": _products(spec) or (own.products if own else frozenset()),
        "source": f"HardwareProfile {name}",
    }
    row = replace(base, **{field: value for field, value in changes.items() if value is not None})
    row = replace(row, dtypes=_dtypes(row), measured="", unverified="")
    _check(row)
    return row


def _base(name: str, spec: HardwareProfileSpec) -> Hardware:
    if name == GENERIC.name:
        raise ProfileError("ReservedName", "generic is the row of devices that nothing describes: choose another name")
    if name == CPU.name and (spec.based_on or spec.products or spec.compute_capability or spec.memory_mib):
        raise ProfileError("Contradiction", "cpu is the row of nodes without a GPU: it has no product, base or memory")
    if spec.based_on is not None and spec.based_on not in BY_NAME:
        raise ProfileError("UnknownBase", f"basedOn {spec.based_on} is no row of the hardware table")
    base = BY_NAME.get(spec.based_on or name)
    if base is not None:
        return base
    needed = {
        "computeCapability": spec.compute_capability,
        "memoryMib": spec.memory_mib,
        "memoryBandwidthGbps": spec.memory_bandwidth_gbps,
        "bf16Tflops": spec.bf16_tflops,
        "kernelVariant": spec.kernel_variant,
    }
    missing = [field for field, value in needed.items() if value is None]
    if missing:
        raise ProfileError("Incomplete", f"{', '.join(missing)} is missing, and basedOn names no row to take it from")
    return GENERIC


def _capability(spec: HardwareProfileSpec) -> ComputeCapability | None:
    if spec.compute_capability is None:
        return None
    major, _, minor = spec.compute_capability.partition(".")
    return int(major), int(minor)


def _architectures(spec: HardwareProfileSpec) -> frozenset[CpuArchitecture] | None:
    return frozenset(spec.cpu_architectures) if spec.cpu_architectures else None


def _products(spec: HardwareProfileSpec) -> frozenset[str]:
    return frozenset(normalise_product(each) for each in spec.products or [])


def _dtypes(row: Hardware) -> frozenset[str]:
    """What the stated rates say that the device computes natively."""
    if not row.is_gpu:
        return row.dtypes
    fp8 = {"float8_e4m3fn"} if row.fp8_tflops else set()
    fp4 = {"nvfp4", "mxfp4"} if row.fp4_tflops else set()
    return GENERIC.dtypes | fp8 | fp4


def _check(row: Hardware) -> None:
    """Numbers that cannot be true together. Raises ProfileError."""
    capability = row.compute_capability
    if capability is None:
        return
    shown = f"{capability[0]}.{capability[1]}"
    if row.fp8_tflops and capability < _MIN_CAPABILITY_OF_FP8:
        raise ProfileError("Contradiction", f"compute capability {shown} computes no float8, but fp8Tflops is set")
    if row.fp4_tflops and capability < _MIN_CAPABILITY_OF_FP4:
        raise ProfileError("Contradiction", f"compute capability {shown} computes no float4, but fp4Tflops is set")
    made_for = min_capability(row.kernel_variant)
    if made_for is None or capability < made_for:
        needed = "{}.{}".format(*made_for) if made_for else "none of a GPU"
        raise ProfileError(
            "Contradiction",
            f"kernel variant {row.kernel_variant} is made for compute capability {needed} and above, not for {shown}",
        )


def _check_products(row: Hardware, profile: HardwareProfile, others: Iterable[Hardware]) -> None:
    for other in others:
        shared = sorted(row.products & other.products)
        if shared:
            raise ProfileError(
                "ProductTaken", f"product {shared[0]} belongs to HardwareProfile {other.name}, which is older"
            )


def rejections(verdicts: Sequence[ProfileVerdict]) -> list[ProfileVerdict]:
    """The profiles that are not used."""
    return [each for each in verdicts if each.problem]
