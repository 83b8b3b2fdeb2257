"""Small arrays on their way from the host to a device."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, Final

import numpy as np
import torch

Array = np.ndarray[Any, np.dtype[Any]]

# Of what is uploaded together: kernels are compiled for addresses that are multiples of 16 bytes.
_ALIGNED_INTEGERS: Final = 2


def upload(values: Array, device: torch.device) -> torch.Tensor:
    """A copy of `values` on the device. The host does not wait for what the device has yet to do.

    Torch keeps the page-locked memory that the copy reads until the device has read it.
    """
    host = torch.from_numpy(values)
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def upload_together(values: Mapping[str, Sequence[int] | Array], device: torch.device) -> dict[str, torch.Tensor]:
    """`upload` of several rows of int64 by one copy, which takes a host and a device no longer than one row does."""
    sizes = [-(-len(each) // _ALIGNED_INTEGERS) * _ALIGNED_INTEGERS for each in values.values()]
    host = np.zeros(sum(sizes), np.int64)
    starts = list(accumulate(sizes, initial=0))
    for each, start in zip(values.values(), starts, strict=False):
        host[start : start + len(each)] = each
    uploaded = upload(host, device)
    return {
        name: uploaded[start : start + len(each)] for (name, each), start in zip(values.items(), starts, strict=False)
    }
