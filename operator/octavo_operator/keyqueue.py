"""A de-duplicating queue of keys: each key is worked on by one worker at a time, and a key that comes in meanwhile
is worked on once more afterwards. Failures wait longer each time, with jitter.
"""

import asyncio
import random
from collections import OrderedDict

from octavo_operator.observe import Key


class KeyQueue:
    """Of one event loop."""

    def __init__(self, base_delay_s: float = 0.2, max_delay_s: float = 60.0, rng: random.Random | None = None) -> None:
        self._base_delay_s = base_delay_s
        self._max_delay_s = max_delay_s
        self._rng = rng or random.Random()
        self._ready: OrderedDict[Key, None] = OrderedDict()
        self._in_work: set[Key] = set()
        self._again: set[Key] = set()
        self._failures: dict[Key, int] = {}
        self._timers: dict[Key, asyncio.TimerHandle] = {}
        self._wakeup = asyncio.Event()

    @property
    def depth(self) -> int:
        """Keys that wait for a worker now."""
        return len(self._ready) + len(self._again)

    @property
    def num_in_work(self) -> int:
        """Keys that a worker holds."""
        return len(self._in_work)

    def add(self, key: Key) -> None:
        """Have the key worked on as soon as possible."""
        self._cancel_timer(key)
        if key in self._in_work:
            self._again.add(key)
        elif key not in self._ready:
            self._ready[key] = None
            self._wakeup.set()

    def add_after(self, key: Key, delay_s: float) -> None:
        """Have the key worked on after `delay_s`, or earlier if something else asks for it; the earliest date wins."""
        loop = asyncio.get_running_loop()
        date = loop.time() + delay_s
        known = self._timers.get(key)
        if key in self._ready or key in self._again or (known is not None and known.when() <= date):
            return
        self._cancel_timer(key)
        self._timers[key] = loop.call_at(date, self.add, key)

    def retry(self, key: Key) -> float:
        """Have a key that failed worked on after a delay that doubles each time. Returns the delay."""
        failures = self._failures.get(key, 0)
        self._failures[key] = failures + 1
        doubled: float = self._base_delay_s * 2.0 ** min(failures, 30)
        delay_s = min(self._max_delay_s, doubled) * self._rng.uniform(0.75, 1.25)
        self.add_after(key, delay_s)
        return delay_s

    def forget(self, key: Key) -> None:
        """The key succeeded: its next failure is its first."""
        self._failures.pop(key, None)

    async def get(self) -> Key:
        """The key that waits longest. The worker owes a `done`."""
        while not self._ready:
            self._wakeup.clear()
            await self._wakeup.wait()
        key, _ = self._ready.popitem(last=False)
        self._in_work.add(key)
        return key

    def done(self, key: Key) -> None:
        """The worker is through with the key, one way or the other."""
        self._in_work.discard(key)
        if key in self._again:
            self._again.discard(key)
            self.add(key)

    def _cancel_timer(self, key: Key) -> None:
        timer = self._timers.pop(key, None)
        if timer is not None:
            timer.cancel()
