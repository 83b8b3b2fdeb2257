"""The hardware table: one row per device type, read by the operator (to plan) and by the kernels (to launch).

Standard library only. A device is recognised by its normalised product name, then by numeric compute capability, then
by memory: never by substring ("GH200" contains "H200"), never by comparing versions as text ("10.0" < "9.0"), never by
node memory. Numbers are the vendor's data sheet unless `measured` says otherwise; rows or fields that were not checked
on a real device are named in `unverified`.
"""

from dataclasses import dataclass
from typing import Literal

CpuArchitecture = Literal["amd64", "arm64"]
HostLink = Literal["pcie", "nvlink-c2c", "memory"]
ComputeCapability = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Hardware:
    """One device type.

    memory_mib:            what the driver reports for one device; 0 where it depends on the node (CPU)
    memory_bandwidth_gbps: GB/s that a kernel can stream from device memory
    bf16_tflops:           dense matrix rate, without sparsity
    products:              normalised product names (see `normalise_product`) that mean this row
    cpu_architectures:     CPU architectures of the nodes it comes in
    kernel_variant:        which set of tuned kernels it runs
    """

    name: str
    title: str
    kernel_variant: str
    compute_capability: ComputeCapability | None
    memory_mib: int
    memory_bandwidth_gbps: float
    bf16_tflops: float
    dtypes: frozenset[str]
    cpu_architectures: frozenset[CpuArchitecture]
    host_link: HostLink
    products: frozenset[str]
    measured: str = ""
    unverified: str = ""

    @property
    def is_gpu(self) -> bool:
        """Whether pods ask for this device through a GPU resource."""
        return self.compute_capability is not None


@dataclass(frozen=True, slots=True)
class Match:
    """A row and how sure it is: `how` is product, compute-capability or generic; `detail` says it in words."""

    hardware: Hardware
    how: Literal["product", "compute-capability", "generic", "cpu"]
    detail: str


_AMD64: frozenset[CpuArchitecture] = frozenset({"amd64"})
_ARM64: frozenset[CpuArchitecture] = frozenset({"arm64"})
_ANY: frozenset[CpuArchitecture] = frozenset({"amd64", "arm64"})
_AMPERE = frozenset({"float32", "bfloat16", "float16", "int8"})
_HOPPER = _AMPERE | {"float8_e4m3fn"}
_BLACKWELL = _HOPPER | {"nvfp4", "mxfp4"}

CPU = Hardware(
    "cpu", "CPU", "cpu", None, 0, 20.0, 0.15, frozenset({"float32", "int8"}), _ANY, "memory", frozenset(),
    measured="20 GB/s read and 0.15 TFLOP/s in float32 on 2 cores of an AMD EPYC (Zen 3)",
)  # fmt: skip

GENERIC = Hardware(
    "generic", "unknown GPU", "generic", (8, 0), 16_384, 300.0, 30.0, _AMPERE, _ANY, "pcie", frozenset(),
    unverified="a floor for devices that the table does not know",
)  # fmt: skip

