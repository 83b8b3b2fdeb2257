"""The geometry of models, read off the event loop and kept for a while.

The engine's own resolver does the reading. What lies in the engine's container (an absolute path) cannot be seen from
here, and is not looked for in the operator's file system.
"""

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace

from octavo_engine.errors import ModelSourceError, OctavoError, UnsupportedModelError
from octavo_engine.geometry import Geometry, geometry_from_data, why_not_served

from octavo_operator.api import InferenceServiceSpec
from octavo_operator.observe import ModelGeometry

logger = logging.getLogger(__name__)

Resolver = Callable[[str], Geometry]

IN_CONTAINER = "a path in the engine's container cannot be read by the operator"
WITH_ENGINES_KEYS = "s3:// and oci:// are read with the engine's credentials, which the operator does not have"
# The hub's last word to somebody without a token; an engine with the same rights would end with it again and again.
REFUSALS = frozenset({"ModelNotFound", "ModelAccessDenied"})


@dataclass(frozen=True, slots=True)
class _Entry:
    """num_failures: in a row, with this one; 0: the geometry is known."""

    result: ModelGeometry
    expires: float
    num_failures: int


class GeometryReader:
    """Asks `resolve` once per address at a time; keeps answers for `keep_s`.

    Failures are kept for `retry_s`, twice as long after each further one, up to `longest_retry_s`.
    """

    def __init__(
        self,
        resolve: Resolver,
        *,
        timeout_s: float = 30.0,
        keep_s: float = 3600.0,
        retry_s: float = 30.0,
        longest_retry_s: float = 900.0,
    ) -> None:
        self._resolve = resolve
        self._timeout_s = timeout_s
        self._keep_s = keep_s
        self._retry_s = retry_s
        self._longest_retry_s = longest_retry_s
        self._entries: dict[str, _Entry] = {}
        self._reading: dict[str, asyncio.Task[ModelGeometry]] = {}

    async def read(self, address: str) -> ModelGeometry:
        """The geometry of the model at `address`, or why it is not known. Does not raise."""
        problem = why_not_read(address)
        if problem:
            return ModelGeometry(problem=problem)
        known = self._entries.get(address)
        if known is not None and known.expires > _now():
            return known.result
        task = self._reading.get(address)
        if task is None:
            task = asyncio.create_task(self._read(address))
            self._reading[address] = task
            task.add_done_callback(lambda _: self._reading.pop(address, None))
        # A worker that is cancelled must not cancel the reading for the others.
        return await asyncio.shield(task)

    def retry_after_s(self, address: str) -> float:
        """Seconds until a failure is worth another attempt."""
        known = self._entries.get(address)
        return max(1.0, known.expires - _now()) if known else self._retry_s

    async def _read(self, address: str) -> ModelGeometry:
        try:
            async with asyncio.timeout(self._timeout_s):
                result = await _in_thread(lambda: read_geometry(self._resolve, address))
        except TimeoutError:
            problem = f"{address} did not answer within {self._timeout_s:.0f} s"
            result = ModelGeometry(problem=problem, reason="HubUnavailable")
        self._entries[address] = self._entry(address, result)
        if result.geometry is None:
            logger.info("geometry of %s is unknown: %s", address, result.problem)
        return result

    def _entry(self, address: str, result: ModelGeometry) -> _Entry:
        if result.geometry is not None:
            return _Entry(result, _now() + self._keep_s, 0)
        known = self._entries.get(address)
        num_before = known.num_failures if known else 0
        wait_s = min(self._retry_s * 2**num_before, self._longest_retry_s)
        return _Entry(result, _now() + wait_s, min(num_before + 1, 32))


async def _in_thread(read: Callable[[], ModelGeometry]) -> ModelGeometry:
    """`asyncio.to_thread` with a thread that the process's end does not wait for: a hub may hang for minutes."""
    future: Future[ModelGeometry] = Future()

    def run() -> None:
        future.set_running_or_notify_cancel()
        try:
            future.set_result(read())
        except Exception as error:  # noqa: BLE001 - whoever waits gets it
            future.set_exception(error)

    threading.Thread(target=run, name="geometry", daemon=True).start()
    return await asyncio.wrap_future(future)


def _now() -> float:
    return asyncio.get_running_loop().time()


def is_in_container(address: str) -> bool:
    """Whether the model lies in a file system that only the engine has."""
    return address.startswith(("/", "file://"))


def why_not_read(address: str) -> str | None:
    """Why only an engine's pod can read the model; None if the operator can.

    Its own credentials are no substitute: with another endpoint the same bucket is another one.
    """
    if address.startswith(("s3://", "oci://")):
        return WITH_ENGINES_KEYS
    return IN_CONTAINER if is_in_container(address) else None


def read_geometry(resolve: Resolver, address: str) -> ModelGeometry:
    """Call the resolver; its errors become values, since a plan can live with them.

    A geometry that the engine does not run comes with the reason: its memory can still be told.
    """
    try:
        geometry = resolve(address)
    except UnsupportedModelError as error:
        return ModelGeometry(problem=str(error), is_unsupported=True)
    except ModelSourceError as error:
        return ModelGeometry(problem=str(error), reason=error.reason)
    except OctavoError as error:
        return ModelGeometry(problem=str(error))
    problem = why_not_served(geometry)
    return ModelGeometry(geometry=geometry, problem=problem, is_unsupported=bool(problem))


def stated_geometry(spec: InferenceServiceSpec) -> ModelGeometry | None:
    """What `spec.model.geometry` states; None if it states nothing."""
    if spec.model.geometry is None:
        return None
    return read_geometry(lambda _: geometry_from_data(spec.model.geometry), spec.model.uri)


def with_refusal(model: ModelGeometry, spec: InferenceServiceSpec) -> ModelGeometry:
    """A hub's refusal is final, unless the engine has a key that the reader has not."""
    if model.geometry is not None or model.reason not in REFUSALS or has_own_key(spec) or why_not_read(spec.model.uri):
        return model
    return replace(model, is_unsupported=True)


def has_own_key(spec: InferenceServiceSpec) -> bool:
    """Whether the engine may have a token of its own."""
    environment = (spec.engine.extra_env if spec.engine else None) or []
    has_token = any(each.name in ("HF_TOKEN", "HF_ENDPOINT", "HUGGING_FACE_HUB_TOKEN") for each in environment)
    return spec.model.secret_ref is not None or spec.pod_template is not None or has_token
