"""Random weights for measurements without a checkpoint: drawn on the model's own device, whole parameters at a time.

What a step costs hardly depends on the weights' values, as long as activations stay finite and a mixture of experts
spreads its tokens: both hold for the usual initialisation, and neither for zeros.
"""

import hashlib
from typing import Final

import torch
from torch import nn

INITIALIZER_RANGE: Final = 0.02


def fill_dummy_parameters(model: nn.Module, dtype: torch.dtype, device: torch.device, seed: int) -> None:
    """Give each of the model's meta parameters memory of `dtype` on `device` and random values; others stay.

    Matrices are N(0, 0.02), weights of norms 1, all other vectors 0. Equal seeds give equal values on one type of
    device, whatever the order of the parameters.
    """
    for path, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                values = torch.empty(parameter.shape, dtype=dtype, device=device)
                draw(values, f"{path}.{name}", seed)
                module.register_parameter(name, nn.Parameter(values, requires_grad=False))


def draw(values: torch.Tensor, name: str, seed: int) -> None:
    """Fill a tensor in place with what a parameter of this name starts with; the generator is the tensor's device's."""
    if values.dim() > 1:
        values.normal_(0.0, INITIALIZER_RANGE, generator=generator_for(name, seed, values.device))
    else:
        values.fill_(vector_value(name))


def vector_value(name: str) -> float:
    """What a parameter that is a vector starts with: weights of norms with 1, biases and whatever else with 0."""
    return 1.0 if name.endswith("weight") else 0.0


def generator_for(name: str, seed: int, device: torch.device) -> torch.Generator:
    """A stream of random numbers for one parameter, independent of every other's."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
