"""Small arrays on their way from the host to a device."""

from typing import Any

import numpy as np
import torch

Array = np.ndarray[Any, np.dtype[Any]]


def upload(values: Array, device: torch.device) -> torch.Tensor:
    """A copy of `values` on the device. The host does not wait for what the device has yet to do.

    Torch keeps the page-locked memory that the copy reads until the device has read it.
    """
    host = torch.from_numpy(values)
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)
