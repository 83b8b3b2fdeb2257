"""The files that tuning writes: it adds to what is there and replaces only what it measured anew."""

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import triton

from octavo_kernels.linear_choice import Choice, read_choices, write_choices

Origin = dict[str, str]


def origins(path: Path, gpu: str) -> list[Origin]:
    """Where a table's numbers come from: the runs that it has rows of already, and this one."""
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    this_run = {"gpu": gpu, **versions, "date": f"{datetime.now(UTC):%Y-%m-%d}"}
    before = _read_origins(path) if path.exists() else []
    return [*(each for each in before if each != this_run), this_run]


def _read_origins(path: Path) -> list[Origin]:
    """A table of one run may name it without a list."""
    measured = json.loads(path.read_text())["measured"]
    return measured if isinstance(measured, list) else [measured]


def check_table(path: Path, op: str, gpu: str) -> None:
    """Raise ValueError if there is a file that is no table of an op's tuning, or one of another GPU."""
    if not path.exists():
        return
    try:
        measured_on = {each["gpu"] for each in _read_origins(path)}
        if op == "linear":
            read_choices(path)
        elif "rows" not in json.loads(path.read_text()):
            raise KeyError("rows")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a table of launch choices: {error!r}") from error
    if measured_on != {gpu}:
        names = ", ".join(sorted(measured_on))
        raise ValueError(f"{path} was measured on {names}, and this is {gpu}: give another file with -o")


def add_choices(path: Path, new: Sequence[Choice], gpu: str) -> None:
    """Merge choices of linear layers into a GPU's file: per shape and number of tokens the new one wins."""
    kept = {(choice.shape, choice.num_tokens): choice for choice in (read_choices(path) if path.exists() else [])}
    kept |= {(choice.shape, choice.num_tokens): choice for choice in new}
    write_choices(path, kept.values(), origins(path, gpu))


def add_rows(path: Path, new: Iterable[Mapping[str, Any]], keys: Sequence[str], gpu: str) -> None:
    """Merge rows of figures into a file of them; rows with equal values of `keys` are the same row."""
    kept: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for row in (*(json.loads(path.read_text())["rows"] if path.exists() else ()), *new):
        kept[tuple(row[key] for key in keys)] = row
    rows = ",\n  ".join(json.dumps(row) for row in kept.values())
    path.write_text(f'{{"measured": {json.dumps(origins(path, gpu))},\n "rows": [\n  {rows}\n]}}\n')
