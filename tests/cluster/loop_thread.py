"""An event loop on a thread of its own, for callers that are not asynchronous."""

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """Runs from `start` to `stop`. After `stop` no task, generator or connection of the loop is left."""

    def __init__(self, name: str) -> None:
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._is_running = threading.Event()
        self._loop: asyncio.AbstractEventLoop

    def start(self) -> None:
        self._thread.start()
        self._is_running.wait()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` in the loop and wait for its result."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _serve(self) -> None:
        with asyncio.Runner() as runner:  # its end cancels what still runs, and closes generators
            self._loop = runner.get_loop()
            self._loop.call_soon(self._is_running.set)
            self._loop.run_forever()
