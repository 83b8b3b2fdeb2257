"""The operator as a process: watches and lists fill the store, workers empty the queue, the Lease says who works."""

import asyncio
import contextlib
import logging
import os
import random
import signal
import sys
import threading
from collections.abc import Collection
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
# How soon a CRD is noticed that was installed while the operator runs.
_KINDS_POLL_S = 30.0
# Longer than a leader takes to give its Lease back.
_LONGEST_END_S = 6.0
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
        self._life: asyncio.Task[None] | None = None
        self._watches: asyncio.Task[Any] | None = None
        self._last_listed = 0.0
        self._last_progress = 0.0
        self._nodes_timer: asyncio.TimerHandle | None = None
        # Those that the cluster has, and lets this operator read.
        self._kinds = frozenset(KINDS.values())
        # Those that the cluster lacks: their CRDs may come.
        self._absent: set[Kind] = set()
        self._node_file = NodeFile(settings.nodes_file) if settings.nodes_file else None
        if self._node_file:
            self._kinds -= {NODE}

    async def run(self) -> None:
        """Until SIGTERM or SIGINT. Raises OperatorError where there is nothing to run against."""
        self._life = asyncio.create_task(self._live(), name="life")
        self._take_signals()
        with contextlib.suppress(asyncio.CancelledError):
            await self._life

    def _take_signals(self) -> None:
        """Have a signal end everything at once, whatever is under way: each pass can be repeated."""
        assert self._life is not None
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._end)

    def _end(self) -> None:
        """Cancel everything; what does not let itself be cancelled ends with the process, which holds nothing."""
        assert self._life is not None
        # Kopf's tasks have tasks of their own, which nobody asks how they ended once their connections are closed.
        asyncio.get_running_loop().set_exception_handler(
            lambda _loop, context: logger.debug("while ending: %s", context["message"])
        )
        self._life.cancel()
        last_resort = threading.Timer(_LONGEST_END_S, os._exit, [0])
        last_resort.daemon = True
        last_resort.start()

    async def _live(self) -> None:
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
        """Which optional kinds can be read: not so in an older cluster, or in a namespaced installation."""
        found, absent, waiting = set(self._kinds), set(), list(OPTIONAL_KINDS)
        while waiting:
            kind = waiting[0]
            try:
                problem = await self._problem_with(api, kind)
            except (ApiError, *UNREACHABLE) as error:
                # A CRD that was installed a moment ago has storage that is still being made.
                logger.info("waiting for the API server: %s", error or type(error).__name__)
                await asyncio.sleep(1.0)
                continue
            waiting.remove(kind)
            if problem is None:
                found.add(kind)
                continue
            found.discard(kind)
            if problem.status == 404:
                absent.add(kind)
                logger.info("the cluster has no %s objects; they are read once their CRD is there", kind.name)
            else:
                logger.warning("%s objects are not read: %s", kind.name, problem)
        self._kinds, self._absent = frozenset(found), absent

    async def _problem_with(self, api: ApiServer, kind: Kind) -> ApiError | None:
        """Why objects of an optional kind cannot be read; None if they can."""
        try:
            await api.list(kind, self._settings.namespace if kind.is_namespaced else None, MANAGED_SELECTOR)
        except ApiError as error:
            if error.status not in (403, 404):
                raise
            return error
        return None

    async def _appearance(self, api: ApiServer) -> None:
        """Returns when the cluster has an optional kind that it lacked: its CRD was installed."""
        while True:
            await asyncio.sleep(min(_KINDS_POLL_S, self._settings.resync_s))
            for kind in tuple(self._absent):
                with contextlib.suppress(ApiError, *UNREACHABLE):
                    if await self._problem_with(api, kind) is None:
                        return

    async def _run(self, api: ApiServer) -> None:
        reconciler = Reconciler(
            api, self._store, self._geometry, self._settings.defaults, self._metrics, lambda: self._kinds
        )
        resync = asyncio.create_task(self._resync(api), name="resync")
        lead = asyncio.create_task(self._contend(api, reconciler), name="lead")
        try:
            while True:
                watched = self._kinds
                self._watches = asyncio.create_task(self._watch(api, watched), name="watches")
                await asyncio.wait({self._watches, resync, lead}, return_when=asyncio.FIRST_COMPLETED)
                for task in (lead, resync):
                    if task.done():
                        task.result()
                await self._find_kinds(api)
                if watched == self._kinds:
                    # No kind's going made them fail.
                    self._watches.result()
                self._enqueue_all()
        finally:
            # The leader first: it gives its Lease back.
            for task in filter(None, (lead, resync, self._watches)):
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    async def _watch(self, api: ApiServer, kinds: Collection[Kind]) -> None:
        """Have kopf watch these kinds, until there is another optional one, or one of them has gone."""
        namespace = self._settings.namespace
        registry = make_registry(api, self._store, self._queue.add, self._nodes_changed, kinds)
        tasks = await kopf.spawn_tasks(
            registry=registry,
            settings=make_settings(),
            clusterwide=namespace is None,
            namespaces=[namespace] if namespace else [],
            standalone=True,
        )
        # Kopf has taken them, and would take five seconds to end.
        self._take_signals()
        tasks = [*tasks, asyncio.create_task(self._appearance(api), name="appearance")]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
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
        self._enqueue_all()
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
                if isinstance(error, ApiError) and error.ends_with_namespace:
                    # The resource goes, too, and its deletion or the next resync brings the next pass.
                    self._metrics.reconciles.labels("success").inc()
                    self._queue.forget(key)
                    logger.debug("resource=%s %s", key, error)
                    continue
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
            if self._store.replace(kind, *await self._list(api, kind)) and not is_first:
                self._nodes_changed()
        for kind in (POD, *CHILD_KINDS, INFERENCE_SERVICE):
            if kind in self._kinds:
                self._note_missed(kind, self._store.replace(kind, *await self._list(api, kind)), is_first=is_first)
        self._synced.set()
        self._last_listed = asyncio.get_running_loop().time()
        keys = self._store.resource_keys()
        for key in keys:
            # Spread over a tenth of the period, so that a resync is no burst.
            self._queue.add_after(key, 0.0 if is_first else self._rng.uniform(0, self._settings.resync_s / 10))

    async def _list(self, api: ApiServer, kind: Kind) -> tuple[list[dict[str, Any]], int]:
        """What there is of a kind; nothing of an optional one whose CRD has gone."""
        selector = MANAGED_SELECTOR if kind in (POD, *CHILD_KINDS) else ""
        try:
            return await api.list(kind, self._settings.namespace if kind.is_namespaced else None, selector)
        except ApiError as error:
            if error.status != 404 or kind not in OPTIONAL_KINDS:
                raise
            self._kinds -= {kind}
            self._absent.add(kind)
            self._enqueue_all()
            return [], sys.maxsize

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
            self._enqueue_all()

        self._nodes_timer = asyncio.get_running_loop().call_later(_NODES_DEBOUNCE_S, enqueue_all)

    def _enqueue_all(self) -> None:
        for key in (PROFILES, *self._store.resource_keys()):
            self._queue.add(key)

    def health_problem(self) -> str:
        """Why this process should be restarted."""
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
    asyncio.run(Controller(settings, resolve).run())
