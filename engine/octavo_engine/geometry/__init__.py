"""A model's geometry: the numbers that fix its bytes, read from `config.json` or from a GGUF header.

Torch-free, so that the operator plans with the very numbers that the engine starts with. It knows shapes and counts,
not how a layer computes. `shapes` holds the values, `families` reads each family's `config.json`, `gguf` reads headers.
"""

import json
from pathlib import Path

from octavo_engine.errors import ModelSourceError
from octavo_engine.geometry.families import geometry_from_config
from octavo_engine.geometry.gguf import GGUF_ARCHITECTURES, geometry_from_gguf, gguf_metadata, read_gguf_metadata
from octavo_engine.geometry.served import check_served, served_architectures, why_not_served
from octavo_engine.geometry.shapes import DTYPE_BYTES, Experts, Geometry, LatentAttention, Matrix, WeightFormat
from octavo_engine.geometry.stored import geometry_from_data, geometry_to_data
from octavo_engine.geometry.windows import layer_windows, window_fields

__all__ = [
    "DTYPE_BYTES",
    "GGUF_ARCHITECTURES",
    "Experts",
    "Geometry",
    "LatentAttention",
    "Matrix",
    "WeightFormat",
    "check_served",
    "geometry_from_config",
    "geometry_from_data",
    "geometry_from_gguf",
    "geometry_to_data",
    "gguf_metadata",
    "layer_windows",
    "read_geometry",
    "read_gguf_metadata",
    "served_architectures",
    "why_not_served",
    "window_fields",
]


def read_geometry(path: Path) -> Geometry:
    """The geometry of a model on disk: a folder with `config.json`, a `config.json`, or a `.gguf` file.

    Raises ModelSourceError where a file is missing or unreadable, UnsupportedModelError where its numbers contradict.
    """
    if path.suffix == ".gguf":
        return geometry_from_gguf(read_gguf_metadata(path))
    config_file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelSourceError(f"{path} has no config.json and is no .gguf file, so it is not a model") from None
    except (OSError, ValueError) as error:
        raise ModelSourceError(f"cannot read {config_file}: {error}") from None
    return geometry_from_config(config)
