"""The engine's process: it runs one core behind two ZeroMQ sockets, and nothing else.

Messages are those of `protocol.py`. `EngineProcess` is the front end's handle; `python -m octavo_engine.engine_process`
is the process itself. It dies with its parent, leaves SIGINT and SIGTERM to the front end, which drains, and says
`EngineFailed` before it ends on an error. What a core computes is the core's own affair: any object that satisfies
`Core` will do.
"""

import ctypes
import gc
import importlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Protocol, cast

import msgspec
import zmq

from octavo_engine.config import EngineConfig, load_config
from octavo_engine.errors import EngineDeadError, OctavoError
from octavo_engine.logs import configure_logging
from octavo_engine.protocol import (
    AbortRequests,
    AddRequest,
    EngineFailed,
    EngineMessage,
    EnginePhase,
    EngineReady,
    EngineStats,
    FrontEndMessage,
    SequenceOutput,
    Shutdown,
    StepOutputs,
)

logger = logging.getLogger(__name__)

DEFAULT_CORE: Final = "octavo_engine.core:EngineCore"
CONFIG_FILE: Final = "config.yaml"
REQUESTS_SOCKET: Final = "requests.sock"
OUTPUTS_SOCKET: Final = "outputs.sock"
SMALLEST_PROGRESS: Final = 0.01
LINGER_MS: Final = 1000
PR_SET_PDEATHSIG: Final = 1


class Core(Protocol):
    """What the process runs. `step` answers each request until it is finished, aborted or failed."""

    @property
    def has_work(self) -> bool:
        """Whether `step` would do something."""

    def ready(self) -> EngineReady:
        """What the core settled on while it loaded."""

    def add_request(self, request: AddRequest) -> None:
        """Queue a request. Raises OctavoError if it can never run."""

    def abort(self, request: AbortRequests) -> None:
        """End requests or one sequence of them; unknown ones are ignored."""

    def step(self) -> StepOutputs:
        """Run one batch."""


CoreFactory = Callable[[EngineConfig, Callable[[EnginePhase], None]], Core]


