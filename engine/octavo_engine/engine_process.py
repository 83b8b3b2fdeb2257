"""The engine's process: it runs one core behind two ZeroMQ sockets, and nothing else.

Messages are those of `protocol.py`. `EngineProcess` is the front end's handle; `python -m octavo_engine.engine_process`
is the process itself. It dies with its parent, leaves SIGINT and SIGTERM to the front end, which drains, and says
`EngineFailed` before it ends on an error. What a core computes is the core's own affair: any object that satisfies
`Core` will do.

An engine that is spread over several devices has one such process for each, a rank. Rank 0 takes the requests, the
others follow it (`ranks.py`); where one ends, all do.
"""

import ctypes
import importlib
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, cast

import msgspec
import zmq

from octavo_engine.config import EngineConfig, load_config
from octavo_engine.errors import EngineDeadError, OctavoError, RankLostError
from octavo_engine.garbage_collection import spare_old_objects
from octavo_engine.logs import configure_logging
from octavo_engine.protocol import (
    AbortRequests,
    AddRequest,
    EngineFailed,
    EngineMessage,
    EnginePhase,
    EngineReady,
    FrontEndMessage,
    Seat,
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
# What a rank ends with when another one is gone: what happened is the other's to say.
LOST_EXIT: Final = 3
LOOPBACK: Final = "127.0.0.1"


class Core(Protocol):
    """What the process runs. `step` answers each request until it is finished, aborted or failed."""

    @property
    def has_work(self) -> bool:
        """Whether `step` would do something."""

    def ready(self) -> EngineReady:
        """What the core settled on while it loaded."""

    def add_request(self, request: AddRequest) -> None:
        """Queue a request. One that can never run is answered by the next step, with its error."""

    def abort(self, request: AbortRequests) -> None:
        """End requests or one sequence of them; unknown ones are ignored."""

    def step(self) -> StepOutputs:
        """Run one batch."""


CoreFactory = Callable[..., Core]


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Where the ranks of an engine meet: a key-value store that rank 0 keeps. listener: its socket, on that node."""

    host: str
    port: int
    listener: socket.socket | None = None

    @classmethod
    def open(cls, host: str = LOOPBACK) -> "Rendezvous":
        """Listen on an interface's free port."""
        listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        return cls(host, listener.getsockname()[1], listener)


class EngineProcess:
    """The front end's handle of the engine's process: two sockets, a private folder and the process itself.

    Messages go out by `send`; they come in by `receive`, which never waits: `outputs_fd` is readable when there may be
    some, and one of `exit_fds` once a process has ended. All belong to this object.
    """

    def __init__(self, config: EngineConfig, core: str = DEFAULT_CORE, rendezvous: Rendezvous | None = None) -> None:
        """rendezvous: with ranks of other nodes; None: all ranks are here"""
        self._directory = Path(tempfile.mkdtemp(prefix="octavo-"))
        (self._directory / CONFIG_FILE).write_text(config.to_yaml(), encoding="utf-8")
        self._context = zmq.Context(io_threads=1)
        self._requests = self._bind(zmq.PUSH, REQUESTS_SOCKET)
        self._outputs = self._bind(zmq.PULL, OUTPUTS_SOCKET)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[EngineMessage] = msgspec.msgpack.Decoder(EngineMessage)
        self._is_alone, self._first_rank = config.num_ranks == 1, config.node_rank * config.num_local_ranks
        self._popens = self._spawn_all(config, core, rendezvous)
        self.exit_fds = [os.pidfd_open(popen.pid) for popen in self._popens]
        self.outputs_fd = int(self._outputs.getsockopt(zmq.FD))

    def _spawn_all(
        self, config: EngineConfig, core: str, rendezvous: Rendezvous | None
    ) -> "list[subprocess.Popen[bytes]]":
        if config.num_ranks == 1:
            return [self._spawn(core, None)]
        rendezvous = rendezvous or Rendezvous.open()
        popens = []
        for local_rank in range(config.num_local_ranks):
            rank = self._first_rank + local_rank
            listener = rendezvous.listener if rank == 0 else None
            seat = Seat(
                rank, config.num_ranks, local_rank, config.num_local_ranks, rendezvous.host, rendezvous.port,
                listener.fileno() if listener else None,
            )  # fmt: skip
            popens.append(self._spawn(core, seat))
        if rendezvous.listener:
            rendezvous.listener.close()  # rank 0 has it
        return popens

    def _spawn(self, core: str, seat: Seat | None) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "octavo_engine.engine_process", str(self._directory), core, str(os.getpid())]
        if seat:
            command.append(msgspec.json.encode(seat).decode())
        inherited = [seat.store_fd] if seat and seat.store_fd is not None else []
        # A process group of its own: the terminal's Ctrl-C is for the front end, which drains.
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0, pass_fds=inherited)

    def _bind(self, kind: int, name: str) -> "zmq.Socket[bytes]":
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.LINGER, 0)
        socket.set_hwm(0)
        socket.bind(f"ipc://{self._directory / name}")
        return socket

    @property
    def pids(self) -> list[int]:
        """The processes' ids, in the order of their ranks."""
        return [popen.pid for popen in self._popens]

    @property
    def _exit_codes(self) -> dict[int, int]:
        """Of the ranks that have ended, negative for a signal."""
        codes = {rank: popen.poll() for rank, popen in enumerate(self._popens, self._first_rank)}
        return {rank: code for rank, code in codes.items() if code is not None}

    @property
    def was_ended_by_others(self) -> bool:
        """Whether all that ended did so because another rank was gone, or told them to."""
        return set(self._exit_codes.values()) <= {0, LOST_EXIT}

    @property
    def obituary(self) -> str | None:
        """Which process ended, and how; None while all run. Those that ended because another did come last."""
        codes = self._exit_codes
        if not codes:
            return None
        rank = min(codes, key=lambda rank: codes[rank] == LOST_EXIT)
        name = "the engine process" if self._is_alone else f"rank {rank} of the engine"
        return f"{name} ended unexpectedly (exit code {codes[rank]})"

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
        """End the processes, gently for `timeout_s` if all still run, and free what they held."""
        end_s = time.monotonic() + timeout_s
        try:
            if self.obituary is None:
                if self._first_rank == 0:  # which takes the others along, also on other nodes
                    self.send(Shutdown())
                for popen in self._popens:
                    popen.wait(max(0.0, end_s - time.monotonic()))
        except (EngineDeadError, subprocess.TimeoutExpired):
            pass
        for popen in self._popens:
            popen.kill()
            popen.wait()
        for exit_fd in self.exit_fds:
            os.close(exit_fd)
        self._context.destroy(linger=0)
        self.unlink_sockets()


