"""The ranks of one engine: which share of the model a rank holds, and how they exchange what they computed.

One rank is one process with one device. All take the same steps, each with a share of every layer's weights
(Megatron-LM, arXiv:1909.08053): heads and the MLP's features are divided, and what attention and MLP make of them is
summed over a `Group`. After a collective its ranks hold the same bits, so that all sample the same tokens. Groups may
stand behind one another, each with consecutive layers: the stages of a `Pipeline`. This module knows torch's process
groups and nothing of models.
"""

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import cast

import torch
from torch import distributed
from torch._C import _distributed_c10d as c10d

from octavo_engine.errors import RankLostError
from octavo_engine.protocol import Seat

# How long ranks wait for each other: at the start for the slowest download, in a step for the slowest compilation. One
# that ends is noticed by whoever started it.
JOIN_TIMEOUT = timedelta(days=1)
COLLECTIVE_TIMEOUT = timedelta(minutes=10)
# Between steps they wait for requests. A peer that ends closes its connection, which no wait survives.
IDLE_TIMEOUT = timedelta(days=3650)
# A message of rank 0 up to this size takes one collective, a longer one two.
MESSAGE_BYTES = 4096
LENGTH_BYTES = 8
# Of what stages send each other: all in one order.
TAG = 0

# NCCL's communicators outlive the CUDA graphs that hold their calls: they end with the process.
_communicators: list[object] = []


