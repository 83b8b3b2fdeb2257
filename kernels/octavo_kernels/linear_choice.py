"""Which implementation of a linear layer is fastest for a weight and a number of tokens, as measured for each GPU.

One JSON file per GPU lies in `linear_choices/`, written by `octavo kernels tune` and named by the row of the
hardware table. cuBLAS serves whatever was not measured: an unknown GPU, another shape, more tokens.
"""

import functools
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from octavo_kernels.hardware import identify_gpu
from octavo_kernels.ops import cublaslt_linear, gemv, small_m_linear, wgmma_linear

logger = logging.getLogger(__name__)

DIRECTORY = Path(__file__).with_name("linear_choices")
Launch = cublaslt_linear.Launch | gemv.Launch | small_m_linear.Launch | wgmma_linear.Launch
_LAUNCHES: Mapping[str, type[Any]] = {
    "cublaslt": cublaslt_linear.Launch,
    "gemv": gemv.Launch,
    "small_m_linear": small_m_linear.Launch,
    "wgmma_linear": wgmma_linear.Launch,
}


@dataclass(frozen=True, slots=True)
class LinearShape:
    """A weight of 16-bit floats. is_gated: silu(gate) * up of its two halves is wanted, not both."""

    out_features: int
    in_features: int
    is_gated: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """The winner for a weight and a number of tokens.

    launch: None is cuBLAS by its own choice; cublas_us: what it won against, in microseconds, as `us`
    """

    shape: LinearShape
    num_tokens: int
    launch: Launch | None
    us: float
    cublas_us: float


# By number of tokens, from 0 to the largest measured.
Launches = tuple[Launch | None, ...]
LinearChoices = Mapping[LinearShape, Launches]


def by_num_tokens(choices: Iterable[Choice]) -> LinearChoices:
    """For each weight the launch of each number of tokens: that of the next larger one which was measured."""
    measured: dict[LinearShape, dict[int, Launch | None]] = {}
    for choice in choices:
        measured.setdefault(choice.shape, {})[choice.num_tokens] = choice.launch
    return {shape: _fill(launches) for shape, launches in measured.items()}


def _fill(measured: Mapping[int, Launch | None]) -> Launches:
    filled: list[Launch | None] = [None]
    for before, num_tokens in pairwise([0, *sorted(measured)]):
        filled += [measured[num_tokens]] * (num_tokens - before)
    return tuple(filled)


def write_choices(path: Path, choices: Iterable[Choice], measured: Mapping[str, str]) -> None:
    """Write a GPU's file. measured: where the numbers come from (GPU, versions, date)."""
    rows = ",\n  ".join(json.dumps(_to_json(choice)) for choice in choices)
    path.write_text(f'{{"measured": {json.dumps(dict(measured))},\n "choices": [\n  {rows}\n]}}\n')


def read_choices(path: Path) -> list[Choice]:
    """What `write_choices` wrote. Raises ValueError if the file holds something else."""
    try:
        return [_from_json(row) for row in json.loads(path.read_text())["choices"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a table of linear layers: {error!r}") from error


def _to_json(choice: Choice) -> dict[str, Any]:
    kernel = _kernel_of(choice.launch)
    launch = asdict(choice.launch) if choice.launch is not None else {}
    numbers = {"num_tokens": choice.num_tokens, "us": choice.us, "cublas_us": choice.cublas_us}
    return asdict(choice.shape) | numbers | {"kernel": kernel} | launch


def _from_json(row: dict[str, Any]) -> Choice:
    fields = dict(row)
    shape = LinearShape(fields.pop("out_features"), fields.pop("in_features"), fields.pop("is_gated"))
    num_tokens, us, cublas_us = (fields.pop(name) for name in ("num_tokens", "us", "cublas_us"))
    return Choice(shape, num_tokens, _launch_of(fields.pop("kernel"), fields), us, cublas_us)


def _kernel_of(launch: Launch | None) -> str:
    return next((name for name, kind in _LAUNCHES.items() if isinstance(launch, kind)), "cublas")


def _launch_of(kernel: str, fields: dict[str, Any]) -> Launch | None:
    return None if kernel == "cublas" else _LAUNCHES[kernel](**fields)


@functools.cache
def choices_for(device: torch.device) -> LinearChoices:
    """The choices measured on a GPU of this product; none for a device that is not in the hardware table by name."""
    if device.type != "cuda":
        return {}
    product = torch.cuda.get_device_properties(device).name
    match = identify_gpu(product)
    path = DIRECTORY / f"{match.hardware.name}.json"
    if match.how != "product" or not path.exists():
        logger.info("linear layers on %s (%s) all run on cuBLAS: no choices were measured for it", device, product)
        return {}
    choices = by_num_tokens(map(_understood, read_choices(path)))
    logger.info("linear layers on %s follow %s, %d shapes", device, path.name, len(choices))
    return choices


def _understood(choice: Choice) -> Choice:
    """cuBLAS by its own choice instead of an algorithm of another version."""
    launch = choice.launch
    if isinstance(launch, cublaslt_linear.Launch) and launch.version != cublaslt_linear.version():
        return replace(choice, launch=None)
    return choice
