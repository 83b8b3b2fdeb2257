"""Where downloaded models are kept: blobs by the name of their bytes, and folders of links to them.

    blobs/KEY            a whole file, or a folder with what an archive held
    blobs/KEY.partial    one that is being downloaded; KEY.ranges says which of its ranges are there
    models/ID/NAME       links to blobs: what an engine reads
    latest/SOURCE        the ID of what a source held when it was last asked

A blob has its name only when it is whole, so a download that was interrupted goes on where it stopped, and what is
there is not fetched again. Processes that share the folder wait for each other. Nothing here is ever changed or
removed once it is whole.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import BinaryIO, cast

from octavo_engine.errors import ModelSourceError
from octavo_engine.remote.files import RemoteFile

# (share of the bytes that are there, which)
ProgressCallback = Callable[[float, str], None]

NUM_CONNECTIONS = 8
RANGE_BYTES = 16 << 20
_POLL_S = 0.25


def model_cache_folder(environment: Mapping[str, str]) -> Path:
    """In the user's cache folder (XDG base directories)."""
    return Path(environment.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "octavo" / "models"


class Progress:
    """Counts bytes in any thread; reports in the one that asks for it."""

    def __init__(self, num_bytes: int, callback: ProgressCallback | None) -> None:
        self._num_bytes = num_bytes
        self._callback = callback
        self._num_done = 0
        self._lock = threading.Lock()

    def add(self, num_bytes: int) -> None:
        """So many more are there."""
        with self._lock:
            self._num_done += num_bytes

    def report(self, num_elsewhere: int = 0) -> None:
        """num_elsewhere: bytes that another process has brought by now."""
        if self._callback is not None and self._num_bytes:
            num_done = self._num_done + num_elsewhere
            text = f"{num_done / 1e9:.2f} of {self._num_bytes / 1e9:.2f} GB"
            self._callback(min(1.0, num_done / self._num_bytes), text)


class ModelCache:
    """One folder. Its methods raise ModelSourceError, also where the folder cannot be written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._blobs = folder / "blobs"

    def path(self, key: str) -> Path:
        """Of a blob, or of a file in one that was unpacked: KEY/NAME."""
        return self._blobs / key

    def fetch(self, files: Iterable[RemoteFile], progress: Progress) -> None:
        """Bring what is not there, over several connections at once."""
        with self._storing(), contextlib.ExitStack() as locks:
            self._blobs.mkdir(parents=True, exist_ok=True)
            # In one order, so that two processes never wait for each other.
            wanted = sorted({each.key: each for each in files}.values(), key=lambda each: each.key)
            for file in wanted:
                if not self.path(file.key).exists():
                    locks.enter_context(self._locked(file, lambda: progress.report(self._num_there(wanted))))
            missing = [file for file in wanted if not self.path(file.key).exists()]
            progress.add(sum(file.size for file in wanted if file not in missing))
            _run([task for file in missing for task in self._tasks(file, progress)], progress)

    def link(self, keys: Mapping[str, str], source: str) -> Path:
        """The folder in which blobs have their names, remembered as what `source` held last."""
        identity = hashlib.sha256("\n".join(f"{name} {keys[name]}" for name in sorted(keys)).encode()).hexdigest()[:32]
        folder = self.folder / "models" / identity
        with self._storing():
            if not folder.is_dir():
                made = _beside_it(folder)
                made.mkdir(parents=True)
                for name, key in keys.items():
                    (made / name).symlink_to(Path("..", "..", "blobs", key))
                _rename_folder(made, folder)
            if self.latest(source) != folder:
                latest = self._latest(source)
                latest.parent.mkdir(exist_ok=True)
                new = _beside_it(latest)
                new.write_text(identity)
                new.replace(latest)
        return folder

    def latest(self, source: str) -> Path | None:
        """The folder that `link` made last for `source`, if all of it is there."""
        try:
            folder = self.folder / "models" / self._latest(source).read_text()
            return folder if all(file.exists() for file in folder.iterdir()) else None
        except OSError:
            return None

    def _latest(self, source: str) -> Path:
        return self.folder / "latest" / hashlib.sha256(source.encode()).hexdigest()[:32]

    @contextlib.contextmanager
    def _storing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ModelSourceError(
                f"cannot be stored in {self.folder}: {error.strerror or error}; XDG_CACHE_HOME names another place"
            ) from None

    @contextlib.contextmanager
    def _locked(self, file: RemoteFile, while_waiting: Callable[[], None]) -> Iterator[None]:
        """One process at a time downloads a blob."""
        with self._beside(file.key, "lock").open("a") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    while_waiting()
                    time.sleep(_POLL_S)
            yield

    def _num_there(self, files: Sequence[RemoteFile]) -> int:
        """Bytes that this or another process has brought."""
        return sum(
            file.size if self.path(file.key).exists() else sum(end - begin for begin, end in self._ranges(file))
            for file in files
        )

    def _beside(self, key: str, suffix: str) -> Path:
        return self._blobs / f"{key}.{suffix}"

    def _ranges(self, file: RemoteFile) -> set[tuple[int, int]]:
        """Those that an earlier or another download wrote; a line that was cut off names none of `_all_ranges`."""
        try:
            lines = set(self._beside(file.key, "ranges").read_text().splitlines())
        except FileNotFoundError:
            return set()
        return {each for each in _all_ranges(file.size) if _line(each) in lines}

    def _tasks(self, file: RemoteFile, progress: Progress) -> Sequence[Callable[[], None]]:
        """What is to be done for one blob, in any order and at the same time."""
        if file.unpack is not None:
            self._check_space(file.size)
            return [partial(self._unpack, file, progress)]
        if not self._beside(file.key, "partial").exists():
            self._beside(file.key, "ranges").unlink(missing_ok=True)
        there = self._ranges(file)
        ranges = [each for each in _all_ranges(file.size) if each not in there]
        num_missing = sum(end - begin for begin, end in ranges)
        self._check_space(num_missing)
        progress.add(file.size - num_missing)
        with self._beside(file.key, "partial").open("ab") as begun:
            begun.truncate(file.size)
        finish = partial(self._finish, file)
        if not ranges:
            return [finish]
        countdown = _Countdown(len(ranges), finish)
        return [partial(self._fetch_range, file, begin, end, progress, countdown) for begin, end in ranges]

    def _check_space(self, num_bytes: int) -> None:
        num_free = shutil.disk_usage(self.folder).free
        if num_free < num_bytes:
            raise ModelSourceError(
                f"needs {num_bytes / 1e9:.1f} GB in {self.folder}, where {num_free / 1e9:.1f} GB are free: make room, "
                "or name another place in XDG_CACHE_HOME"
            )

    def _fetch_range(self, file: RemoteFile, begin: int, end: int, progress: Progress, countdown: "_Countdown") -> None:
        data = file.read(begin, end)
        with self._beside(file.key, "partial").open("r+b") as begun:
            begun.seek(begin)
            begun.write(data)
            begun.flush()
            # The journal must not be ahead of the disk.
            os.fdatasync(begun.fileno())
        with self._beside(file.key, "ranges").open("a") as journal:
            journal.write(_line((begin, end)) + "\n")
        progress.add(end - begin)
        countdown.tick()

    def _finish(self, file: RemoteFile) -> None:
        """Raises ModelSourceError for other bytes than were asked for, and forgets them."""
        begun = self._beside(file.key, "partial")
        with begun.open("rb") as stream:
            if file.sha256 and (found := hashlib.file_digest(stream, "sha256").hexdigest()) != file.sha256:
                begun.unlink()
                self._beside(file.key, "ranges").unlink(missing_ok=True)
                raise _wrong_digest(file, found)
            os.fsync(stream.fileno())
        begun.replace(self.path(file.key))
        self._beside(file.key, "ranges").unlink(missing_ok=True)

    def _unpack(self, file: RemoteFile, progress: Progress) -> None:
        """Unpack while it comes: an archive with weights would take the space twice. Interrupted, it starts anew."""
        assert file.unpack is not None
        begun = self._beside(file.key, "partial")
        shutil.rmtree(begun, ignore_errors=True)
        begun.mkdir()
        stream = _Hashed(file.open(RANGE_BYTES), progress)
        file.unpack(cast("BinaryIO", stream), begun)
        while stream.read(RANGE_BYTES):  # what follows the last entry counts for the digest
            pass
        if file.sha256 and stream.hexdigest() != file.sha256:
            shutil.rmtree(begun)
            raise _wrong_digest(file, stream.hexdigest())
        begun.replace(self.path(file.key))


class _Countdown:
    """Calls `action` at the last of so many ticks, which may come from several threads."""

    def __init__(self, count: int, action: Callable[[], None]) -> None:
        self._count = count
        self._action = action
        self._lock = threading.Lock()

    def tick(self) -> None:
        with self._lock:
            self._count -= 1
            is_last = self._count == 0
        if is_last:
            self._action()


class _Hashed:
    """A stream that remembers the digest of what was read of it."""

    def __init__(self, stream: BinaryIO, progress: Progress) -> None:
        self._stream = stream
        self._progress = progress
        self._hash = hashlib.sha256()

    def read(self, num_bytes: int) -> bytes:
        data = self._stream.read(num_bytes)
        self._hash.update(data)
        self._progress.add(len(data))
        return data

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def _line(byte_range: tuple[int, int]) -> str:
    return f"{byte_range[0]} {byte_range[1]}"


def _all_ranges(size: int) -> list[tuple[int, int]]:
    return [(begin, min(begin + RANGE_BYTES, size)) for begin in range(0, size, RANGE_BYTES)]


def _run(tasks: Sequence[Callable[[], None]], progress: Progress) -> None:
    """All of them, a few at a time; the first error ends it.

    A process that ends does not wait for its downloads, so these are not the threads of an executor.
    """
    remaining = iter(tasks)
    lock = threading.Lock()
    outcomes: SimpleQueue[BaseException | None] = SimpleQueue()
    is_over = threading.Event()

    def work() -> None:
        while not is_over.is_set():
            with lock:
                task = next(remaining, None)
            if task is None:
                return
            try:
                task()
                outcomes.put(None)
            except BaseException as error:  # noqa: BLE001 - whoever waits gets it
                outcomes.put(error)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(NUM_CONNECTIONS, len(tasks)))]
    for thread in threads:
        thread.start()
    try:
        num_open = len(tasks)
        while num_open:
            with contextlib.suppress(Empty):
                error = outcomes.get(timeout=_POLL_S)
                if error is not None:
                    raise error
                num_open -= 1
            progress.report()
    finally:
        is_over.set()
        for thread in threads:
            thread.join()


def _beside_it(path: Path) -> Path:
    """A name that nobody else takes, for what becomes `path` when it is whole."""
    return path.with_name(f".new-{uuid.uuid4().hex}")


def _rename_folder(made: Path, folder: Path) -> None:
    try:
        made.rename(folder)
    except OSError:
        shutil.rmtree(made)
        # Another process was first; its links are the same.
        if not folder.is_dir():
            raise


def _wrong_digest(file: RemoteFile, found: str) -> ModelSourceError:
    return ModelSourceError(
        f"came with a file of the digest sha256:{found}, and not sha256:{file.sha256}: what is stored there is damaged"
    )
