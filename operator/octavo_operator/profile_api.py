"""The `HardwareProfile` resource, typed: a row that a cluster adds to the hardware table, or changes in it.

Like `api.py` it states shapes and rules; what an absent field means is decided in `profiles.py`.
"""

from typing import Annotated, Literal

from octavo_kernels.hardware import BY_NAME, HARDWARE, KERNEL_VARIANTS, CpuArchitecture
from pydantic import ConfigDict, Field

from octavo_operator.api import HardwareName, Part
from octavo_operator.status_api import Condition

PROFILE_KIND = "HardwareProfile"
PROFILE_PLURAL = "hardwareprofiles"

BASE_NAMES = [row.name for row in HARDWARE if row.is_gpu] + ["generic"]
GPU_VARIANTS = [name for name in KERNEL_VARIANTS if name != "cpu"]
_TABLE_NAMES = ", ".join(f"'{name}'" for name in BY_NAME)

# Kubernetes advises against floating point in specs; a rate has no use for fractions, a price has.
Rate = Annotated[int, Field(ge=1, le=10**9)]
Price = Annotated[str, Field(pattern=r"^[0-9]{1,9}(\.[0-9]{1,6})?$")]


class HostLinkProfile(Part):
    """How host memory and a device are connected."""

    kind: Literal["pcie", "nvlink-c2c"] | None = Field(None, description="Kind of the link.")
    gigabytes_per_second: Rate | None = Field(None, description="GB/s in one direction.")


class HardwareProfileSpec(Part):
    """What one device type is. Absent fields are those of basedOn, or of the table's row of the profile's own name."""

    based_on: str | None = Field(
        None,
        description="Row of the hardware table whose numbers hold where the profile has none of its own; "
        "absent: the row of the profile's name.",
        json_schema_extra={"enum": [*BASE_NAMES]},
    )
    title: str | None = Field(None, min_length=1, max_length=63, description="Name for people.")
    products: list[Annotated[str, Field(min_length=1, max_length=63)]] | None = Field(
        None,
        min_length=1,
        max_length=16,
        description="Values of the node label nvidia.com/gpu.product, or DRA product names, that mean this device.",
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )
    compute_capability: Annotated[str, Field(pattern=r"^[1-9][0-9]?\.[0-9]$")] | None = Field(
        None, description="Compute capability, such as 9.0."
    )
    memory_mib: Rate | None = Field(None, description="Memory of one device in MiB, as its driver reports it.")
    memory_bandwidth_gbps: Rate | None = Field(None, description="GB/s of device memory.")
    bf16_tflops: Rate | None = Field(None, description="Dense bfloat16 matrix rate in TFLOP/s.")
    fp8_tflops: Rate | None = Field(None, description="Dense float8 matrix rate in TFLOP/s.")
    fp4_tflops: Rate | None = Field(None, description="Dense float4 matrix rate in TFLOP/s.")
    l2_mib: Rate | None = Field(None, description="Level-2 cache in MiB.")
    num_multiprocessors: Rate | None = Field(None, description="Streaming multiprocessors.")
    num_mig_slices: Annotated[int, Field(ge=0, le=8)] | None = Field(
        None, description="Compute slices that MIG divides the device into; 0: it has no MIG."
    )
    cpu_architectures: list[CpuArchitecture] | None = Field(
        None,
        min_length=1,
        max_length=2,
        description="CPU architectures of the nodes that it comes in.",
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )
    host_link: HostLinkProfile | None = Field(None, description="Link between host memory and device.")
    kernel_variant: str | None = Field(
        None, description="Set of tuned kernels that it runs.", json_schema_extra={"enum": [*GPU_VARIANTS]}
    )
    price_per_hour: Price | None = Field(
        None,
        description="Price of one device for an hour, in any currency that all profiles share; "
        "hardware.preference: Cheapest compares it.",
    )


class HardwareProfileStatus(Part):
    """What became of the profile. Written by the operator alone."""

    observed_generation: int = Field(description="Generation of the spec that this status is about.")
    conditions: list[Condition] = Field(
        description="Ready: the profile is used to recognise nodes. Stalled: it is not, and the message says why.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    )
    nodes: int = Field(description="Nodes that are recognised by it.")


class ProfileMetadata(Part):
    """The part of ObjectMeta that counts."""

    model_config = ConfigDict(extra="ignore")

    name: HardwareName = Field(min_length=1, max_length=32)
    uid: str = ""
    generation: int = 0
    creation_timestamp: str = ""


class HardwareProfile(Part):
    """A device type that the hardware table lacks, or describes otherwise; hardware.types calls it by its name."""

    model_config = ConfigDict(extra="ignore")

    api_version: Literal["octavo.dev/v1alpha1"]
    kind: Literal["HardwareProfile"]
    metadata: ProfileMetadata
    spec: HardwareProfileSpec


PROFILE_RULES = (
    (
        f"self.metadata.name in [{_TABLE_NAMES}] || has(self.spec.basedOn) || (has(self.spec.computeCapability) && "
        "has(self.spec.memoryMib) && has(self.spec.memoryBandwidthGbps) && has(self.spec.bf16Tflops) && "
        "has(self.spec.kernelVariant))",
        "a device that is neither a row of the hardware table nor based on one needs computeCapability, memoryMib, "
        "memoryBandwidthGbps, bf16Tflops and kernelVariant",
    ),
    (
        f"self.metadata.name in [{_TABLE_NAMES}] || has(self.spec.products) || has(self.spec.computeCapability)",
        "a device that is no row of the hardware table needs products or computeCapability to be recognised by",
    ),
    (
        "self.metadata.name != 'generic'",
        "generic is the row of devices that nothing describes: give the profile another name",
    ),
    (
        "self.metadata.name != 'cpu' || !(has(self.spec.basedOn) || has(self.spec.products) || "
        "has(self.spec.computeCapability) || has(self.spec.memoryMib) || has(self.spec.kernelVariant))",
        "cpu is the row of nodes without a GPU: its memory is the node's, and it has no product, compute capability, "
        "base or kernel variant",
    ),
    (
        "self.metadata.name.matches('^[a-z]([-a-z0-9]{0,30}[a-z0-9])?$')",
        "metadata.name must have at most 32 characters, start with a letter and hold only lower-case letters, digits "
        "and dashes: node types and Deployments take it",
    ),
)
