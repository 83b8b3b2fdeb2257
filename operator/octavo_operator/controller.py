"""The operator as a process: watches and lists fill the store, workers empty the queue, the Lease says who works."""

import asyncio
import contextlib
import logging
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kopf

from octavo_operator.apiserver import (
    CHILD_KINDS,
    HARDWARE_PROFILE,
    INFERENCE_SERVICE,
    KINDS,
    NODE,
    OPTIONAL_KINDS,
    POD,
    RESOURCE_SLICE,
    UNREACHABLE,
    ApiServer,
    Kind,
    own_identity,
)
from octavo_operator.decision import Defaults
from octavo_operator.documents import NodeFile
from octavo_operator.election import LeaderElector, LeaseTimes
from octavo_operator.errors import ApiError, ManifestError, MissingCrdError
from octavo_operator.handlers import make_registry, make_settings
from octavo_operator.keyqueue import KeyQueue
from octavo_operator.metrics import Metrics
from octavo_operator.modelgeometry import GeometryReader, Resolver
from octavo_operator.objectstore import ObjectStore
from octavo_operator.observe import MANAGED_SELECTOR, Key, key_of, owner_key
from octavo_operator.probes import serve_probes
from octavo_operator.reconcile import PROFILES, Reconciler, utc_now

logger = logging.getLogger(__name__)

# Nodes come and change in swarms: when a cluster grows, when a driver is rolled out.
_NODES_DEBOUNCE_S = 0.5
_LIST_RETRY_S = 2.0
# Longer than any pass takes, with all its requests at their limits.
_STUCK_AFTER_S = 300.0
_CRD_WAIT_S = 60.0


@dataclass(frozen=True, slots=True)
class OperatorSettings:
    """Everything that one operator process is told.

    namespace:  the one that it serves; None for all
    lease:      None for no leader election
    nodes_file: the Nodes to plan with; None for those of the API server
    """

    defaults: Defaults
    kubeconfig: Path | None = None
    namespace: str | None = None
    lease: Key | None = None
    lease_times: LeaseTimes = field(default_factory=LeaseTimes)
    host: str = "0.0.0.0"
    port: int = 8080
    resync_s: float = 300.0
    num_workers: int = 8
    nodes_file: Path | None = None


