"""How the ranks of an engine stay in step: each runs the same core, and rank 0 tells the others what they cannot know.

A core is deterministic but for the front end's messages and for how many rounds a step takes, which hangs on measured
times. Rank 0 says both before each step; scheduling, block tables and sampling then come out the same everywhere. That
they did is checked with the next step, by a digest of the tokens.
"""

from typing import Protocol

import msgspec

from octavo_engine.parallel import Ranks
from octavo_engine.protocol import AbortRequests, AddRequest, EngineReady, StepOutputs, Turn

_END = Turn([], max_rounds=0, digest=0)


class ShardedCore(Protocol):
    """A core whose model is spread over `ranks`."""

    ranks: Ranks | None

    @property
    def has_work(self) -> bool:
        """Whether `step` would do something."""

    def ready(self) -> EngineReady:
        """What the core settled on while it loaded."""

    def add_request(self, message: AddRequest) -> None:
        """Queue a request."""

    def abort(self, message: AbortRequests) -> None:
        """End requests or one sequence of them."""

    def max_rounds(self) -> int:
        """As many tokens for each sequence as this rank would have the next step bring."""

    def step(self, max_rounds: int | None = None) -> StepOutputs:
        """Run one batch, together with the other ranks."""


class LeadingCore:
    """Rank 0's core, which takes the other ranks along."""

    def __init__(self, core: ShardedCore, ranks: Ranks) -> None:
        self._core, self._ranks = core, ranks
        self._messages: list[AddRequest | AbortRequests] = []
        self._digest = 0
        self._encoder = msgspec.msgpack.Encoder()

    @property
    def has_work(self) -> bool:
        """As the core's."""
        return self._core.has_work

    def ready(self) -> EngineReady:
        """As the core's."""
        return self._core.ready()

    def add_request(self, message: AddRequest) -> None:
        """As the core's, here and with the next step everywhere."""
        self._core.add_request(message)
        self._messages.append(message)

    def abort(self, message: AbortRequests) -> None:
        """As the core's, here and with the next step everywhere."""
        self._core.abort(message)
        self._messages.append(message)

    def step(self) -> StepOutputs:
        """One step of all ranks; what rank 0 made of it."""
        turn = Turn(self._messages, self._core.max_rounds(), self._digest)
        self._messages = []
        self._ranks.broadcast(self._encoder.encode(turn))
        outputs = self._core.step(turn.max_rounds)
        self._digest = _digest(outputs)
        return outputs

    def close(self) -> None:
        """Let the other ranks end."""
        self._ranks.broadcast(self._encoder.encode(_END))


def follow(core: ShardedCore, ranks: Ranks) -> None:
    """Take rank 0's steps until it says that there are no more.

    Raises RuntimeError if this rank sampled other tokens than rank 0, after which nothing that they compute together
    would mean anything.
    """
    decoder = msgspec.msgpack.Decoder(Turn)
    digest = 0
    while (turn := decoder.decode(ranks.receive())).max_rounds:
        if turn.digest != digest:
            raise RuntimeError(f"rank {ranks.rank} sampled other tokens than rank 0")
        for message in turn.messages:
            if isinstance(message, AbortRequests):
                core.abort(message)
            else:
                core.add_request(message)
        digest = _digest(core.step(turn.max_rounds))


def _digest(outputs: StepOutputs) -> int:
    """The same on every rank: hashes of numbers depend on nothing else."""
    return hash(tuple(token_id for output in outputs.outputs for token_id in output.token_ids))
