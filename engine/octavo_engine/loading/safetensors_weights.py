"""Weights from a folder of safetensors files, one or sharded."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from octavo_engine.errors import ModelSourceError
from octavo_engine.loading.weight_source import Part, StoredTensor

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


class SafetensorsWeights:
    """The tensors of a model folder. Raises ModelSourceError if files are missing or unreadable."""

    def __init__(self, folder: Path) -> None:
        self._files = _shards(folder)

    @property
    def num_bytes(self) -> int:
        """Of the files."""
        return sum(file.stat().st_size for file in self._files)

    def __iter__(self) -> Iterator[StoredTensor]:
        for file in self._files:
            try:
                yield from _tensors(file)
            except SafetensorError as error:
                raise ModelSourceError(f"{file} is not a readable safetensors file: {error}") from None


def _tensors(file: Path) -> Iterator[StoredTensor]:
    # Not in a block: it stays open for as long as somebody may read a tensor of it.
    shard: Any = safe_open(file, framework="pt", device="cpu")
    names = list(shard.keys())
    # Headers do not say sizes through this interface; an equal share per tensor is enough for a progress bar.
    share = file.stat().st_size // max(len(names), 1)
    for name in names:
        shape = tuple(shard.get_slice(name).get_shape())
        yield StoredTensor(name, share, shape, partial(_read, shard, name))


def _read(shard: Any, name: str, part: Part = ()) -> torch.Tensor:
    tensor: torch.Tensor = shard.get_slice(name)[part] if part else shard.get_tensor(name)
    return tensor


def _shards(folder: Path) -> list[Path]:
    """The files that the index names; without an index the single file, or all there are."""
    index = folder / INDEX_FILE
    if index.is_file():
        names = sorted(set(_weight_map(index).values()))
        if outside := [name for name in names if Path(name).name != name]:
            raise ModelSourceError(f"{index} names files outside its folder: {', '.join(outside)}")
        files = [folder / name for name in names]
    elif (folder / SINGLE_FILE).is_file():
        files = [folder / SINGLE_FILE]
    else:
        files = sorted(folder.glob("*.safetensors"))
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ModelSourceError(f"{index} names files that are missing: {', '.join(missing)}")
    if not files:
        raise ModelSourceError(f"{folder} has no .safetensors weights")
    return files


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(tensor): str(file) for tensor, file in weight_map.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise ModelSourceError(f"{index} is not an index of safetensors files") from None
