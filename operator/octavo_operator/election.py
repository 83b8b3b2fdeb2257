"""Leader election through a Lease: one replica acts, the others are ready to.

The times are those of Kubernetes' own controllers. A leader that cannot renew stops before anybody else may start:
it gives up after `renew_deadline_s`, the others wait `lease_duration_s` from the last renewal that they saw, on their
own clocks.
"""

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime

from octavo_operator.apiserver import LEASE, UNREACHABLE, ApiServer
from octavo_operator.errors import ApiError
from octavo_operator.observe import Key, Manifest

logger = logging.getLogger(__name__)


# A process that ends does not wait for long: without its word the Lease runs out.
_RELEASE_S = 2.0


@dataclass(frozen=True, slots=True)
class LeaseTimes:
    """In seconds; retry < renew deadline < lease duration."""

    lease_duration_s: float = 15.0
    renew_deadline_s: float = 10.0
    retry_s: float = 2.0


class LeaderElector:
    """Runs `lead` while this process holds the Lease, and cancels it the moment it does not."""

    def __init__(
        self, api: ApiServer, lease: Key, identity: str, clock: Callable[[], datetime], times: LeaseTimes | None = None
    ) -> None:
        self._api = api
        self._lease = lease
        # Two processes may share a host name; the suffix keeps a restarted one from taking itself for the old one.
        self.identity = f"{identity}_{secrets.token_hex(4)}"
        self._clock = clock
        self._times = times or LeaseTimes()
        self._seen: tuple[str, str] = ("", "")
        self._seen_at = 0.0
        self._last_renewed = 0.0

    async def run(self, lead: Callable[[], Awaitable[None]]) -> None:
        """Contend, lead, contend again, until cancelled; then give the Lease back."""
        try:
            while True:
                await self._acquire()
                logger.info("lease=%s identity=%s leads", self._lease, self.identity)
                await self._lead(lead)
                logger.warning("lease=%s identity=%s leads no longer", self._lease, self.identity)
        finally:
            await self._release()

    async def _acquire(self) -> None:
        # There is nothing to wait on: the Lease belongs to other processes, and polling it is the protocol.
        while not await self._try_to_hold(self._times.retry_s * 2):  # noqa: ASYNC110
            await asyncio.sleep(self._times.retry_s)

    async def _lead(self, lead: Callable[[], Awaitable[None]]) -> None:
        """Run `lead` beside the renewals; the end of either ends both. What `lead` raises is raised."""

        async def work() -> None:
            await lead()

        working = asyncio.create_task(work())
        renewing = asyncio.create_task(self._renew())
        try:
            await asyncio.wait({working, renewing}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            renewing.cancel()
            working.cancel()
            await asyncio.gather(working, renewing, return_exceptions=True)
        if working.done() and not working.cancelled():
            working.result()

    async def _renew(self) -> None:
        """Returns when the Lease is lost."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self._times.retry_s)
            left_s = self._last_renewed + self._times.renew_deadline_s - loop.time()
            if left_s <= 0:
                return
            if not await self._try_to_hold(min(left_s, self._times.retry_s * 2)) and self._seen[0] != self.identity:
                return

    async def _try_to_hold(self, timeout_s: float) -> bool:
        """One attempt to take or renew the Lease. False if another holds it, or nobody can tell."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            async with asyncio.timeout(timeout_s):
                is_held = await self._hold()
        except (ApiError, *UNREACHABLE) as error:
            logger.warning("lease=%s cannot be renewed: %s", self._lease, error or type(error).__name__)
            return False
        if is_held:
            # From before the request: the server's clock for the others may have started then.
            self._last_renewed = started
        return is_held

    async def _hold(self) -> bool:
        loop = asyncio.get_running_loop()
        found = await self._api.get(LEASE, self._lease)
        if found is None:
            return await self._write(self._manifest({}, 0), is_new=True)
        spec = found.get("spec") or {}
        holder, renewed = spec.get("holderIdentity") or "", spec.get("renewTime") or ""
        if (holder, renewed) != self._seen:
            self._seen, self._seen_at = (holder, renewed), loop.time()
        duration_s = spec.get("leaseDurationSeconds") or self._times.lease_duration_s
        if holder not in ("", self.identity) and loop.time() < self._seen_at + duration_s:
            return False
        transitions = int(spec.get("leaseTransitions") or 0) + (holder != self.identity)
        return await self._write(self._manifest(found, transitions), is_new=False)

    async def _write(self, manifest: Manifest, *, is_new: bool) -> bool:
        """False if somebody else wrote in between."""
        try:
            await (self._api.create(LEASE, manifest) if is_new else self._api.replace(LEASE, manifest))
        except ApiError as error:
            if error.status == 409:
                return False
            raise
        self._seen = (self.identity, manifest["spec"]["renewTime"])
        self._seen_at = asyncio.get_running_loop().time()
        return True

    def _manifest(self, found: Manifest, transitions: int) -> Manifest:
        now = self._clock().isoformat(timespec="microseconds").replace("+00:00", "Z")
        spec = found.get("spec") or {}
        is_renewal = spec.get("holderIdentity") == self.identity
        metadata = {"name": self._lease.name, "namespace": self._lease.namespace}
        if found:
            metadata["resourceVersion"] = found["metadata"]["resourceVersion"]
        return {
            "apiVersion": LEASE.api_version,
            "kind": LEASE.name,
            "metadata": metadata,
            "spec": {
                "holderIdentity": self.identity,
                # A whole number of seconds, and never 0.
                "leaseDurationSeconds": max(1, round(self._times.lease_duration_s)),
                "acquireTime": spec.get("acquireTime") if is_renewal else now,
                "renewTime": now,
                "leaseTransitions": transitions,
            },
        }

    async def _release(self) -> None:
        """Let the next one start at once instead of after the lease's duration."""
        if self._seen[0] != self.identity:
            return
        try:
            async with asyncio.timeout(min(self._times.retry_s, _RELEASE_S)):
                found = await self._api.get(LEASE, self._lease)
                if found is not None and found["spec"].get("holderIdentity") == self.identity:
                    found["spec"]["holderIdentity"] = ""
                    await self._api.replace(LEASE, found)
        except (ApiError, *UNREACHABLE) as error:
            logger.warning("lease=%s was not given back: %s", self._lease, error or type(error).__name__)