class Group:
    """The ranks that hold a share of the same layers, seen by one of them.

    Exchanges are in the order of the device's work, and may be recorded in a CUDA graph. Raises RankLostError where
    another rank is gone.
    """

    def __init__(self, store: c10d.Store, rank: int, size: int, device: torch.device) -> None:
        """store: where these ranks, and no others, meet"""
        self.rank, self.size = rank, size
        self._data = _open(store, rank, size, device, COLLECTIVE_TIMEOUT)
        self.all_reduce(torch.zeros(1, device=device))  # connects, which nothing that is recorded may do

    def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in place. values: of one shape and type on all ranks, contiguous"""
        try:
            distributed.all_reduce(values, group=self._data)
        except RuntimeError as error:
            raise _lost(self.rank, error) from error
        return values

    def all_gather_columns(self, values: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        """Each rank's columns beside those of the ranks before it.

        values:  [num_rows, width], contiguous, of one shape on all ranks
        widths:  how many columns of each rank count
        Returns  [num_rows, sum(widths)], contiguous
        """
        gathered = values.new_empty(self.size * len(values), values.shape[1])
        try:
            distributed.all_gather_into_tensor(gathered, values, group=self._data)
        except RuntimeError as error:
            raise _lost(self.rank, error) from error
        return torch.cat(
            [part[:, :width] for part, width in zip(gathered.chunk(self.size), widths, strict=True)], dim=1
        )

    def share(self, count: int) -> slice:
        """Which of `count` things are this rank's, where each has as many."""
        size, rest = divmod(count, self.size)
        assert not rest, f"{count} things among {self.size} ranks"
        return slice(self.rank * size, (self.rank + 1) * size)

    def share_or_copy(self, count: int) -> slice:
        """The same, where several ranks share one thing if there are too few."""
        if count % self.size == 0:
            return self.share(count)
        copies, rest = divmod(self.size, count)
        assert not rest, f"{count} things among {self.size} ranks"
        return slice(self.rank // copies, self.rank // copies + 1)

    def padded_shares(self, count: int) -> list[slice]:
        """Each rank's part of `count` things, where the last ranks may have fewer, or none."""
        size = -(-count // self.size)
        return [slice(min(rank * size, count), min((rank + 1) * size, count)) for rank in range(self.size)]


class Pipeline:
    """The stages of an engine, each with layers of its own, seen by one rank of one of them.

    Rank r of a stage gets hidden states from rank r of the stage before. The last stage holds the ranks from 0 on, so
    that rank 0 sees the logits; all others learn from it what was sampled.
    """

    def __init__(self, store: c10d.Store, rank: int, size: int, tensor_size: int, device: torch.device) -> None:
        self.num_stages = size // tensor_size
        self.stage = self.num_stages - 1 - rank // tensor_size
        self._rank, self._before, self._behind = rank, rank + tensor_size, rank - tensor_size
        self._data = _open(store, rank, size, device, COLLECTIVE_TIMEOUT)
        self.share_tokens(torch.zeros(1, dtype=torch.int64, device=device))

    @property
    def is_first(self) -> bool:
        """Whether this stage looks tokens up."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Whether this stage computes logits."""
        return self.stage == self.num_stages - 1

    def layers(self, num_layers: int) -> range:
        """Which of a model's layers are this stage's: as many as another's, or one less."""
        return range(self.stage * num_layers // self.num_stages, (self.stage + 1) * num_layers // self.num_stages)

    def receive(self, hidden: torch.Tensor) -> torch.Tensor:
        """Fill [num_tokens, hidden_size] with what the stage before computed."""
        try:
            self._data.recv([hidden], self._before, TAG).wait()
        except RuntimeError as error:
            raise _lost(self._rank, error) from error
        return hidden

    def send(self, hidden: torch.Tensor) -> None:
        """Give the next stage what this one computed; contiguous."""
        try:
            self._data.send([hidden], self._behind, TAG).wait()
        except RuntimeError as error:
            raise _lost(self._rank, error) from error

    def share_tokens(self, token_ids: torch.Tensor) -> None:
        """Replace what other ranks sampled, from nothing, by rank 0's tokens."""
        try:
            distributed.broadcast(token_ids, group=self._data, group_src=0)
        except RuntimeError as error:
            raise _lost(self._rank, error) from error


class Ranks:
    """All ranks of an engine, seen by one of them, and what they say to each other beside the model's work.

    tensor:   those that share this rank's layers; None: it has them alone
    pipeline: None: all ranks have all layers
    """

    def __init__(
        self, store: c10d.Store, rank: int, size: int, tensor_size: int, device: torch.device, *, is_local: bool = True
    ) -> None:
        """store: where the ranks meet; is_local: they all run on this node"""
        self.rank, self.size = rank, size
        self._store = store
        if is_local:
            # Whatever the host's name resolves to.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        # NVLink's multicast: a process that is killed while it uses it can leave the node's GPUs unusable.
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
        self._control = _open(c10d.PrefixStore("control", store), rank, size, torch.device("cpu"), IDLE_TIMEOUT)
        self._message = torch.zeros(LENGTH_BYTES + MESSAGE_BYTES, dtype=torch.uint8)
        self.tensor: Group | None = None
        self.pipeline: Pipeline | None = None
        if tensor_size > 1:
            of_stage = c10d.PrefixStore(f"tensor/{rank // tensor_size}", store)
            self.tensor = Group(of_stage, rank % tensor_size, tensor_size, device)
        if size > tensor_size:
            self.pipeline = Pipeline(c10d.PrefixStore("pipeline", store), rank, size, tensor_size, device)

    @classmethod
    def join(cls, seat: Seat, tensor_size: int, device: torch.device) -> "Ranks":
        """Wait for all ranks. Raises RankLostError if they do not come."""
        try:
            store = c10d.TCPStore(
                seat.store_host, seat.store_port, seat.num_ranks, is_master=seat.rank == 0, timeout=JOIN_TIMEOUT,
                master_listen_fd=seat.store_fd,
            )  # fmt: skip
            is_local = seat.num_local_ranks == seat.num_ranks
            return cls(store, seat.rank, seat.num_ranks, tensor_size, device, is_local=is_local)
        except (RuntimeError, ValueError) as error:
            raise RankLostError(f"rank {seat.rank} does not reach the others: {error}") from error

    def broadcast(self, message: bytes) -> None:
        """Rank 0 tells all others, who `receive`."""
        self._message[:LENGTH_BYTES].view(torch.int64)[0] = len(message)
        body = torch.frombuffer(bytearray(message), dtype=torch.uint8)
        if len(message) <= MESSAGE_BYTES:
            self._message[LENGTH_BYTES : LENGTH_BYTES + len(message)] = body
        self._broadcast(self._message)
        if len(message) > MESSAGE_BYTES:
            self._broadcast(body)

    def receive(self) -> bytes:
        """Wait for what rank 0 tells."""
        self._broadcast(self._message)
        length = int(self._message[:LENGTH_BYTES].view(torch.int64)[0])
        body = self._message[LENGTH_BYTES : LENGTH_BYTES + length]
        if length > MESSAGE_BYTES:
            body = torch.empty(length, dtype=torch.uint8)
            self._broadcast(body)
        return body.numpy().tobytes()

    def _broadcast(self, values: torch.Tensor) -> None:
        try:
            distributed.broadcast(values, group=self._control, group_src=0)
        except RuntimeError as error:
            raise _lost(self.rank, error) from error

    def tell_all(self, topic: str, text: str) -> list[str]:
        """What each rank says to a topic, in their order. A topic serves once."""
        self._store.set(f"{topic}/{self.rank}", text)
        try:
            return [self._store.get(f"{topic}/{rank}").decode() for rank in range(self.size)]
        except RuntimeError as error:
            raise _lost(self.rank, error) from error


def _open(
    store: c10d.Store, rank: int, size: int, device: torch.device, timeout: timedelta
) -> distributed.ProcessGroup:
    """Not torch's default group, of which a process has one: tests run several ranks in one process."""
    backend = c10d.ProcessGroupNCCL if device.type == "cuda" else c10d.ProcessGroupGloo
    opened = backend(store, rank, size, timeout)  # type: ignore[arg-type]
    if device.type == "cuda":
        _communicators.append(opened)
    # Collectives take a backend as they take a group of one.
    return cast("distributed.ProcessGroup", opened)


def _lost(rank: int, error: RuntimeError) -> RankLostError:
    return RankLostError(f"rank {rank} has lost another one: {str(error).splitlines()[0]}")
