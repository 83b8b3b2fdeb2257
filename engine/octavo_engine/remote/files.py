"""A file that lies elsewhere: its size, a name for its very bytes, and how to read a part of it."""

import io
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from octavo_engine.errors import ModelSourceError, SourceReason

logger = logging.getLogger(__name__)

# read(begin, end) -> the bytes of that range
ReadRange = Callable[[int, int], bytes]

# What goes wrong on the way is tried again after so many seconds, or when the other side asks for it.
PAUSES_S = (1.0, 2.0, 4.0)
_LONGEST_PAUSE_S = 30.0


class TransferError(ModelSourceError):
    """What may go well when it is tried again: a broken connection, a server in trouble or too busy."""

    def __init__(
        self, message: str, *, reason: SourceReason = "SourceUnavailable", retry_after_s: float | None = None
    ) -> None:
        super().__init__(message, reason=reason)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of a model, or one archive with some.

    key:        name of these very bytes in the cache: other bytes have another key
    size:       in bytes
    read_range: reads a part; raises ModelSourceError, and TransferError where trying again may help
    sha256:     what the whole must have, in hexadecimal digits; None where the source does not say
    unpack:     writes what an archive holds into a folder; None for a plain file
    """

    key: str
    size: int
    read_range: ReadRange
    sha256: str | None = None
    unpack: Callable[[BinaryIO, Path], None] | None = None

    def read(self, begin: int, end: int) -> bytes:
        """The bytes of that range, tried more than once. Raises ModelSourceError."""
        data = retried(lambda: self.read_range(begin, end)) if begin < end else b""
        if len(data) != end - begin:
            raise ModelSourceError(f"{end - begin} bytes were asked for, and {len(data)} came")
        return data

    def open(self, buffer_bytes: int) -> BinaryIO:
        """The file as a stream that reads so many bytes ahead."""
        return cast("BinaryIO", io.BufferedReader(_RangeReader(self), buffer_bytes))


def retried(action: Callable[[], bytes]) -> bytes:
    """Call until it goes well or the pauses are used up. Raises what the last call raised."""
    for pause_s in PAUSES_S:
        try:
            return action()
        except TransferError as error:
            wait_s = min(error.retry_after_s or pause_s, _LONGEST_PAUSE_S)
            logger.info("%s; trying again in %.0f s", error, wait_s)
            time.sleep(wait_s)
    return action()


class _RangeReader(io.RawIOBase):
    """Reads a remote file by ranges; seeking costs nothing."""

    def __init__(self, file: RemoteFile) -> None:
        self._file = file
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: "bytearray | memoryview") -> int:  # type: ignore[override]
        end = min(self._position + len(buffer), self._file.size)
        data = self._file.read(self._position, end) if end > self._position else b""
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
