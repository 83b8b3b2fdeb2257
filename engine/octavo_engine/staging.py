"""Small arrays on their way from the host to a device."""

from collections.abc import Mapping
from itertools import accumulate
from typing import Any, Final

import numpy as np
import torch

Array = np.ndarray[Any, np.dtype[Any]]

# Of what is uploaded together: kernels are compiled for addresses that are multiples of it.
_ALIGNMENT_BYTES: Final = 16


def upload(values: Array, device: torch.device) -> torch.Tensor:
    """A copy of `values` on the device. The host does not wait for what the device has yet to do.

    Torch keeps the page-locked memory that the copy reads until the device has read it.
    """
    host = torch.from_numpy(values)
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def upload_together(arrays: Mapping[str, Array], device: torch.device) -> dict[str, torch.Tensor]:
    """`upload` of several rows by one copy, which takes a host and a device no longer than one row does."""
    sizes = [-(-array.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES for array in arrays.values()]
    starts = list(accumulate(sizes, initial=0))
    host = np.zeros(starts[-1], np.uint8)
    for array, start in zip(arrays.values(), starts, strict=False):
        host[start : start + array.nbytes] = array.view(np.uint8)
    uploaded = upload(host, device)
    return {
        name: uploaded[start : start + array.nbytes].view(torch.from_numpy(array).dtype)
        for (name, array), start in zip(arrays.items(), starts, strict=False)
    }
