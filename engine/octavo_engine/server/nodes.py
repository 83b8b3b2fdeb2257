"""The nodes of one engine: node 0 serves, the others lend it their ranks, and all end together.

Every other node joins node 0 over TCP, says how it was started, and waits until all are there. Then the ranks start,
and the connection says no more than that both ends live, until one of them tells why it ends. It carries no requests
and no secrets, and needs a network that only the engine's nodes share.
"""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable
from typing import Any, Final, Protocol

import msgspec

from octavo_engine import __version__
from octavo_engine.config import EngineConfig
from octavo_engine.engine_process import LOOPBACK, Rendezvous
from octavo_engine.errors import ConfigError

logger = logging.getLogger(__name__)

RETRY_S: Final = 1.0
# A machine that vanishes is missed after KEEPALIVE_IDLE_S + KEEPALIVE_COUNT * KEEPALIVE_INTERVAL_S.
KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_COUNT = 10, 5, 3
# What each node may have for itself; all else decides what the ranks compute.
OWN_FIELDS: Final = frozenset(
    {"host", "port", "node_rank", "leader_address", "num_threads", "kernel_cache_dir", "log_level"}
)


class Join(msgspec.Struct, frozen=True, tag=True):
    """A node's first word to node 0: how it was started."""

    node_rank: int
    version: str
    config: dict[str, Any]


class Start(msgspec.Struct, frozen=True, tag=True):
    """Node 0's answer when all are there: the port where ranks meet."""

    port: int


class Refuse(msgspec.Struct, frozen=True, tag=True):
    """Node 0's answer to a node that does not belong to it."""

    reason: str


class End(msgspec.Struct, frozen=True, tag=True):
    """Either end's last word. reason: of a failure; None: node 0 was told to stop."""

    reason: str | None


Message = Join | Start | Refuse | End
OnLost = Callable[[str], None]
OnProgress = Callable[[str], None]


class Node(Protocol):
    """This node, alone or as one of several."""

    async def meet(self) -> Rendezvous | None:
        """Wait for all nodes, if there are others. Raises ConfigError where they do not belong together."""

    async def wait_end(self) -> None:
        """Wait until node 0 was told to stop; for ever on node 0 itself."""

    async def close(self, reason: str | None) -> None:
        """Tell the other nodes that this one ends, and why if it failed."""


def make_node(config: EngineConfig, on_lost: OnLost, on_progress: OnProgress) -> Node:
    """on_lost: called if another node fails after `meet`; on_progress: with what `meet` waits for"""
    if config.num_nodes == 1:
        return _OnlyNode()
    return (_FollowingNode if config.node_rank else _LeadingNode)(config, on_lost, on_progress)


class _OnlyNode:
    """The node of an engine that needs no other."""

    async def meet(self) -> None:
        """As `Node.meet`."""

    async def wait_end(self) -> None:
        """As `Node.wait_end`."""
        await asyncio.Event().wait()

    async def close(self, reason: str | None) -> None:
        """As `Node.close`."""


class _LeadingNode:
    """Node 0, which all others join."""

    def __init__(self, config: EngineConfig, on_lost: OnLost, on_progress: OnProgress) -> None:
        self._config, self._on_lost, self._on_progress = config, on_lost, on_progress
        self._links: dict[int, _Link] = {}
        self._is_complete = asyncio.Event()
        self._is_closed = False
        self._server: asyncio.Server | None = None

    async def meet(self) -> Rendezvous:
        """As `Node.meet`."""
        _, port = self._config.leader
        self._server = await asyncio.start_server(self._admit, sock=_listen_everywhere(port))
        self._report()
        await self._is_complete.wait()
        listener = _listen_everywhere(0)
        rendezvous = Rendezvous(LOOPBACK, listener.getsockname()[1], listener)
        for link in self._links.values():
            await link.send(Start(rendezvous.port))
        return rendezvous

    async def wait_end(self) -> None:
        """As `Node.wait_end`."""
        await asyncio.Event().wait()

    async def close(self, reason: str | None) -> None:
        """As `Node.close`."""
        self._is_closed = True
        for link in list(self._links.values()):
            await link.send(End(reason))
            await link.close()
        if self._server:
            self._server.close()

    async def _admit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A node's connection, from its first word to its last."""
        link = _Link(reader, writer)
        join = await link.receive()
        if not isinstance(join, Join):
            await link.close()
            return
        if refusal := self._refusal(join):
            logger.warning("node %d is refused: %s", join.node_rank, refusal)
            await link.send(Refuse(refusal))
            await link.close()
            return
        self._links[join.node_rank] = link
        self._report()
        if len(self._links) == self._config.num_nodes - 1:
            self._is_complete.set()
        last_word = await link.receive()
        if not self._is_complete.is_set():
            del self._links[join.node_rank]  # it may come again
            await link.close()
            self._report()
        elif not self._is_closed:
            self._on_lost(f"node {join.node_rank}: {_last_reason(last_word)}")

    def _refusal(self, join: Join) -> str | None:
        if join.version != __version__:
            return f"node {join.node_rank} runs Octavo {join.version}, node 0 {__version__}"
        if join.node_rank in self._links or not 0 < join.node_rank < self._config.num_nodes:
            return f"node_rank={join.node_rank} is taken, or none of {self._config.num_nodes} nodes"
        own = shared_fields(self._config)
        for name in sorted({*own, *join.config}):
            if own.get(name) != join.config.get(name):
                theirs, ours = join.config.get(name), own.get(name)
                return f"node {join.node_rank} was started with {name}={theirs}, node 0 with {ours}"
        return None

    def _report(self) -> None:
        missing = sorted({*range(1, self._config.num_nodes)} - set(self._links))
        self._on_progress(f"waiting for node {', '.join(map(str, missing))}" if missing else "all nodes are there")


