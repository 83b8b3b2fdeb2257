"""Where Triton keeps machine code: a folder that may outlive a process and serve several nodes, such as a volume."""

import logging
from pathlib import Path

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
