"""Where machine code is kept: Triton's folder, which may outlive a process and serve several nodes, such as a volume.

What is not there is compiled when it is first launched, which takes as long as many steps: an engine wants to know.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import triton

from octavo_kernels.hardware import ComputeCapability

logger = logging.getLogger(__name__)


def use_kernel_cache(folder: Path, octavo_version: str, capability: ComputeCapability) -> Path:
    """Have Triton read and write compiled kernels below `folder` from now on; returns the folder that it uses.

    What was compiled by another Octavo, by another Triton or for another GPU lies beside it, so that old versions can
    be deleted as a whole. Sets TRITON_CACHE_DIR, too, for this process and its children.
    Raises OSError if the folder cannot be made.
    """
    major, minor = capability
    path = folder.expanduser() / f"octavo-{octavo_version}" / f"triton-{triton.__version__}" / f"sm-{major}{minor}"
    path.mkdir(parents=True, exist_ok=True)
    triton.knobs.cache.dir = str(path)
    logger.info("compiled kernels are kept in %s, which holds %d", path, sum(1 for each in path.iterdir()))
    return path


def kernel_folder() -> Path:
    """The folder that `use_kernel_cache` chose, or Triton's own."""
    return Path(triton.knobs.cache.dir)


_reports: list[Callable[[str, float], None]] = []


def report_compilations(report: Callable[[str, float], None]) -> None:
    """Call `report` with the name and the seconds of each kernel that this process compiles from now on."""
    _reports[:] = [report]

    def on_compiled(*, src: Any, times: Any, cache_hit: bool, **_: object) -> None:
        if not cache_hit:
            tell_of_compilation(str(src.name), times.total / 1e6)

    triton.knobs.compilation.listener = on_compiled


def tell_of_compilation(name: str, seconds: float) -> None:
    """Tell whoever asked with `report_compilations`."""
    for report in _reports:
        report(name, seconds)
