"""Which model is meant: a named shape, of which nothing but its configuration exists, or the address of real files."""

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo_engine.bench.shapes import SHAPES
from octavo_engine.geometry import Geometry, geometry_from_config, read_geometry
from octavo_engine.model_source import resolve_model


@dataclass(frozen=True, slots=True)
class BenchModel:
    """A model's numbers. config: the fields of its config.json; empty for a GGUF file."""

    name: str
    geometry: Geometry
    config: Mapping[str, Any]

    @property
    def is_shape(self) -> bool:
        """Whether it is a named shape, which has no files."""
        return self.name in SHAPES


def find_model(name: str) -> BenchModel:
    """The shape of that name, or else the model at that address. Raises ModelSourceError if there is neither."""
    if name in SHAPES:
        return BenchModel(name, geometry_from_config(SHAPES[name]), SHAPES[name])
    files = resolve_model(name)
    return BenchModel(name, read_geometry(files.path), files.read_json("config.json"))


@contextlib.contextmanager
def model_address(model: BenchModel) -> Iterator[str]:
    """Where an engine finds the model; for a shape, a folder with its config.json that goes when the block ends."""
    if not model.is_shape:
        yield model.name
        return
    with tempfile.TemporaryDirectory(prefix="octavo-bench-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(dict(model.config)))
        yield folder
