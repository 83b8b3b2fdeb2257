"""The hardware table: one row per device type, read by the operator (to plan) and by the kernels (to launch).

Standard library only. A device is recognised by its normalised product name, then by numeric compute capability, then
by memory: never by substring ("GH200" contains "H200"), never by comparing versions as text ("10.0" < "9.0"), never by
node memory. Rates are the vendor's dense ones, without sparsity; `source` says where a row's numbers come from,
`measured` what was measured on a real device, and `unverified` what nobody has checked on a real node. What a slice or
a share of a device has is in `slices.py`.
"""

from collections.abc import Sequence
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
    bf16_tflops, fp8_tflops, fp4_tflops: matrix rates; 0 where the device does not compute in that type
    l2_mib, num_sms:       level-2 cache and streaming multiprocessors
    host_link_gbps:        GB/s in one direction between host memory and one device
    products:              normalised product names (see `normalise_product`) that mean this row
    cpu_architectures:     CPU architectures of the nodes it comes in
    kernel_variant:        which set of tuned kernels it runs
    num_slices:            compute slices that MIG divides it into; 0 for a device without MIG
    """

    name: str
    title: str
    kernel_variant: str
    compute_capability: ComputeCapability | None
    memory_mib: int
    memory_bandwidth_gbps: float
    bf16_tflops: float
    fp8_tflops: float
    fp4_tflops: float
    l2_mib: float
    num_sms: int
    dtypes: frozenset[str]
    cpu_architectures: frozenset[CpuArchitecture]
    host_link: HostLink
    host_link_gbps: float
    products: frozenset[str]
    source: str
    num_slices: int = 0
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
    "cpu", "CPU", "cpu", None,
    memory_mib=0, memory_bandwidth_gbps=20.0, bf16_tflops=0.15, fp8_tflops=0, fp4_tflops=0, l2_mib=0, num_sms=0,
    dtypes=frozenset({"float32", "int8"}), cpu_architectures=_ANY, host_link="memory", host_link_gbps=20.0,
    products=frozenset(), source="measurement: rates of CPUs differ, and the table has one row for all",
    measured="20 GB/s read and 0.15 TFLOP/s in float32 on 2 cores of an AMD EPYC (Zen 3)",
)  # fmt: skip

GENERIC = Hardware(
    "generic", "unknown GPU", "generic", (8, 0),
    memory_mib=16_384, memory_bandwidth_gbps=300, bf16_tflops=30, fp8_tflops=0, fp4_tflops=0, l2_mib=4, num_sms=40,
    dtypes=_AMPERE, cpu_architectures=_ANY, host_link="pcie", host_link_gbps=16, products=frozenset(),
    source="a floor below every GPU of compute capability 8.0 and above that serves models",
    unverified="everything",
)  # fmt: skip

HARDWARE: tuple[Hardware, ...] = (
    CPU,
    Hardware(
        "l4", "NVIDIA L4", "ada", (8, 9),
        memory_mib=23_034, memory_bandwidth_gbps=300, bf16_tflops=121, fp8_tflops=242, fp4_tflops=0,
        l2_mib=48, num_sms=58, dtypes=_HOPPER, cpu_architectures=_AMD64, host_link="pcie", host_link_gbps=32,
        products=frozenset({"L4"}), source="NVIDIA L4 data sheet; Ada architecture paper",
    ),
    Hardware(
        "l40s", "NVIDIA L40S", "ada", (8, 9),
        memory_mib=46_068, memory_bandwidth_gbps=864, bf16_tflops=362, fp8_tflops=733, fp4_tflops=0,
        l2_mib=96, num_sms=142, dtypes=_HOPPER, cpu_architectures=_AMD64, host_link="pcie", host_link_gbps=32,
        products=frozenset({"L40S"}), source="NVIDIA L40S data sheet; Ada architecture paper",
    ),
    Hardware(
        "a100-40gb", "NVIDIA A100 40 GB SXM", "ampere", (8, 0),
        memory_mib=40_960, memory_bandwidth_gbps=1_555, bf16_tflops=312, fp8_tflops=0, fp4_tflops=0,
        l2_mib=40, num_sms=108, dtypes=_AMPERE, cpu_architectures=_AMD64, host_link="pcie", host_link_gbps=32,
        products=frozenset({"A100-SXM4-40GB"}), source="NVIDIA A100 data sheet; Ampere architecture paper",
        num_slices=7,
    ),
    Hardware(
        "a100-40gb-pcie", "NVIDIA A100 40 GB PCIe", "ampere", (8, 0),
        memory_mib=40_960, memory_bandwidth_gbps=1_555, bf16_tflops=312, fp8_tflops=0, fp4_tflops=0,
        l2_mib=40, num_sms=108, dtypes=_AMPERE, cpu_architectures=_AMD64, host_link="pcie", host_link_gbps=32,
        products=frozenset({"A100-PCIE-40GB"}), source="NVIDIA A100 data sheet; Ampere architecture paper",
        num_slices=7, unverified="product label",
    ),
    Hardware(
        "a100-80gb", "NVIDIA A100 80 GB SXM", "ampere", (8, 0),
        memory_mib=81_920, memory_bandwidth_gbps=2_039, bf16_tflops=312, fp8_tflops=0, fp4_tflops=0,
        l2_mib=40, num_sms=108, dtypes=_AMPERE, cpu_architectures=_AMD64, host_link="pcie", host_link_gbps=32,
        products=frozenset({"A100-SXM4-80GB"}), source="NVIDIA A100 data sheet; Ampere architecture paper",
        num_slices=7,
    ),
    Hardware(
        "a100-80gb-pcie", "NVIDIA A100 80 GB PCIe", "ampere", (8, 0),
        memory_mib=81_920, memory_bandwidth_gbps=1_935, bf16_tflops=312, fp8_tflops=0, fp4_tflops=0,
        l2_mib=40, num_sms=108, dtypes=_AMPERE, cpu_architectures=_AMD64, host_link="pcie", host_link_gbps=32,
        products=frozenset({"A100-80GB-PCIe"}), source="NVIDIA A100 data sheet; Ampere architecture paper",
        num_slices=7,
    ),
    Hardware(
        "h100", "NVIDIA H100 SXM", "hopper", (9, 0),
        memory_mib=81_559, memory_bandwidth_gbps=3_350, bf16_tflops=989, fp8_tflops=1_979, fp4_tflops=0,
        l2_mib=50, num_sms=132, dtypes=_HOPPER, cpu_architectures=_AMD64, host_link="pcie", host_link_gbps=64,
        products=frozenset({"H100-80GB-HBM3"}), source="NVIDIA H100 data sheet; Hopper architecture paper",
        num_slices=7, measured="3,000 GB/s copied, 771 TFLOP/s bf16",
    ),
    Hardware(
        "h100-pcie", "NVIDIA H100 PCIe", "hopper", (9, 0),
        memory_mib=81_559, memory_bandwidth_gbps=2_039, bf16_tflops=756, fp8_tflops=1_513, fp4_tflops=0,
        l2_mib=50, num_sms=114, dtypes=_HOPPER, cpu_architectures=_AMD64, host_link="pcie", host_link_gbps=64,
        products=frozenset({"H100-PCIe"}), source="NVIDIA H100 data sheet; Hopper architecture paper",
        num_slices=7, unverified="product label",
    ),
    Hardware(
        "h100-nvl", "NVIDIA H100 NVL", "hopper", (9, 0),
        memory_mib=95_830, memory_bandwidth_gbps=3_938, bf16_tflops=835, fp8_tflops=1_671, fp4_tflops=0,
        l2_mib=50, num_sms=132, dtypes=_HOPPER, cpu_architectures=_AMD64, host_link="pcie", host_link_gbps=64,
        products=frozenset({"H100-NVL"}), source="NVIDIA H100 NVL data sheet",
        num_slices=7, unverified="product label, memory",
    ),
    Hardware(
        "h200", "NVIDIA H200", "hopper", (9, 0),
        memory_mib=143_771, memory_bandwidth_gbps=4_800, bf16_tflops=989, fp8_tflops=1_979, fp4_tflops=0,
        l2_mib=50, num_sms=132, dtypes=_HOPPER, cpu_architectures=_AMD64, host_link="pcie", host_link_gbps=64,
        products=frozenset({"H200"}), source="NVIDIA H200 data sheet",
        num_slices=7, measured="4,300 GB/s copied",
    ),
    Hardware(
        "h200-nvl", "NVIDIA H200 NVL", "hopper", (9, 0),
        memory_mib=143_771, memory_bandwidth_gbps=4_800, bf16_tflops=836, fp8_tflops=1_671, fp4_tflops=0,
        l2_mib=50, num_sms=132, dtypes=_HOPPER, cpu_architectures=_AMD64, host_link="pcie", host_link_gbps=64,
        products=frozenset({"H200-NVL"}), source="NVIDIA H200 data sheet",
        num_slices=7, unverified="memory",
    ),
    # The 480 GB of the product's name are the Grace CPU's LPDDR; the GPU has 96 GB of HBM3.
    Hardware(
        "gh200-96gb", "NVIDIA GH200 96 GB", "grace-hopper", (9, 0),
        memory_mib=97_871, memory_bandwidth_gbps=4_000, bf16_tflops=989, fp8_tflops=1_979, fp4_tflops=0,
        l2_mib=50, num_sms=132, dtypes=_HOPPER, cpu_architectures=_ARM64, host_link="nvlink-c2c", host_link_gbps=450,
        products=frozenset({"GH200-480GB"}), source="NVIDIA GH200 data sheet; others measured 375 GB/s to the device",
        num_slices=7, unverified="host link",
    ),
    Hardware(
        "gh200-144gb", "NVIDIA GH200 144 GB", "grace-hopper", (9, 0),
        memory_mib=146_831, memory_bandwidth_gbps=4_900, bf16_tflops=989, fp8_tflops=1_979, fp4_tflops=0,
        l2_mib=50, num_sms=132, dtypes=_HOPPER, cpu_architectures=_ARM64, host_link="nvlink-c2c", host_link_gbps=450,
        products=frozenset({"GH200-144G-HBM3e"}), source="NVIDIA GH200 data sheet",
        num_slices=7, unverified="product label, host link",
    ),
    Hardware(
        "b200", "NVIDIA B200", "blackwell", (10, 0),
        memory_mib=183_359, memory_bandwidth_gbps=8_000, bf16_tflops=2_250, fp8_tflops=4_500, fp4_tflops=9_000,
        l2_mib=126, num_sms=148, dtypes=_BLACKWELL, cpu_architectures=_AMD64, host_link="pcie", host_link_gbps=64,
        products=frozenset({"B200"}), source="NVIDIA HGX B200 data sheet",
        num_slices=7, unverified="product label, L2",
    ),
    # One Grace CPU and its NVLink-C2C serve two of these GPUs.
    Hardware(
        "gb200", "NVIDIA GB200", "blackwell", (10, 0),
        memory_mib=189_471, memory_bandwidth_gbps=8_000, bf16_tflops=2_500, fp8_tflops=5_000, fp4_tflops=10_000,
        l2_mib=126, num_sms=148, dtypes=_BLACKWELL, cpu_architectures=_ARM64, host_link="nvlink-c2c",
        host_link_gbps=225, products=frozenset({"GB200"}), source="NVIDIA GB200 NVL72 data sheet",
        num_slices=7, unverified="L2, multiprocessors, host link",
    ),
    Hardware(
        "b300", "NVIDIA B300", "blackwell", (10, 3),
        memory_mib=275_040, memory_bandwidth_gbps=8_000, bf16_tflops=2_250, fp8_tflops=4_500, fp4_tflops=13_100,
        l2_mib=126, num_sms=148, dtypes=_BLACKWELL, cpu_architectures=_AMD64, host_link="pcie", host_link_gbps=128,
        products=frozenset({"B300-SXM6-AC"}), source="NVIDIA HGX B300 data sheet",
        num_slices=7, unverified="compute capability, L2, multiprocessors, host link",
    ),
    Hardware(
        "gb300", "NVIDIA GB300", "blackwell", (10, 3),
        memory_mib=275_040, memory_bandwidth_gbps=8_000, bf16_tflops=2_500, fp8_tflops=5_000, fp4_tflops=15_000,
        l2_mib=126, num_sms=148, dtypes=_BLACKWELL, cpu_architectures=_ARM64, host_link="nvlink-c2c",
        host_link_gbps=225, products=frozenset({"GB300"}), source="NVIDIA GB300 NVL72 data sheet",
        num_slices=7, unverified="product label, memory, compute capability, L2, multiprocessors, host link",
    ),
    Hardware(
        "rtx-pro-6000", "NVIDIA RTX PRO 6000 Blackwell Server", "blackwell-workstation", (12, 0),
        memory_mib=97_887, memory_bandwidth_gbps=1_597, bf16_tflops=500, fp8_tflops=1_000, fp4_tflops=2_000,
        l2_mib=128, num_sms=188, dtypes=_BLACKWELL, cpu_architectures=_AMD64, host_link="pcie", host_link_gbps=64,
        products=frozenset({"RTX-PRO-6000-Blackwell-Server-Edition"}),
        source="NVIDIA RTX PRO 6000 Blackwell Server Edition data sheet", num_slices=4, unverified="memory, bandwidth",
    ),
    Hardware(
        "rtx-pro-6000-workstation", "NVIDIA RTX PRO 6000 Blackwell Workstation", "blackwell-workstation", (12, 0),
        memory_mib=97_887, memory_bandwidth_gbps=1_792, bf16_tflops=500, fp8_tflops=1_000, fp4_tflops=2_000,
        l2_mib=128, num_sms=188, dtypes=_BLACKWELL, cpu_architectures=_AMD64, host_link="pcie", host_link_gbps=64,
        products=frozenset({"RTX-PRO-6000-Blackwell-Workstation-Edition"}),
        source="NVIDIA RTX PRO 6000 Blackwell data sheet", num_slices=4, unverified="product label, memory",
    ),
    Hardware(
        "rtx-pro-6000-max-q", "NVIDIA RTX PRO 6000 Blackwell Max-Q", "blackwell-workstation", (12, 0),
        memory_mib=97_887, memory_bandwidth_gbps=1_792, bf16_tflops=439, fp8_tflops=878, fp4_tflops=1_755,
        l2_mib=128, num_sms=188, dtypes=_BLACKWELL, cpu_architectures=_AMD64, host_link="pcie", host_link_gbps=64,
        products=frozenset({"RTX-PRO-6000-Blackwell-Max-Q-Workstation-Edition"}),
        source="NVIDIA RTX PRO 6000 Blackwell Max-Q data sheet", num_slices=4, unverified="memory",
    ),
    # CPU and GPU share one LPDDR5X memory, of which the driver reports no size.
    Hardware(
        "gb10", "NVIDIA GB10", "blackwell-workstation", (12, 1),
        memory_mib=122_880, memory_bandwidth_gbps=273, bf16_tflops=125, fp8_tflops=250, fp4_tflops=500,
        l2_mib=24, num_sms=48, dtypes=_BLACKWELL, cpu_architectures=_ARM64, host_link="nvlink-c2c",
        host_link_gbps=273, products=frozenset({"GB10"}), source="NVIDIA DGX Spark data sheet",
        unverified="memory, rates, host link",
    ),
)  # fmt: skip

BY_NAME: dict[str, Hardware] = {row.name: row for row in (*HARDWARE, GENERIC)}
KERNEL_VARIANTS: tuple[str, ...] = tuple(sorted({row.kernel_variant for row in BY_NAME.values()}))


def min_capability(kernel_variant: str) -> ComputeCapability | None:
    """The least compute capability that a set of kernels is made for; None for the CPU's."""
    made_for = (row.compute_capability for row in BY_NAME.values() if row.kernel_variant == kernel_variant)
    return min((each for each in made_for if each is not None), default=None)


