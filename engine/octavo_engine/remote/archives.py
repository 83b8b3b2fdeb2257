"""Layers that are tar archives: what they hold, read in parts, and unpacking them while they come."""

import contextlib
import gzip
import io
import os
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

from octavo_engine.errors import ModelSourceError
from octavo_engine.remote.files import RemoteFile
from octavo_engine.remote.model import CONFIG_FILE, GGUF, SAFETENSORS, WHITEOUT, Archive, Layer, is_model_file

# So much of a compressed archive is looked at for a configuration, and so much of a weight file is kept for its header.
_MOST_STREAMED_BYTES = 256 << 20
_HEAD_BYTES = 32 << 20
_BUFFER_BYTES = 256 << 10
_STREAM_BUFFER_BYTES = 4 << 20
_GZIP_MAGIC = b"\x1f\x8b"


def archive(file: RemoteFile, folder: str, *, is_compressed: bool) -> Archive:
    """The layer of a tar archive.

    folder:        of the archive, in which the model lies; empty: anywhere
    is_compressed: by gzip
    """
    whole = RemoteFile(
        f"{file.key}.{folder or 'all'}", file.size, file.read_range, file.sha256, partial(_unpack, wanted=folder)
    )
    return Archive(whole, partial(_peek_stream if is_compressed else _peek, file, folder))


def _unpack(stream: BinaryIO, folder: Path, wanted: str) -> None:
    """Write the model's files, and the marks of what is deleted below, into `folder`. Raises ModelSourceError."""
    with _explained():
        for tar, member, path in _members(stream, wanted, "r|"):
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            content = tar.extractfile(member)
            assert content is not None
            with target.open("wb") as written:
                shutil.copyfileobj(content, written, 1 << 20)
                written.flush()
                os.fsync(written.fileno())


def _peek(file: RemoteFile, wanted: str) -> tuple[Layer, bool]:
    """Read the entries' headers, and skip what lies between."""
    with _explained(), file.open(_BUFFER_BYTES) as stream:
        members = _members(stream, wanted, "r:")
        return {
            str(path): RemoteFile(f"{file.key}/{path}", member.size, partial(_read_inside, file, member.offset_data))
            for _, member, path in members
        }, True


def _read_inside(file: RemoteFile, offset: int, begin: int, end: int) -> bytes:
    return file.read_range(offset + begin, offset + end)


def _peek_stream(file: RemoteFile, wanted: str) -> tuple[Layer, bool]:
    """Read from the beginning until the configuration and the beginning of a weight file are known."""
    found: dict[str, RemoteFile] = {}
    with _explained(), contextlib.suppress(_TooFarError), file.open(_STREAM_BUFFER_BYTES) as stream:
        for tar, member, path in _members(stream, wanted, "r|", _MOST_STREAMED_BYTES):
            content = tar.extractfile(member)
            assert content is not None
            head = content.read(_HEAD_BYTES)
            found[str(path)] = RemoteFile(f"{file.key}/{path}", member.size, partial(_read_head, head, str(path)))
            if path.suffix == GGUF or (path.suffix == SAFETENSORS and str(path.parent / CONFIG_FILE) in found):
                return found, False
        return found, True
    return found, False


def _read_head(head: bytes, path: str, begin: int, end: int) -> bytes:
    if end > len(head):
        raise ModelSourceError(
            f"has its {path} in a compressed layer, of which only the beginning was read", reason="InspectionFailed"
        )
    return head[begin:end]


def _members(
    stream: BinaryIO, wanted: str, mode: str, most_bytes: int | None = None
) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo, PurePosixPath]]:
    """The model's files in an archive, and the marks of deleted ones, with their paths, in its order.

    Raises _TooFarError before more than `most_bytes` of what is inside would be read to get to the next.
    """
    places = (wanted, WHITEOUT + wanted)
    content = _decompressed(stream) if mode == "r|" else stream
    with tarfile.open(fileobj=content, mode=mode) as tar:  # type: ignore[call-overload]
        for member in tar:
            path = PurePosixPath(os.path.normpath(member.name.lstrip("/")))
            is_inside = ".." not in path.parts and (not wanted or path.parts[:1] in [(place,) for place in places])
            if is_inside and (path.name.startswith(WHITEOUT) or is_model_file(path.name)):
                if member.issym() or member.islnk():
                    raise ModelSourceError(f"has {path} as a link in a layer: links are not followed, copy the file")
                if member.isfile():
                    yield tar, member, path
            if most_bytes is not None and member.offset_data + member.size > most_bytes:
                raise _TooFarError


def _decompressed(stream: BinaryIO) -> BinaryIO:
    """The stream itself, or what is in it by gzip: all its members, of which `tarfile` would read the first alone."""
    magic = stream.read(len(_GZIP_MAGIC))
    whole = io.BufferedReader(_Chain(magic, stream))
    return cast("BinaryIO", gzip.GzipFile(fileobj=whole) if magic == _GZIP_MAGIC else whole)


class _Chain(io.RawIOBase):
    """A stream of which the beginning has been read."""

    def __init__(self, begun: bytes, rest: BinaryIO) -> None:
        self._begun, self._rest = begun, rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "bytearray | memoryview") -> int:  # type: ignore[override]
        data, self._begun = self._begun or self._rest.read(len(buffer)), b""
        buffer[: len(data)] = data
        return len(data)


class _TooFarError(Exception):
    """What is looked for does not come early enough."""


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ModelSourceError(f"has a layer that is not a readable tar archive: {error}") from None
