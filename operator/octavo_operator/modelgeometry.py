"""The geometry of models, read off the event loop and kept for a while.

The engine's own resolver does the reading. What lies in the engine's container (an absolute path) cannot be seen from
here, and is not looked for in the operator's file system.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from octavo_engine.errors import OctavoError, UnsupportedModelError
from octavo_engine.geometry import Geometry

from octavo_operator.observe import ModelGeometry

logger = logging.getLogger(__name__)

Resolver = Callable[[str], Geometry]

IN_CONTAINER = "a path in the engine's container cannot be read by the operator"


@dataclass(frozen=True, slots=True)
class _Entry:
    result: ModelGeometry
    expires: float


class GeometryReader:
    """Asks `resolve` once per address at a time; keeps answers for `keep_s`, failures for `retry_s`."""

    def __init__(
        self, resolve: Resolver, *, timeout_s: float = 30.0, keep_s: float = 3600.0, retry_s: float = 60.0
    ) -> None:
        self._resolve = resolve
        self._timeout_s = timeout_s
        self._keep_s = keep_s
        self.retry_s = retry_s
        self._entries: dict[str, _Entry] = {}
        self._reading: dict[str, asyncio.Task[ModelGeometry]] = {}

    async def read(self, address: str) -> ModelGeometry:
        """The geometry of the model at `address`, or why it is not known. Does not raise."""
        if is_in_container(address):
            return ModelGeometry(problem=IN_CONTAINER)
        now = asyncio.get_running_loop().time()
        known = self._entries.get(address)
        if known is not None and known.expires > now:
            return known.result
        task = self._reading.get(address)
        if task is None:
            task = asyncio.create_task(self._read(address))
            self._reading[address] = task
            task.add_done_callback(lambda _: self._reading.pop(address, None))
        # A worker that is cancelled must not cancel the reading for the others.
        result = await asyncio.shield(task)
        keep_s = self._keep_s if result.geometry else self.retry_s
        self._entries[address] = _Entry(result, now + keep_s)
        return result

    async def _read(self, address: str) -> ModelGeometry:
        try:
            async with asyncio.timeout(self._timeout_s):
                result = await asyncio.to_thread(read_geometry, self._resolve, address)
        except TimeoutError:
            result = ModelGeometry(problem=f"{address} did not answer within {self._timeout_s:.0f} s")
        if result.geometry is None:
            logger.info("geometry of %s is unknown: %s", address, result.problem)
        return result


def is_in_container(address: str) -> bool:
    """Whether the model lies in a file system that only the engine has."""
    return address.startswith(("/", "file://"))


def read_geometry(resolve: Resolver, address: str) -> ModelGeometry:
    """Call the resolver; its errors become values, since a plan can live with them."""
    try:
        return ModelGeometry(geometry=resolve(address))
    except UnsupportedModelError as error:
        return ModelGeometry(problem=str(error), is_unsupported=True)
    except OctavoError as error:
        return ModelGeometry(problem=str(error))
