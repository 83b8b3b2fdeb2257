"""Which implementation of a linear layer is fastest for a weight and a number of tokens, as measured for each GPU.

One JSON file per GPU lies in `linear_choices/`, written by `octavo kernels tune` and named by the row of the
hardware table. A weight of another shape, or a GPU of the same chip, follows the nearest that was measured, as far as
Octavo's own kernels won there. cuBLAS serves the rest: another chip, a shape far from all, more tokens.
"""

import functools
import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import torch

from octavo_kernels.hardware import HARDWARE, Hardware, identify_gpu
from octavo_kernels.ops import cublaslt_linear, gemv, small_m_linear, wgmma_linear
from octavo_kernels.slices import profile_of

logger = logging.getLogger(__name__)

DIRECTORY = Path(__file__).with_name("linear_choices")
Launch = cublaslt_linear.Launch | gemv.Launch | small_m_linear.Launch | wgmma_linear.Launch
_LAUNCHES: Mapping[str, type[Any]] = {
    "cublaslt": cublaslt_linear.Launch,
    "gemv": gemv.Launch,
    "small_m_linear": small_m_linear.Launch,
    "wgmma_linear": wgmma_linear.Launch,
}
# A weight is near another one if neither of its sides is longer or shorter by more than this factor.
_NEAR: Final = 2.0
# Of elements of a row: Triton loads 16 bytes at a time where it sees a stride that is a multiple of 16, else 2.
_TRITON_MULTIPLE: Final = 16


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


def launches_for(choices: LinearChoices, shape: LinearShape) -> Launches:
    """What was measured for a weight or, of Octavo's own kernels, for the nearest one; nothing if that is not near."""
    if shape in choices:
        return choices[shape]
    near = [each for each in choices if each.is_gated == shape.is_gated and _distance(each, shape) <= math.log(_NEAR)]
    if not near:
        return ()
    nearest = choices[min(near, key=functools.partial(_distance, shape))]
    return tuple(launch if _suits(launch, shape) else None for launch in nearest)


def _distance(one: LinearShape, other: LinearShape) -> float:
    sides = (one.out_features / other.out_features, one.in_features / other.in_features)
    return max(abs(math.log(ratio)) for ratio in sides)


def _suits(launch: Launch | None, shape: LinearShape) -> bool:
    """Whether a launch that was measured for another weight does for this one. An algorithm of cuBLASLt never does."""
    if isinstance(launch, wgmma_linear.Launch):
        return wgmma_linear.takes(shape.out_features, shape.in_features, is_gated=shape.is_gated)
    return isinstance(launch, gemv.Launch | small_m_linear.Launch) and shape.in_features % _TRITON_MULTIPLE == 0


def write_choices(path: Path, choices: Iterable[Choice], measured: Sequence[Mapping[str, str]]) -> None:
    """Write a GPU's file. measured: where the numbers come from, each run's GPU, versions and date."""
    rows = ",\n  ".join(json.dumps(_to_json(choice)) for choice in choices)
    path.write_text(f'{{"measured": {json.dumps([dict(each) for each in measured])},\n "choices": [\n  {rows}\n]}}\n')


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
    """The choices for a GPU's product; none for a device that is not in the hardware table by name."""
    return shipped_choices(torch.cuda.get_device_properties(device).name) if device.type == "cuda" else {}


def shipped_choices(product: str) -> LinearChoices:
    """What was measured on a product or, of Octavo's own kernels, on the nearest one with its chip; else nothing.

    A slice of a GPU has other multiprocessors and another bandwidth, so nothing that was measured on the whole.
    """
    match = identify_gpu(product)
    is_known = match.how == "product" and not profile_of(product)
    measured_on = _measured_like(match.hardware) if is_known else None
    if measured_on is None:
        logger.info("linear layers on %s all run on cuBLAS: no choices were measured for it", product)
        return {}
    choices = read_choices(DIRECTORY / f"{measured_on}.json")
    if measured_on == match.hardware.name:
        by_shape = by_num_tokens(map(understood, choices))
    else:
        by_shape = by_num_tokens(
            choice if _suits(choice.launch, choice.shape) else replace(choice, launch=None) for choice in choices
        )
    logger.info("linear layers on %s follow what was measured on %s, %d shapes", product, measured_on, len(by_shape))
    return by_shape


def shipped_launches(variant: str) -> Iterator[tuple[LinearShape, int, Launch]]:
    """What a variant's GPUs launch for each weight that was measured and each number of tokens; some come twice."""
    for measured_on in {_measured_like(row) for row in HARDWARE if row.kernel_variant == variant} - {None}:
        for shape, launches in by_num_tokens(read_choices(DIRECTORY / f"{measured_on}.json")).items():
            yield from ((shape, num_tokens, launch) for num_tokens, launch in enumerate(launches) if launch)


def _measured_like(hardware: Hardware) -> str | None:
    """The name of the row with measured choices, the chip's instructions and size, and the nearest bandwidth."""
    measured = [row for row in HARDWARE if _chip(row) == _chip(hardware) and (DIRECTORY / f"{row.name}.json").exists()]
    bandwidth = hardware.memory_bandwidth_gbps
    nearest = min(measured, key=lambda row: abs(row.memory_bandwidth_gbps - bandwidth), default=None)
    return None if nearest is None else nearest.name


def _chip(hardware: Hardware) -> tuple[object, ...]:
    return hardware.compute_capability, hardware.num_sms


def understood(choice: Choice) -> Choice:
    """cuBLAS by its own choice instead of an algorithm of another version."""
    launch = choice.launch
    if isinstance(launch, cublaslt_linear.Launch) and launch.version != cublaslt_linear.version():
        return replace(choice, launch=None)
    return choice