class EngineProcess:
    """The front end's handle of the engine's process: two sockets, a private folder and the process itself.

    Messages go out by `send`; they come in by `receive`, which never waits: `outputs_fd` is readable when there may be
    some, and `exit_fd` once the process has ended. Both belong to this object.
    """

    def __init__(self, config: EngineConfig, core: str = DEFAULT_CORE) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="octavo-"))
        (self._directory / CONFIG_FILE).write_text(config.to_yaml(), encoding="utf-8")
        self._context = zmq.Context(io_threads=1)
        self._requests = self._bind(zmq.PUSH, REQUESTS_SOCKET)
        self._outputs = self._bind(zmq.PULL, OUTPUTS_SOCKET)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[EngineMessage] = msgspec.msgpack.Decoder(EngineMessage)
        command = [sys.executable, "-m", "octavo_engine.engine_process", str(self._directory), core, str(os.getpid())]
        # A process group of its own: the terminal's Ctrl-C is for the front end, which drains.
        self._popen = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0)
        self.exit_fd = os.pidfd_open(self._popen.pid)
        self.outputs_fd = int(self._outputs.getsockopt(zmq.FD))

    def _bind(self, kind: int, name: str) -> "zmq.Socket[bytes]":
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.LINGER, 0)
        socket.set_hwm(0)
        socket.bind(f"ipc://{self._directory / name}")
        return socket

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._popen.pid

    @property
    def exit_code(self) -> int | None:
        """The exit code, negative for a signal; None while the process runs."""
        return self._popen.poll()

    def send(self, message: FrontEndMessage) -> None:
        """Queue a message to the engine. Raises EngineDeadError if there is nobody to take it."""
        try:
            self._requests.send(self._encoder.encode(message), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            raise EngineDeadError("the engine process does not take requests") from error

    def receive(self) -> Iterator[EngineMessage]:
        """The messages that have arrived. Read it to its end: `outputs_fd` tells only of what is new."""
        while True:
            try:
                frame = self._outputs.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            yield self._decoder.decode(frame)

    def unlink_sockets(self) -> None:
        """Remove the folder once both ends are connected, so that nothing is left behind however this ends."""
        shutil.rmtree(self._directory, ignore_errors=True)

    def close(self, timeout_s: float) -> None:
        """End the process, gently for `timeout_s`, and free what it held."""
        if self.exit_code is None:
            try:
                self.send(Shutdown())
                self._popen.wait(timeout_s)
            except (EngineDeadError, subprocess.TimeoutExpired):
                self._popen.kill()
        self._popen.wait()
        os.close(self.exit_fd)
        self._context.destroy(linger=0)
        self.unlink_sockets()


class _Outbox:
    """The engine's end of the socket to the front end."""

    def __init__(self, socket: "zmq.Socket[bytes]") -> None:
        self._socket = socket
        self._encoder = msgspec.msgpack.Encoder()
        self._last_phase = EnginePhase("starting")
        self._last_stats = EngineStats()

    def send(self, message: EngineMessage) -> None:
        self._socket.send(self._encoder.encode(message))

    def send_step(self, outputs: StepOutputs) -> None:
        """Send a step's outputs and statistics in one message."""
        self._last_stats = outputs.stats
        self.send(outputs)

    def send_refusal(self, request: AddRequest, reason: str) -> None:
        """Answer a request that never ran: each of its sequences ends with an error."""
        indices = range(request.params.n)
        outputs = [
            SequenceOutput(request.request_id, index, [], finish_reason="error", error=reason) for index in indices
        ]
        self.send(StepOutputs(outputs, self._last_stats))

    def report_phase(self, phase: EnginePhase) -> None:
        """Pass on what a reader would notice: a loader may report each tensor."""
        last = self._last_phase
        has_moved = phase.fraction - last.fraction >= SMALLEST_PROGRESS or phase.fraction == 1.0 != last.fraction
        if has_moved or phase.phase != last.phase:
            self._last_phase = phase
            self.send(phase)


def run_core(core: Core, inbox: "zmq.Socket[bytes]", outbox: _Outbox) -> None:
    """Step while there is work, block on the inbox while there is none, until told to shut down."""
    decoder: msgspec.msgpack.Decoder[FrontEndMessage] = msgspec.msgpack.Decoder(FrontEndMessage)
    while True:
        for frame in _drain(inbox, wait=not core.has_work):
            message = decoder.decode(frame)
            if isinstance(message, Shutdown):
                return
            if isinstance(message, AbortRequests):
                core.abort(message)
            else:
                _admit(core, message, outbox)
        if core.has_work:
            outbox.send_step(core.step())


def _drain(inbox: "zmq.Socket[bytes]", *, wait: bool) -> Iterator[bytes]:
    """The frames that have arrived; with `wait`, at least one."""
    if wait:
        yield inbox.recv()
    while True:
        try:
            yield inbox.recv(zmq.NOBLOCK)
        except zmq.Again:
            return


def _admit(core: Core, request: AddRequest, outbox: _Outbox) -> None:
    """Queue the request, or answer it with the reason why it can never run."""
    try:
        core.add_request(request)
    except OctavoError as error:
        outbox.send_refusal(request, str(error))


def _run(directory: Path, core_name: str) -> int:
    """The process's life; the exit code."""
    config = load_config({}, {}, directory / CONFIG_FILE)
    configure_logging(config.log_level)
    with zmq.Context(io_threads=1) as context:
        inbox = _connect(context, zmq.PULL, directory / REQUESTS_SOCKET)
        outbox_socket = _connect(context, zmq.PUSH, directory / OUTPUTS_SOCKET)
        outbox = _Outbox(outbox_socket)
        try:
            core = _factory(core_name)(config, outbox.report_phase)
            outbox.send(core.ready())
            # What start-up made lives as long as the process: later collections need not look at it.
            gc.collect()
            gc.freeze()
            run_core(core, inbox, outbox)
        except OctavoError as error:
            outbox.send(EngineFailed(str(error), is_user_error=True))
            return 2
        except ModuleNotFoundError as error:
            message = f"the engine needs the package {error.name}: `pip install 'octavo[engine]'` brings it"
            outbox.send(EngineFailed(message, is_user_error=True))
            return 2
        except Exception as error:
            logger.exception("the engine failed")
            outbox.send(EngineFailed(f"{type(error).__name__}: {error}", is_user_error=False))
            return 1
        finally:
            inbox.close(linger=0)
            outbox_socket.close(linger=LINGER_MS)
    return 0


def _connect(context: "zmq.Context[zmq.Socket[bytes]]", kind: int, path: Path) -> "zmq.Socket[bytes]":
    socket = context.socket(kind)
    socket.set_hwm(0)
    socket.connect(f"ipc://{path}")
    return socket


def _factory(name: str) -> CoreFactory:
    """The object that `module:attribute` names."""
    module, _, attribute = name.partition(":")
    return cast("CoreFactory", getattr(importlib.import_module(module), attribute))


def _die_with_parent(parent_pid: int) -> None:
    """Have the kernel end this process when its parent ends, however that happens."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it ended before the call
        os._exit(1)


def main() -> int:
    """Entry of the process: its private folder, the core's name and the parent's process id are the arguments."""
    directory, core_name, parent_pid = sys.argv[1:]
    _die_with_parent(int(parent_pid))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return _run(Path(directory), core_name)


if __name__ == "__main__":
    sys.exit(main())
