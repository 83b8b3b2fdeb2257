"""Runs the ranks of an engine: as threads, cheaply, or as processes, where each needs a GPU or the interpreter."""

import multiprocessing
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from multiprocessing.connection import Connection
from unittest import mock

from octavo_engine import parallel
from octavo_engine.config import EngineConfig
from octavo_engine.core import EngineCore
from octavo_engine.parallel import Ranks
from octavo_engine.protocol import AddRequest, Seat
from octavo_engine.ranks import LeadingCore, follow
from octavo_kernels.launch import interpret_on_cpu
from torch._C import _distributed_c10d as c10d


def ignore(phase: object) -> None:
    pass


@contextmanager
def thread_ranks(size: int, run: Callable[[int], None]) -> Iterator[None]:
    """Run every rank but 0 in a thread, while the caller is rank 0; they meet in this process."""
    store, errors = c10d.HashStore(), []

    def join(seat: Seat, tensor_size: int, device) -> Ranks:
        return Ranks(store, seat.rank, seat.num_ranks, tensor_size, device)

    def guarded(rank: int) -> None:
        try:
            run(rank)
        except BaseException as error:  # noqa: BLE001 (the test's thread raises it)
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(rank,), daemon=True) for rank in range(1, size)]
    # A rank of this process that fails closes no connection: the others notice only by waiting in vain.
    patience = {"COLLECTIVE_TIMEOUT": timedelta(seconds=60), "IDLE_TIMEOUT": timedelta(seconds=60)}
    with mock.patch.object(Ranks, "join", join), mock.patch.multiple(parallel, **patience):
        for thread in threads:
            thread.start()
        yield
        for thread in threads:
            thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "a rank goes on"
    if errors:
        raise errors[0]


def seat_of(rank: int, size: int) -> Seat:
    """As if each rank had a node of its own: there may be more of them than cores."""
    return Seat(rank, size, local_rank=0, num_local_ranks=1, store_host="", store_port=0)


@contextmanager
def sharded_core(config: EngineConfig) -> Iterator[tuple[LeadingCore | EngineCore, EngineCore]]:
    """Rank 0's core, alone and with the others behind it, each rank a thread of this process."""
    size = config.num_ranks
    if size == 1:
        core = EngineCore(config, ignore)
        yield core, core
        return

    def run(rank: int) -> None:
        core = EngineCore(config, ignore, seat_of(rank, size))
        follow(core, core.ranks)

    with thread_ranks(size, run):
        core = EngineCore(config, ignore, seat_of(0, size))
        leading = LeadingCore(core, core.ranks)
        try:
            yield leading, core
        finally:
            leading.close()


@contextmanager
def process_core(config: EngineConfig, *, is_interpreted: bool = False) -> Iterator[tuple[LeadingCore, EngineCore]]:
    """The same with a process for each rank but this one."""
    others = range(1, config.num_ranks)
    with (
        spawned(config, others, _follow_in_process, is_interpreted) as seats,
        interpret_on_cpu() if is_interpreted else nullcontext(),
    ):
        core = EngineCore(config, ignore, seats[0])
        leading = LeadingCore(core, core.ranks)
        yield leading, core
        leading.close()


def generate_in_processes(config: EngineConfig, requests: list[AddRequest]) -> dict[tuple[str, int], list[int]]:
    """The tokens of an engine each of whose ranks is a process."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    with spawned(config, range(config.num_ranks), _generate_in_process, requests, sender):
        assert receiver.poll(300), "no answer"
        return receiver.recv()


@contextmanager
def spawned(config: EngineConfig, ranks: Sequence[int], target: Callable[..., None], *arguments: object):
    """Processes that run `target(config, seat, *arguments)`; the seats of all ranks."""
    size = config.num_ranks
    listener, store_fd = socket.create_server(("127.0.0.1", 0)), None
    port = listener.getsockname()[1]
    if 0 in ranks:
        listener.close()  # a process of its own opens the port itself
    else:
        # The store of this process's rank 0 closes it. Closing it here, too, would hit what has its number by then.
        store_fd = listener.detach()
    seats = [Seat(rank, size, rank, size, "127.0.0.1", port, None if rank else store_fd) for rank in range(size)]
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=target, args=(config, seats[rank], *arguments)) for rank in ranks]
    for process in processes:
        process.start()
    try:
        yield seats
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
    finally:
        for process in processes:
            process.kill()
            process.join()


def _follow_in_process(config: EngineConfig, seat: Seat, is_interpreted: bool) -> None:
    with interpret_on_cpu() if is_interpreted else nullcontext():
        core = EngineCore(config, ignore, seat)
        follow(core, core.ranks)


def _generate_in_process(config: EngineConfig, seat: Seat, requests: list[AddRequest], sender: Connection) -> None:
    core = EngineCore(config, ignore, seat if seat.num_ranks > 1 else None)
    if seat.rank:
        follow(core, core.ranks)
        return
    leading = LeadingCore(core, core.ranks) if core.ranks else core
    for request in requests:
        leading.add_request(request)
    answers: dict[tuple[str, int], list[int]] = {}
    while leading.has_work:
        for output in leading.step().outputs:
            answers.setdefault((output.request_id, output.index), []).extend(output.token_ids)
    if core.ranks:
        leading.close()
    sender.send(answers)
