"""What a part of a GPU has: a MIG slice by its profile, a time-sliced share by the number of sharers. Standard library.

A profile such as `1g.10gb` names compute slices (of the `num_slices` that the device is divided into) and memory. MIG
divides memory, its bandwidth and the level-2 cache into eighths (into quarters where there are four compute slices), of
which a profile has as many as its memory asks for.
Source: MIG user guide, supported profiles (https://docs.nvidia.com/datacenter/tesla/mig-user-guide/)
"""

import re
from dataclasses import dataclass, replace

from octavo_kernels.hardware import Hardware

_PROFILE = re.compile(r"(?P<slices>\d)g\.(?P<memory>\d+)gb(?P<media>[+.](me|gfx)(\.all)?)?")


@dataclass(frozen=True, slots=True)
class MigProfile:
    """A MIG profile: compute slices and memory, as its name says them; its `gb` are GiB, rounded."""

    name: str
    num_slices: int
    memory_gib: int


def parse_mig_profile(name: str) -> MigProfile | None:
    """`1g.10gb` (in resource names `1g.10gb.me` stands for `1g.10gb+me`); None if it is no profile."""
    found = _PROFILE.fullmatch(name)
    return MigProfile(name, int(found["slices"]), int(found["memory"])) if found else None


def profile_of(product: str) -> str:
    """The profile in the product name of a slice, in the driver's spelling or the label's; empty for a whole GPU."""
    return product.replace(" ", "-").partition("-MIG-")[2].removesuffix("-SHARED")


def mig_slice(row: Hardware, profile: MigProfile, memory_mib: int = 0) -> Hardware:
    """The row of one slice of `row`.

    memory_mib: as a label states it; 0 takes the profile's share of the device
    Raises ValueError if the device has no such slice.
    """
    if not 0 < profile.num_slices <= row.num_slices:
        raise ValueError(f"{row.title} has no MIG profile {profile.name}")
    num_parts = 4 if row.num_slices == 4 else 8
    part_mib = row.memory_mib / num_parts
    # A name rounds, and a slice has a little less than its parts of the device: the nearest number of parts is meant.
    num_memory_parts = min(num_parts, max(1, round((memory_mib or profile.memory_gib * 1024) / part_mib)))
    memory_share = num_memory_parts / num_parts
    compute_share = profile.num_slices / row.num_slices
    return replace(
        row,
        title=f"{row.title} MIG {profile.name}",
        memory_mib=memory_mib or int(row.memory_mib * memory_share),
        memory_bandwidth_gbps=row.memory_bandwidth_gbps * memory_share,
        l2_mib=row.l2_mib * memory_share,
        num_sms=row.num_sms * profile.num_slices // row.num_slices,
        bf16_tflops=row.bf16_tflops * compute_share,
        fp8_tflops=row.fp8_tflops * compute_share,
        fp4_tflops=row.fp4_tflops * compute_share,
        num_slices=0,
    )


def time_share(row: Hardware, num_sharers: int) -> Hardware:
    """The row of one of `num_sharers` pods that take turns on the device, while all of them are busy.

    Nothing but agreement divides the memory, so that each may count on its part and no more.
    """
    return replace(
        row,
        title=f"{row.title}, one of {num_sharers} shares",
        memory_mib=row.memory_mib // num_sharers,
        memory_bandwidth_gbps=row.memory_bandwidth_gbps / num_sharers,
        host_link_gbps=row.host_link_gbps / num_sharers,
        bf16_tflops=row.bf16_tflops / num_sharers,
        fp8_tflops=row.fp8_tflops / num_sharers,
        fp4_tflops=row.fp4_tflops / num_sharers,
    )
