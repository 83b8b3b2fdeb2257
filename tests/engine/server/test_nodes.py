"""The nodes of an engine: they meet, refuse who does not belong, and learn of each other's end."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest
from octavo_engine.config import EngineConfig
from octavo_engine.engine_process import Rendezvous
from octavo_engine.errors import ConfigError
from octavo_engine.server.nodes import Node, make_node

TIMEOUT_S = 10


@dataclass
class Witness:
    """A node and what it said."""

    node: Node
    lost: asyncio.Queue[str] = field(default_factory=asyncio.Queue)
    waits: asyncio.Queue[str] = field(default_factory=asyncio.Queue)

    async def next_loss(self) -> str:
        return await asyncio.wait_for(self.lost.get(), TIMEOUT_S)

    async def next_wait(self) -> str:
        return await asyncio.wait_for(self.waits.get(), TIMEOUT_S)

    async def meet(self) -> Rendezvous | None:
        """The listener is the caller's, who needs it no longer."""
        rendezvous = await asyncio.wait_for(self.node.meet(), TIMEOUT_S)
        if rendezvous and rendezvous.listener:
            assert rendezvous.listener.getsockname()[1] == rendezvous.port
            rendezvous.listener.close()
        return rendezvous


class Nodes:
    """The nodes of one test, closed at its end."""

    def __init__(self, port: int) -> None:
        self.fields = {"model": "m", "tensor_parallel_size": 6, "leader_address": f"127.0.0.1:{port}"}
        self.made: list[Witness] = []

    def make(self, node_rank: int, *, num_nodes: int = 2, **fields) -> Witness:
        config = EngineConfig(**{**self.fields, "num_nodes": num_nodes, "node_rank": node_rank, **fields})
        witness = Witness(None)
        witness.node = make_node(config, witness.lost.put_nowait, witness.waits.put_nowait)
        self.made.append(witness)
        return witness


@pytest.fixture
async def nodes(free_tcp_port: int) -> AsyncIterator[Nodes]:
    made = Nodes(free_tcp_port)
    yield made
    for witness in reversed(made.made):
        await witness.node.close(None)


async def meet(*witnesses: Witness) -> list[Rendezvous | None]:
    return await asyncio.gather(*(witness.meet() for witness in witnesses))


async def test_ranks_of_all_nodes_get_one_rendezvous(nodes: Nodes) -> None:
    witnesses = [nodes.make(rank, num_nodes=3, port=8000 + rank) for rank in range(3)]
    first, *others = await meet(*witnesses)
    assert [(each.host, each.port, each.listener) for each in others] == [("127.0.0.1", first.port, None)] * 2
    assert await witnesses[0].next_wait() == "waiting for node 1, 2"


async def test_an_engine_on_one_node_waits_for_nobody(nodes: Nodes) -> None:
    assert await meet(nodes.make(0, num_nodes=1)) == [None]


@pytest.mark.parametrize("reason", [None, "rank 2 of the engine ended unexpectedly (exit code -9)"])
async def test_other_nodes_learn_how_node_0_ends(nodes: Nodes, reason: str | None) -> None:
    leader, follower = nodes.make(0), nodes.make(1)
    await meet(leader, follower)
    await leader.node.close(reason)
    if reason is None:
        await asyncio.wait_for(follower.node.wait_end(), TIMEOUT_S)
        assert follower.lost.empty()
    else:
        assert await follower.next_loss() == f"node 0: {reason}"


@pytest.mark.parametrize(("reason", "told"), [("there is no GPU", "there is no GPU"), (None, "it was told to stop")])
async def test_node_0_learns_how_another_ends(nodes: Nodes, reason: str | None, told: str) -> None:
    leader, follower = nodes.make(0), nodes.make(1)
    await meet(leader, follower)
    await follower.node.close(reason)
    assert await leader.next_loss() == f"node 1: {told}"


async def test_a_connection_that_breaks_is_the_end(nodes: Nodes) -> None:
    leader, follower = nodes.make(0), nodes.make(1)
    await meet(leader, follower)
    follower.node._link._writer.transport.abort()
    assert await leader.next_loss() == "node 1: the connection to it broke"
    assert await follower.next_loss() == "node 0: the connection to it broke"


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"max_num_seqs": 7}, "node 1 was started with max_num_seqs=7, node 0 with None"),
        ({"num_nodes": 3, "node_rank": 2}, "node_rank=2 is taken, or none of 2 nodes"),
    ],
)
async def test_a_node_that_does_not_belong_is_refused(nodes: Nodes, fields, sentence: str) -> None:
    leader, stranger = nodes.make(0), nodes.make(**{"node_rank": 1, **fields})
    waiting = asyncio.create_task(leader.meet())
    with pytest.raises(ConfigError, match=sentence):
        await stranger.meet()
    await asyncio.gather(waiting, nodes.make(1).meet())


async def test_a_node_that_leaves_before_all_are_there_may_come_again(nodes: Nodes) -> None:
    leader, early = nodes.make(0, num_nodes=3), nodes.make(1, num_nodes=3)
    waiting = [asyncio.create_task(each.meet()) for each in (leader, early)]
    assert [await leader.next_wait(), await leader.next_wait()] == ["waiting for node 1, 2", "waiting for node 2"]
    waiting[1].cancel()
    await early.node.close(None)
    assert await leader.next_wait() == "waiting for node 1, 2"
    await asyncio.gather(waiting[0], *(nodes.make(rank, num_nodes=3).meet() for rank in (1, 2)))
    assert leader.lost.empty()


async def test_what_is_no_node_is_turned_away(nodes: Nodes) -> None:
    leader = nodes.make(0)
    waiting = asyncio.create_task(leader.meet())
    await leader.next_wait()
    host, port = nodes.fields["leader_address"].split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET / HTTP/1.1\r\n\r\n")
    assert await asyncio.wait_for(reader.read(), TIMEOUT_S) == b""
    writer.close()
    await writer.wait_closed()
    waiting.cancel()


async def test_a_port_that_is_taken_is_an_error(nodes: Nodes) -> None:
    first, second = nodes.make(0), nodes.make(0)
    waiting = asyncio.create_task(first.meet())
    await first.next_wait()
    with pytest.raises(ConfigError, match="cannot listen for other nodes on port"):
        await second.meet()
    waiting.cancel()
