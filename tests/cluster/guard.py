"""Ends processes whose owner is gone, however the owner went, SIGKILL included.

The owner starts one guard and tells it, down a pipe, of each process group that it starts and ends. When the
pipe closes, the guard ends every group that is left. PR_SET_PDEATHSIG would reach only direct children, and
would fire already when the thread that started them returns.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Self, TextIO

_GRACE_S = 3.0


class Guard:
    """The owner's end. Thread-safe; `close` ends the groups that are still watched."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # A session of its own: a Ctrl-C at the terminal must end the owner first, then let the guard clean up.
        command = [sys.executable, "-I", "-S", __file__]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, text=True)

    def watch(self, process_group: int) -> None:
        self._say(f"+{process_group}")

    def forget(self, process_group: int) -> None:
        self._say(f"-{process_group}")

    def close(self) -> None:
        assert self._process.stdin is not None
        with self._lock:
            self._process.stdin.close()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        with self._lock, contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()


def signal_group(process_group: int, number: signal.Signals) -> bool:
    """Send a signal to a process group; False if nobody is left in it."""
    try:
        os.killpg(process_group, number)
    except ProcessLookupError:
        return False
    return True


def watch_until_closed(lines: TextIO) -> None:
    """The guard's own end: keep the list that `lines` describes, and end what is on it at end of file."""
    groups: set[int] = set()
    for line in lines:
        (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
    groups = {group for group in groups if signal_group(group, signal.SIGTERM)}
    deadline = time.monotonic() + _GRACE_S
    while groups and time.monotonic() < deadline:
        time.sleep(0.05)
        groups = {group for group in groups if _is_alive(group)}
    for group in groups:
        signal_group(group, signal.SIGKILL)


def _is_alive(process_group: int) -> bool:
    try:
        os.killpg(process_group, 0)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    watch_until_closed(sys.stdin)