# Memory as the driver reports it (MiB), bandwidth and dense bf16 rate from the data sheets.
HARDWARE: tuple[Hardware, ...] = (
    CPU,
    Hardware("l4", "NVIDIA L4", "ada", (8, 9), 23_034, 300, 121, _HOPPER, _AMD64, "pcie", frozenset({"L4"})),
    Hardware("l40s", "NVIDIA L40S", "ada", (8, 9), 46_068, 864, 362, _HOPPER, _AMD64, "pcie", frozenset({"L40S"})),
    Hardware(
        "a100-40gb", "NVIDIA A100 40 GB", "ampere", (8, 0), 40_960, 1_555, 312, _AMPERE, _AMD64, "pcie",
        frozenset({"A100-SXM4-40GB", "A100-PCIE-40GB"}),
    ),
    Hardware(
        "a100-80gb", "NVIDIA A100 80 GB", "ampere", (8, 0), 81_920, 2_039, 312, _AMPERE, _AMD64, "pcie",
        frozenset({"A100-SXM4-80GB", "A100-80GB-PCIe"}),
    ),
    Hardware(
        "h100", "NVIDIA H100 SXM", "hopper", (9, 0), 81_559, 3_350, 989, _HOPPER, _AMD64, "pcie",
        frozenset({"H100-80GB-HBM3"}), measured="3,000 GB/s copied, 771 TFLOP/s bf16",
    ),
    Hardware(
        "h100-pcie", "NVIDIA H100 PCIe", "hopper", (9, 0), 81_559, 2_039, 756, _HOPPER, _AMD64, "pcie",
        frozenset({"H100-PCIe"}), unverified="product label",
    ),
    Hardware(
        "h200", "NVIDIA H200", "hopper", (9, 0), 143_771, 4_800, 989, _HOPPER, _AMD64, "pcie",
        frozenset({"H200", "H200-NVL"}), measured="4,300 GB/s copied",
    ),
    Hardware(
        "gh200-96gb", "NVIDIA GH200 96 GB", "grace-hopper", (9, 0), 97_871, 4_000, 989, _HOPPER, _ARM64,
        "nvlink-c2c", frozenset({"GH200-480GB"}),
    ),
    Hardware(
        "gh200-144gb", "NVIDIA GH200 144 GB", "grace-hopper", (9, 0), 146_831, 4_900, 989, _HOPPER, _ARM64,
        "nvlink-c2c", frozenset({"GH200-144G-HBM3e"}), unverified="product label",
    ),
    Hardware(
        "b200", "NVIDIA B200", "blackwell", (10, 0), 183_359, 8_000, 2_250, _BLACKWELL, _AMD64, "pcie",
        frozenset({"B200"}), unverified="product label",
    ),
    Hardware(
        "gb200", "NVIDIA GB200", "blackwell", (10, 0), 189_471, 8_000, 2_450, _BLACKWELL, _ARM64, "nvlink-c2c",
        frozenset({"GB200"}),
    ),
    Hardware(
        "b300", "NVIDIA B300", "blackwell", (10, 3), 275_040, 8_000, 2_250, _BLACKWELL, _AMD64, "pcie",
        frozenset({"B300-SXM6-AC"}), unverified="compute capability",
    ),
    Hardware(
        "gb300", "NVIDIA GB300", "blackwell", (10, 3), 275_040, 8_000, 2_450, _BLACKWELL, _ARM64, "nvlink-c2c",
        frozenset({"GB300"}), unverified="product label, memory, compute capability",
    ),
    Hardware(
        "rtx-pro-6000", "NVIDIA RTX PRO 6000 Blackwell", "blackwell-workstation", (12, 0), 97_887, 1_792, 500,
        _BLACKWELL, _AMD64, "pcie",
        frozenset({
            "RTX-PRO-6000-Blackwell-Server-Edition",
            "RTX-PRO-6000-Blackwell-Workstation-Edition",
            "RTX-PRO-6000-Blackwell-Max-Q-Workstation-Edition",
        }),
        unverified="memory",
    ),
    Hardware(
        "gb10", "NVIDIA GB10", "blackwell-workstation", (12, 1), 122_880, 273, 125, _BLACKWELL, _ARM64,
        "nvlink-c2c", frozenset({"GB10"}), unverified="memory (the driver reports none)",
    ),
)  # fmt: skip

BY_NAME: dict[str, Hardware] = {row.name: row for row in (*HARDWARE, GENERIC)}


def normalise_product(product: str) -> str:
    """The product name without what a label adds: `NVIDIA-H100-80GB-HBM3-SHARED` -> `H100-80GB-HBM3`.

    Accepts the driver's spelling with spaces and the label's with dashes. Case stays: labels keep it.
    """
    name = product.strip().replace(" ", "-").removeprefix("NVIDIA-").removesuffix("-SHARED")
    return name.split("-MIG-", 1)[0]


def identify_gpu(product: str = "", compute_capability: ComputeCapability | None = None, memory_mib: int = 0) -> Match:
    """Find a GPU's row: exact product, then compute capability and the nearest memory, then the generic row."""
    name = normalise_product(product)
    for row in HARDWARE:
        if name in row.products:
            return Match(row, "product", f"product {name}")
    if compute_capability is None:
        return Match(GENERIC, "generic", f"product {name or 'unknown'} is not in the hardware table")
    major, minor = compute_capability
    same = [row for row in HARDWARE if row.compute_capability == compute_capability]
    if not same:
        return Match(GENERIC, "generic", f"compute capability {major}.{minor} is not in the hardware table")
    row = min(same, key=lambda each: abs(each.memory_mib - memory_mib)) if memory_mib else same[0]
    return Match(
        row, "compute-capability",
        f"product {name or 'unknown'} is not in the hardware table; compute capability {major}.{minor}"
        + (f" and {memory_mib} MiB" if memory_mib else ""),
    )  # fmt: skip