class _Outbox:
    """The engine's end of the socket to the front end."""

    def __init__(self, socket: "zmq.Socket[bytes]") -> None:
        self._socket = socket
        self._encoder = msgspec.msgpack.Encoder()
        self._last_phase = EnginePhase("starting")

    def send(self, message: EngineMessage) -> None:
        self._socket.send(self._encoder.encode(message))

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
                core.add_request(message)
        if core.has_work:
            outbox.send(core.step())


def _drain(inbox: "zmq.Socket[bytes]", *, wait: bool) -> Iterator[bytes]:
    """The frames that have arrived; with `wait`, at least one."""
    if wait:
        yield inbox.recv()
    while True:
        try:
            yield inbox.recv(zmq.NOBLOCK)
        except zmq.Again:
            return


def _run(directory: Path, core_name: str, seat: Seat | None) -> int:
    """The process's life; the exit code."""
    config = load_config({}, {}, directory / CONFIG_FILE)
    configure_logging(config.log_level)
    is_leading = seat is None or seat.rank == 0
    with zmq.Context(io_threads=1) as context:
        inbox = _connect(context, zmq.PULL, directory / REQUESTS_SOCKET) if is_leading else None
        outbox_socket = _connect(context, zmq.PUSH, directory / OUTPUTS_SOCKET)
        outbox = _Outbox(outbox_socket)
        try:
            factory = _factory(core_name)
            if seat is None:
                assert inbox is not None
                _serve(factory(config, outbox.report_phase), inbox, outbox)
            else:
                _run_rank(factory, config, seat, inbox, outbox)
        except OctavoError as error:
            outbox.send(EngineFailed(str(error), is_user_error=True))
            return 2
        except ModuleNotFoundError as error:
            message = f"the engine needs the package {error.name}: `pip install 'octavo[engine]'` brings it"
            outbox.send(EngineFailed(message, is_user_error=True))
            return 2
        except RankLostError as error:
            logger.warning("%s", error)
            return LOST_EXIT
        except Exception as error:
            logger.exception("the engine failed")
            outbox.send(EngineFailed(f"{type(error).__name__}: {error}", is_user_error=False))
            return 1
        finally:
            if inbox:
                inbox.close(linger=0)
            outbox_socket.close(linger=LINGER_MS)
    return 0


def _run_rank(
    factory: CoreFactory, config: EngineConfig, seat: Seat, inbox: "zmq.Socket[bytes] | None", outbox: _Outbox
) -> None:
    """One of several ranks: rank 0 takes the requests; the first of a node says how far the start has come."""
    from octavo_engine.ranks import LeadingCore, ShardedCore, follow

    is_first = seat.local_rank == 0
    core = cast("ShardedCore", factory(config, outbox.report_phase if is_first else lambda phase: None, seat))
    assert core.ranks is not None
    if inbox:
        leading = LeadingCore(core, core.ranks)
        _serve(leading, inbox, outbox)
        leading.close()
    else:
        if is_first:
            outbox.send(core.ready())
        spare_old_objects()
        follow(core, core.ranks)


def _serve(core: Core, inbox: "zmq.Socket[bytes]", outbox: _Outbox) -> None:
    outbox.send(core.ready())
    spare_old_objects()
    run_core(core, inbox, outbox)


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
    """Entry of the process: its private folder, the core's name, the parent's process id and, of one among several
    ranks, its seat are the arguments."""
    directory, core_name, parent_pid, *rest = sys.argv[1:]
    seat = msgspec.json.decode(rest[0], type=Seat) if rest else None
    _die_with_parent(int(parent_pid))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    exit_code = _run(Path(directory), core_name, seat)
    if seat:
        # Communicators that are taken down wait for ranks that may be gone.
        os._exit(exit_code)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