class _FollowingNode:
    """Any other node."""

    def __init__(self, config: EngineConfig, on_lost: OnLost, on_progress: OnProgress) -> None:
        self._config, self._on_lost, self._on_progress = config, on_lost, on_progress
        self._link: _Link | None = None
        self._watching: asyncio.Task[None] | None = None
        self._has_ended = asyncio.Event()

    async def meet(self) -> Rendezvous:
        """As `Node.meet`."""
        host, port = self._config.leader
        self._on_progress(f"waiting for node 0 at {host}:{port} and for all others")
        join = Join(self._config.node_rank, __version__, shared_fields(self._config))
        while True:
            try:
                self._link = _Link(*await asyncio.open_connection(host, port))
            except OSError as error:
                logger.debug("node 0 does not answer yet: %s", error)
                await asyncio.sleep(RETRY_S)
                continue
            await self._link.send(join)
            answer = await self._link.receive()
            if isinstance(answer, Refuse):
                raise ConfigError(answer.reason)
            if isinstance(answer, Start):
                self._watching = asyncio.create_task(self._watch(self._link))
                return Rendezvous(host, answer.port)
            await self._link.close()
            await asyncio.sleep(RETRY_S)

    async def wait_end(self) -> None:
        """As `Node.wait_end`."""
        await self._has_ended.wait()

    async def close(self, reason: str | None) -> None:
        """As `Node.close`."""
        if self._watching:
            self._watching.cancel()
        if self._link:
            await self._link.send(End(reason))
            await self._link.close()

    async def _watch(self, link: "_Link") -> None:
        last_word = await link.receive()
        if last_word == End(None):
            self._has_ended.set()
        else:
            self._on_lost(f"node 0: {_last_reason(last_word)}")


class _Link:
    """A connection that carries a message a line, and notices when the other machine is gone."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        connection: socket.socket = writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_COUNT)

    async def send(self, message: Message) -> None:
        """Nobody may be there any more: then there is nothing to say."""
        if self._writer.is_closing():
            return
        try:
            self._writer.write(msgspec.json.encode(message) + b"\n")
            await self._writer.drain()
        except OSError as error:
            logger.debug("a node is gone: %s", error)

    async def receive(self) -> Message | None:
        """The next message; None if there is none, because the connection ended or somebody else speaks."""
        try:
            line = await self._reader.readline()
            return msgspec.json.decode(line, type=Message) if line else None
        except (OSError, ValueError) as error:  # a line too long, or no message, is a ValueError
            logger.debug("no word from a node: %s", error)
            return None

    async def close(self) -> None:
        """Close the connection."""
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()


def _last_reason(message: Message | None) -> str:
    if not isinstance(message, End):
        return "the connection to it broke"
    return "it was told to stop" if message.reason is None else message.reason


def shared_fields(config: EngineConfig) -> dict[str, Any]:
    """What must be the same on all nodes."""
    return config.model_dump(mode="json", exclude=set(OWN_FIELDS))


def _listen_everywhere(port: int) -> socket.socket:
    """A listening socket on all interfaces, IPv4 and IPv6. Raises ConfigError if the port is taken."""
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        raise ConfigError(f"cannot listen for other nodes on port {port}: {error.strerror or error}") from None
