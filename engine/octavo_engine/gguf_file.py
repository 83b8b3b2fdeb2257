"""The header of a GGUF file: its key-value pairs and where its tensors lie. Knows no tensor arithmetic and no torch.

Reading 100,000 tokens and merges through numpy views takes seconds; walking the bytes once and decoding an array only
when it is asked for takes a few hundredths of one. Byte layout: the GGUF specification, version 3
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

import math
import mmap
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from octavo_engine.errors import ModelSourceError

MAGIC = b"GGUF"
READABLE_VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4  # GGML_MAX_DIMS

_STRING = 8
_ARRAY = 9
# Value type of the specification -> struct format of one little-endian value.
_SCALAR_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor's entry.

    shape:   outermost dimension first, as torch and numpy write it (the file has it the other way round)
    type_id: GGML type, such as 3 for Q4_1
    offset:  byte position in the file
    """

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int

    @property
    def num_elements(self) -> int:
        """How many values it has once dequantised."""
        return math.prod(self.shape)


class GgufMetadata(Mapping[str, Any]):
    """The key-value pairs; the value of an array is decoded when it is first read."""

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}
        self._undecoded: dict[str, Callable[[], Any]] = {}

    def __getitem__(self, key: str) -> Any:
        decode = self._undecoded.pop(key, None)
        if decode is not None:
            self._values[key] = decode()
        return self._values[key]

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def add(self, key: str, value: Any) -> None:
        """Add a pair. Raises ValueError if the key is there already."""
        if key in self._values:
            raise ValueError(f"the key {key} appears twice")
        self._values[key] = value

    def add_undecoded(self, key: str, decode: Callable[[], Any]) -> None:
        """Add a pair whose value `decode` makes. Raises ValueError if the key is there already."""
        self.add(key, None)
        self._undecoded[key] = decode


class GgufFile:
    """An open GGUF file: `metadata`, `tensors` by name, and the mapped bytes in `buffer`.

    Raises ModelSourceError if the file is missing, cut off or not GGUF.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.buffer = _map(path)
        self.metadata = GgufMetadata()
        try:
            self._offset = 0
            num_tensors, num_pairs = self._read_counts()
            for _ in range(num_pairs):
                self._read_pair()
            self._entries = [self._read_tensor_entry() for _ in range(num_tensors)]
            self.tensors = self._place_tensors()
        except (struct.error, UnicodeDecodeError, ValueError) as error:
            raise ModelSourceError(f"{path} is not a readable GGUF file: {error}") from None

    @cached_property
    def architecture(self) -> str:
        """`general.architecture`: the prefix of the model's own keys."""
        return str(self.metadata.get("general.architecture"))

    def _read_counts(self) -> tuple[int, int]:
        if self.buffer[:4] != MAGIC:
            raise ValueError("it does not start with the letters GGUF")
        version, num_tensors, num_pairs = struct.unpack_from("<IQQ", self.buffer, 4)
        if version not in READABLE_VERSIONS:
            raise ValueError(f"version {version} (or a big-endian file); readable are {READABLE_VERSIONS}")
        self._offset = 24
        return num_tensors, num_pairs

    def _read_pair(self) -> None:
        key = self._read_string()
        (value_type,) = self._unpack("<I")
        if value_type == _STRING:
            self.metadata.add(key, self._read_string())
        elif value_type == _ARRAY:
            self._read_array(key)
        else:
            self.metadata.add(key, self._unpack(f"<{_scalar_format(value_type)}")[0])

    def _read_array(self, key: str) -> None:
        item_type, length = self._unpack("<IQ")
        start = self._offset
        if item_type == _STRING:
            self._skip_strings(length)
            self.metadata.add_undecoded(key, lambda: _decode_strings(self.buffer, start, length))
            return
        item = _scalar_format(item_type)  # arrays of arrays are in the specification, but in no model file
        self._skip(length * struct.calcsize(f"<{item}"))
        self.metadata.add_undecoded(key, lambda: list(struct.unpack_from(f"<{length}{item}", self.buffer, start)))

    def _read_tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._read_string()
        (num_dimensions,) = self._unpack("<I")
        if not 1 <= num_dimensions <= MAX_DIMENSIONS:
            raise ValueError(f"the tensor {name} has {num_dimensions} dimensions")
        shape = self._unpack(f"<{num_dimensions}Q")
        type_id, offset = self._unpack("<IQ")
        return name, tuple(reversed(shape)), type_id, offset

    def _place_tensors(self) -> dict[str, GgufTensor]:
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment is {alignment!r}, not a power of two")
        data_start = -(-self._offset // alignment) * alignment
        tensors = {
            name: GgufTensor(name, shape, type_id, data_start + offset)
            for name, shape, type_id, offset in self._entries
        }
        if len(tensors) != len(self._entries):
            raise ValueError("a tensor's name appears twice")
        return tensors

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(layout, self.buffer, self._offset)
        self._offset += struct.calcsize(layout)
        return values

    def _read_string(self) -> str:
        (length,) = self._unpack("<Q")
        start = self._offset
        self._skip(length)
        return self.buffer[start : self._offset].decode("utf-8")

    def _skip(self, num_bytes: int) -> None:
        self._offset += num_bytes
        if self._offset > len(self.buffer):
            raise ValueError("it ends in the middle of its header")

    def _skip_strings(self, count: int) -> None:
        offset, buffer, unpack = self._offset, self.buffer, struct.Struct("<Q").unpack_from
        for _ in range(count):
            offset += 8 + unpack(buffer, offset)[0]
        self._offset = offset
        self._skip(0)


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise ModelSourceError(f"there is no file {path}") from None
    except ValueError:
        raise ModelSourceError(f"{path} is empty") from None
    except OSError as error:
        raise ModelSourceError(f"cannot read {path}: {error.strerror}") from None


def _scalar_format(value_type: int) -> str:
    if value_type not in _SCALAR_FORMATS:
        raise ValueError(f"value type {value_type} is unknown")
    return _SCALAR_FORMATS[value_type]


def _decode_strings(buffer: mmap.mmap, offset: int, count: int) -> list[str]:
    """Tokens that are no valid UTF-8 keep their bytes as surrogates: they are only ever compared."""
    unpack = struct.Struct("<Q").unpack_from
    strings = []
    for _ in range(count):
        start = offset + 8
        offset = start + unpack(buffer, offset)[0]
        strings.append(buffer[start:offset].decode("utf-8", "surrogateescape"))
    return strings