def normalise_product(product: str) -> str:
    """The product name without what a label adds: `NVIDIA-H100-80GB-HBM3-SHARED` -> `H100-80GB-HBM3`.

    Accepts the driver's spelling with spaces and the label's with dashes. Case stays: labels keep it.
    """
    name = product.strip().replace(" ", "-").removeprefix("NVIDIA-").removesuffix("-SHARED")
    return name.split("-MIG-", 1)[0]


def identify_gpu(
    product: str = "",
    compute_capability: ComputeCapability | None = None,
    memory_mib: int = 0,
    cpu_architecture: str = "",
    table: Sequence[Hardware] = HARDWARE,
) -> Match:
    """Find a GPU's row: exact product, then compute capability and the nearest memory, then the generic row.

    cpu_architecture: of its node, where it is known; among rows of the compute capability those that come with it
    table:            the rows to look in, where a cluster has rows of its own
    """
    name = normalise_product(product)
    for row in table:
        if name in row.products:
            return Match(row, "product", f"product {name}")
    unknown = f"product {name or 'unknown'} is not in the hardware table"
    if compute_capability is None:
        return Match(GENERIC, "generic", unknown)
    major, minor = compute_capability
    same = [row for row in table if row.compute_capability == compute_capability]
    if not same:
        return Match(GENERIC, "generic", f"compute capability {major}.{minor} is not in the hardware table")
    same = [row for row in same if cpu_architecture in row.cpu_architectures] or same
    row = min(same, key=lambda each: abs(each.memory_mib - memory_mib)) if memory_mib else same[0]
    memory = f" and {memory_mib} MiB" if memory_mib else ""
    return Match(row, "compute-capability", f"{unknown}; compute capability {major}.{minor}{memory}")