class Controller:
    """One operator. `run` is its whole life."""

    def __init__(self, settings: OperatorSettings, resolve: Resolver) -> None:
        self._settings = settings
        self._store = ObjectStore()
        self._queue = KeyQueue()
        self._metrics = Metrics()
        self._metrics.follow(lambda: self._queue.depth, lambda: self._store.count(INFERENCE_SERVICE))
        self._geometry = GeometryReader(resolve)
        self._rng = random.Random()
        self._synced = asyncio.Event()
        self._is_leading = False
        self._watches: asyncio.Task[Any] | None = None
        self._last_listed = 0.0
        self._last_progress = 0.0
        self._nodes_timer: asyncio.TimerHandle | None = None
        # Those that the cluster has, and lets this operator read.
        self._kinds = frozenset(KINDS.values())
        self._node_file = NodeFile(settings.nodes_file) if settings.nodes_file else None
        if self._node_file:
            self._kinds -= {NODE}

    async def run(self) -> None:
        """Until SIGTERM or SIGINT. Raises OperatorError where there is nothing to run against."""
        settings = self._settings
        async with ApiServer(settings.kubeconfig) as api:
            runner, port = await serve_probes(
                settings.host, settings.port, self._metrics.registry, self.health_problem, self.readiness_problem
            )
            try:
                await self._wait_for_crd(api)
                await self._find_kinds(api)
                logger.info(
                    "operator started: probes on port %d, %s",
                    port,
                    f"namespace {settings.namespace}" if settings.namespace else "all namespaces",
                )
                await self._run(api)
            finally:
                await runner.cleanup()

    async def _wait_for_crd(self, api: ApiServer) -> None:
        """A chart applies the CRD and the operator together; the API server needs a moment for it."""
        deadline = asyncio.get_running_loop().time() + _CRD_WAIT_S
        while True:
            try:
                await api.list(INFERENCE_SERVICE, self._settings.namespace)
                return
            except ApiError as error:
                if error.status not in (401, 403, 404, 429, 500, 503):
                    raise
                problem = str(error)
                missing = error.status == 404
            except UNREACHABLE as error:
                problem, missing = str(error) or type(error).__name__, False
            if asyncio.get_running_loop().time() > deadline:
                raise MissingCrdError(
                    "the API server knows no InferenceServices: install the CRD first, `kubectl apply -f crds/`"
                    if missing
                    else f"InferenceServices cannot be listed: {problem}"
                )
            logger.info("waiting for the API server: %s", problem)
            await asyncio.sleep(1.0)

    async def _find_kinds(self, api: ApiServer) -> None:
        """Leave out the optional kinds that cannot be read: an older cluster, or a namespaced installation."""
        for kind in OPTIONAL_KINDS:
            namespace = self._settings.namespace if kind.is_namespaced else None
            try:
                await api.list(kind, namespace)
            except ApiError as error:
                if error.status not in (403, 404):
                    raise
                self._kinds -= {kind}
                logger.warning("%s objects are not read: %s", kind.name, error)

    async def _run(self, api: ApiServer) -> None:
        settings = self._settings
        reconciler = Reconciler(api, self._store, self._geometry, settings.defaults, self._metrics)
        registry = make_registry(api, self._store, self._queue.add, self._nodes_changed, self._kinds)
        resync = asyncio.create_task(self._resync(api), name="resync")
        lead = asyncio.create_task(self._contend(api, reconciler), name="lead")
        # Last, since kopf counts every task that starts later as its own, and ends it.
        self._watches = asyncio.create_task(
            kopf.operator(
                registry=registry,
                settings=make_settings(),
                clusterwide=settings.namespace is None,
                namespaces=[settings.namespace] if settings.namespace else [],
                standalone=True,
            ),
            name="watches",
        )
        tasks = {self._watches, resync, lead}
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            # Kopf returns on a signal: that is the regular end.
            task.result()

    async def _contend(self, api: ApiServer, reconciler: Reconciler) -> None:
        async def lead() -> None:
            await self._work(reconciler)

        if self._settings.lease is None:
            await lead()
            return
        elector = LeaderElector(api, self._settings.lease, own_identity(), utc_now, self._settings.lease_times)
        await elector.run(lead)

    async def _work(self, reconciler: Reconciler) -> None:
        """What the leader does, until it is cancelled."""
        await self._synced.wait()
        self._is_leading = True
        self._metrics.is_leader.set(1)
        self._last_progress = asyncio.get_running_loop().time()
        for key in (PROFILES, *self._store.resource_keys()):
            self._queue.add(key)
        try:
            async with asyncio.TaskGroup() as workers:
                for _ in range(self._settings.num_workers):
                    workers.create_task(self._worker(reconciler))
        finally:
            self._is_leading = False
            self._metrics.is_leader.set(0)

    async def _worker(self, reconciler: Reconciler) -> None:
        loop = asyncio.get_running_loop()
        while True:
            key = await self._queue.get()
            try:
                with self._metrics.duration.time():
                    look_again_s = await reconciler.reconcile(key)
            except (ApiError, *UNREACHABLE) as error:
                self._metrics.reconciles.labels("error").inc()
                delay_s = self._queue.retry(key)
                logger.warning(
                    "resource=%s pass failed, again in %.1f s: %s", key, delay_s, error or type(error).__name__
                )
            except Exception:
                # A defect in one resource's pass must not end the others' passes; the traceback says what it is.
                self._metrics.reconciles.labels("error").inc()
                delay_s = self._queue.retry(key)
                logger.exception("resource=%s pass failed, again in %.1f s", key, delay_s)
            else:
                self._metrics.reconciles.labels("success").inc()
                self._queue.forget(key)
                if look_again_s is not None:
                    self._queue.add_after(key, look_again_s)
            finally:
                self._queue.done(key)
                self._last_progress = loop.time()

    async def _resync(self, api: ApiServer) -> None:
        """List everything, at the start and then every so often, jittered: what a watch missed is found here."""
        while True:
            try:
                await self._list_all(api)
            except (ApiError, ManifestError, *UNREACHABLE) as error:
                logger.warning("lists failed, again in %.0f s: %s", _LIST_RETRY_S, error or type(error).__name__)
                await asyncio.sleep(_LIST_RETRY_S)
                continue
            await asyncio.sleep(self._settings.resync_s * self._rng.uniform(0.9, 1.1))

    async def _list_all(self, api: ApiServer) -> None:
        is_first = not self._synced.is_set()
        nodes, nodes_version = self._node_file.list() if self._node_file else await api.list(NODE)
        if self._store.replace_nodes(nodes, nodes_version) and not is_first:
            self._nodes_changed()
        for kind in self._kinds & {HARDWARE_PROFILE, RESOURCE_SLICE}:
            items, version = await api.list(kind)
            if self._store.replace(kind, items, version) and not is_first:
                self._nodes_changed()
        for kind in (POD, *CHILD_KINDS, INFERENCE_SERVICE):
            if kind not in self._kinds:
                continue
            selector = "" if kind is INFERENCE_SERVICE else MANAGED_SELECTOR
            items, version = await api.list(kind, self._settings.namespace, selector)
            self._note_missed(kind, self._store.replace(kind, items, version), is_first=is_first)
        self._synced.set()
        self._last_listed = asyncio.get_running_loop().time()
        keys = self._store.resource_keys()
        for key in keys:
            # Spread over a tenth of the period, so that a resync is no burst.
            self._queue.add_after(key, 0.0 if is_first else self._rng.uniform(0, self._settings.resync_s / 10))

    def _note_missed(self, kind: Kind, unseen: list[dict[str, Any]], *, is_first: bool) -> None:
        if is_first:
            return
        for manifest in unseen:
            self._metrics.missed.labels(kind.name).inc()
            key = key_of(manifest) if kind is INFERENCE_SERVICE else owner_key(manifest)
            if key is not None:
                self._queue.add(key)

    def _nodes_changed(self) -> None:
        """Have all resources planned again, once for a swarm of Nodes, profiles or slices."""
        if self._nodes_timer is not None or not self._synced.is_set():
            return

        def enqueue_all() -> None:
            self._nodes_timer = None
            for key in (PROFILES, *self._store.resource_keys()):
                self._queue.add(key)

        self._nodes_timer = asyncio.get_running_loop().call_later(_NODES_DEBOUNCE_S, enqueue_all)

    def health_problem(self) -> str:
        """Why this process should be restarted."""
        if self._watches is not None and self._watches.done():
            return "the watches have ended"
        idle_s = asyncio.get_running_loop().time() - self._last_progress
        if self._is_leading and self._queue.num_in_work and idle_s > _STUCK_AFTER_S:
            return f"no pass ended for {idle_s:.0f} s"
        return ""

    def readiness_problem(self) -> str:
        """Why this process cannot act on what happens."""
        if self._watches is None or self._watches.done():
            return "the watches do not run"
        if not self._synced.is_set():
            return "the first lists are not complete"
        age_s = asyncio.get_running_loop().time() - self._last_listed
        if age_s > 3 * self._settings.resync_s + 60:
            return f"the last complete list is {age_s:.0f} s old"
        return ""


def run_operator(settings: OperatorSettings, resolve: Resolver) -> None:
    """Run until a signal ends it."""
    with contextlib.suppress(asyncio.CancelledError, KeyboardInterrupt):
        asyncio.run(Controller(settings, resolve).run())
