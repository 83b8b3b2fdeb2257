"""Starts a server for a measurement, waits until it answers, and ends what it started, by process id."""

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from octavo_engine.errors import OctavoError

LOOPBACK: Final = "127.0.0.1"
_POLL_INTERVAL_S: Final = 0.25
_STOP_TIMEOUT_S: Final = 20.0
_NUM_SHOWN_LOG_LINES: Final = 15


@dataclass(frozen=True, slots=True)
class LocalServer:
    """A server that answers at `url`. `pid`: the process that was started; others may be below it."""

    url: str
    pid: int
    start_up_s: float


def free_port() -> int:
    """A TCP port on loopback that nobody listened on a moment ago."""
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        port: int = listener.getsockname()[1]
        return port


def octavo_command(model: str, port: int, flags: Sequence[str] = ()) -> list[str]:
    """The command that serves `model` with this environment's Octavo."""
    program = Path(sys.executable).with_name("octavo")
    return [str(program), "serve", model, "--host", LOOPBACK, "--port", str(port), *flags]


@contextlib.contextmanager
def running(
    command: Sequence[str],
    port: int,
    log_file: Path,
    *,
    environment: Mapping[str, str] | None = None,
    start_timeout_s: float = 900.0,
) -> Iterator[LocalServer]:
    """Run `command` in a process group of its own until the block ends; its output goes to `log_file`.

    environment: added to this process's. Raises OctavoError if the server ends, or answers nothing in time.
    """
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
    started_s = time.monotonic()
    url = f"http://{LOOPBACK}:{port}"
    try:
        _wait_until_ready(process, url, started_s + start_timeout_s, command, log_file)
        yield LocalServer(url, process.pid, time.monotonic() - started_s)
    finally:
        _stop(process)


def _wait_until_ready(
    process: subprocess.Popen[bytes], url: str, deadline_s: float, command: Sequence[str], log_file: Path
) -> None:
    """Wait for /health to answer 200: Octavo, vLLM, SGLang and llama.cpp answer so once they can serve."""
    while not _is_healthy(url):
        if process.poll() is not None:
            raise OctavoError(f"{shlex.join(command)} ended with {process.returncode}:\n{_tail(log_file)}")
        if time.monotonic() > deadline_s:
            raise OctavoError(f"{shlex.join(command)} did not become ready in time:\n{_tail(log_file)}")
        time.sleep(_POLL_INTERVAL_S)


def _is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask the process to end, then make its whole group, which nobody else is in."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_TIMEOUT_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _tail(log_file: Path) -> str:
    return "\n".join(log_file.read_text(errors="replace").splitlines()[-_NUM_SHOWN_LOG_LINES:])
