"""One worker per key, no key twice, and patience with failures."""

import asyncio
import random

from octavo_operator.keyqueue import KeyQueue
from octavo_operator.observe import Key

A, B = Key("ns", "a"), Key("ns", "b")


async def test_a_key_that_waits_is_not_queued_twice():
    queue = KeyQueue()
    for key in (A, B, A):
        queue.add(key)
    assert queue.depth == 2
    assert [await queue.get(), await queue.get()] == [A, B]


async def test_a_key_in_work_is_worked_on_again_afterwards_and_not_meanwhile():
    queue = KeyQueue()
    queue.add(A)
    assert await queue.get() == A
    queue.add(A)
    queue.add(A)
    queue.add(B)
    assert await queue.get() == B
    queue.done(A)
    assert await queue.get() == A
    queue.done(A)
    queue.done(B)
    assert (queue.depth, queue.num_in_work) == (0, 0)


async def test_the_earliest_date_wins():
    queue = KeyQueue()
    queue.add_after(A, 60)
    queue.add_after(A, 0.01)
    queue.add_after(A, 60)
    assert await asyncio.wait_for(queue.get(), 1) == A


async def test_failures_wait_longer_each_time_up_to_a_limit():
    queue = KeyQueue(base_delay_s=1, max_delay_s=10, rng=random.Random(1))
    delays = [queue.retry(A) for _ in range(40)]
    assert all(0.75 * 2**number <= delay <= 1.25 * 2**number for number, delay in enumerate(delays[:3]))
    assert all(7.5 <= delay <= 12.5 for delay in delays[4:])
    queue.forget(A)
    assert queue.retry(A) <= 1.25


async def test_no_key_is_lost_and_none_is_held_twice_by_many_workers():
    queue = KeyQueue()
    keys = [Key("ns", str(number)) for number in range(20)]
    held, seen, rng = set(), dict.fromkeys(keys, 0), random.Random(2)

    async def worker():
        while True:
            key = await queue.get()
            assert key not in held
            held.add(key)
            seen[key] += 1
            await asyncio.sleep(0)
            held.discard(key)
            queue.done(key)

    workers = [asyncio.create_task(worker()) for _ in range(5)]
    for _ in range(500):
        queue.add(rng.choice(keys))
        if rng.random() < 0.3:
            await asyncio.sleep(0)
    last = {key: seen[key] for key in keys}
    for key in keys:
        queue.add(key)
    while queue.depth or queue.num_in_work:  # noqa: ASYNC110
        await asyncio.sleep(0)
    assert all(seen[key] > last[key] for key in keys)
    for each in workers:
        each.cancel()
    await asyncio.gather(*workers, return_exceptions=True)
