"""How many bytes a checkpoint's weights take, from the headers of its files: nothing else of them is read.

A header is the beginning of a `.safetensors` file: 8 bytes with its length, and JSON that names each tensor's type and
place. An index names the shards and the bytes of all. Format: https://huggingface.co/docs/safetensors
"""

import json
import struct
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from octavo_engine.errors import ModelSourceError, UnsupportedModelError
from octavo_engine.geometry import DTYPE_BYTES, Geometry

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

# Name of a tensor -> its type as safetensors spells it, and where it begins and ends.
Header: TypeAlias = Mapping[str, tuple[str, tuple[int, int]]]

_ITEM_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "I32": 4}
_MOST_HEADER_BYTES = 100 << 20
# A checkpoint holds more than the model (further heads, copies of tied weights), but not twice as much, nor half.
_LARGEST_RATIO = 2.0


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """num_bytes: of all tensors in all files. item_bytes: of one number of the type that most of them have."""

    num_bytes: int
    item_bytes: int


def stored_weights(index_file: Path, read_header: Callable[[str], Header]) -> StoredWeights:
    """From the index and one shard's header, or from the header of the one file where there is no index.

    Raises ModelSourceError if the index cannot be read, and what `read_header` raises.
    """
    if not index_file.is_file():
        header = read_header(SINGLE_FILE)
        return StoredWeights(_num_bytes(header), _item_bytes(header))
    try:
        index = json.loads(index_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelSourceError(f"cannot read {index_file}: {error}") from None
    return index_weights(index, str(index_file), read_header)


def index_weights(index: object, name: str, read_header: Callable[[str], Header]) -> StoredWeights:
    """From what an index of that name holds: one shard's header, or all where the index does not say the bytes.

    Raises ModelSourceError if it is no index, and what `read_header` raises.
    """
    shards, total = _parse_index(index, name)
    headers = [read_header(shard) for shard in (shards[:1] if total else shards)]
    return StoredWeights(total or sum(map(_num_bytes, headers)), _item_bytes(headers[0]))


def total_weights(headers: Sequence[Header]) -> StoredWeights | None:
    """From the headers of all files; None if there are none."""
    return StoredWeights(sum(map(_num_bytes, headers)), _item_bytes(headers[0])) if headers else None


def _parse_index(index: Any, name: str) -> tuple[list[str], int]:
    """The shards, and the bytes of all; 0 where the index does not say."""
    try:
        shards = sorted({str(shard) for shard in index["weight_map"].values()})
        total = int(index.get("metadata", {}).get("total_size", 0))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelSourceError(f"cannot read {name}: {error}") from None
    if not shards:
        raise ModelSourceError(f"{name} names no files")
    return shards, total


def _num_bytes(header: Header) -> int:
    return sum(end - begin for _, (begin, end) in header.values())


def _item_bytes(header: Header) -> int:
    bytes_of: Counter[str] = Counter()
    for dtype, (begin, end) in header.values():
        bytes_of[dtype] += end - begin
    most = bytes_of.most_common(1)
    return _ITEM_BYTES.get(most[0][0], 2) if most else 2


def read_stored_weights(folder: Path) -> StoredWeights | None:
    """Of a folder; None if it holds no safetensors.

    Raises ModelSourceError if a header cannot be read.
    """
    index_file = folder / INDEX_FILE
    if index_file.is_file():
        return stored_weights(index_file, lambda name: read_header(folder / name))
    return total_weights([read_header(file) for file in sorted(folder.glob("*.safetensors"))])


def read_header(file: Path) -> Header:
    """The header of one file. Raises ModelSourceError if it is none."""
    try:
        with file.open("rb") as stream:
            return parse_header(stream, str(file))
    except OSError as error:
        raise ModelSourceError(f"cannot read the header of {file}: {error}") from None


def parse_header(stream: BinaryIO, name: str) -> Header:
    """The header at the beginning of `stream`. Raises ModelSourceError if it is none."""
    try:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > _MOST_HEADER_BYTES:
            raise ValueError(f"a header of {length} bytes")
        tensors = json.loads(stream.read(length))
        return {
            key: (str(each["dtype"]), (int(each["data_offsets"][0]), int(each["data_offsets"][1])))
            for key, each in tensors.items()
            if key != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, struct.error) as error:
        raise ModelSourceError(f"cannot read the header of {name}: {error}") from None


def with_stored_weights(geometry: Geometry, stored: StoredWeights | None) -> Geometry:
    """The geometry with the bytes of its checkpoint.

    Raises UnsupportedModelError where `config.json` speaks of another model than the files hold.
    """
    if stored is None or not stored.num_bytes:
        return geometry
    expected = _expected_bytes(geometry, stored.item_bytes)
    if not 1 / _LARGEST_RATIO <= stored.num_bytes / expected <= _LARGEST_RATIO:
        raise UnsupportedModelError(
            f"config.json describes weights of {expected / 1e9:.3f} GB, but files hold {stored.num_bytes / 1e9:.3f} "
            "GB: it is not the configuration of these weights"
        )
    return replace(geometry, checkpoint_bytes=stored.num_bytes)


def _expected_bytes(geometry: Geometry, item_bytes: int) -> int:
    if geometry.weight_format is None:
        return geometry.num_parameters * item_bytes
    rest = geometry.num_embedding_parameters + geometry.num_other_parameters
    linear = sum(geometry.weight_format.matrix_bytes(each) for each in geometry.matrices())
    return linear + rest * DTYPE_BYTES[geometry.dtype]
