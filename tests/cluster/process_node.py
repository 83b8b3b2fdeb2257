"""The process node: a stand-in for kubelet, container runtime and pod network. Test support, not a product.

It registers a Node, watches the pods that the scheduler binds to it, and runs each container as a process of
this machine: command, arguments, variables, volumes, probes, restarts and graceful ends are the kubelet's. Images,
namespaces, cgroups and resource limits are not there; README.md lists what is honoured and what is not. A hollow
node runs nothing and reports every pod as running, so that one machine can have many nodes with any hardware.
"""

import asyncio
import logging
import os
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

from addresses import PodAddresses
from binaries import KUBERNETES_VERSION
from container import BackOff, timestamp
from guard import Guard
from kube_client import UNREACHABLE, ApiError, KubeClient, Manifest
from loop_thread import LoopThread
from pod_worker import HOST_IP, HollowPod, PodHost, PodWorker, deletion_grace_s, is_finished, pod_name

logger = logging.getLogger(__name__)

T = TypeVar("T")

_LEASE_S = 40
_LEASE_RENEWAL_S = 10.0
_RETRY_S = 0.3
_STOP_GRACE_S = 3.0
# What a container inherits from us besides PATH: enough to find a home, temporary files, proxies, certificates.
_INHERITED = (
    "HOME", "LANG", "LC_ALL", "TMPDIR", "TZ", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "SSL_CERT_FILE",
    "REQUESTS_CA_BUNDLE", "HF_HOME",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class NodeSpec:
    """A node to register. `capacity` adds to, or overrides, the machine's own processors and memory."""

    name: str
    labels: Mapping[str, str] = field(default_factory=dict)
    capacity: Mapping[str, str] = field(default_factory=dict)
    taints: Sequence[Mapping[str, str]] = ()
    is_hollow: bool = False
    architecture: str = "amd64" if os.uname().machine == "x86_64" else "arm64"
    back_off: BackOff = field(default_factory=BackOff)
    hollow_delay_s: float = 0.05
    # Asked once for each pod of a hollow node.
    becomes_ready: Callable[[Manifest], bool] = lambda _pod: True

    def manifest(self) -> Manifest:
        """The Node as it is registered, its status included."""
        own = {
            "kubernetes.io/hostname": self.name,
            "kubernetes.io/arch": self.architecture,
            "kubernetes.io/os": "linux",
        }
        capacity = machine_capacity() | dict(self.capacity)
        return {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": self.name, "labels": own | dict(self.labels)},
            "spec": {"taints": [dict(taint) for taint in self.taints]},
            "status": {
                "capacity": capacity,
                "allocatable": capacity,
                "addresses": [
                    {"type": "InternalIP", "address": HOST_IP},
                    {"type": "Hostname", "address": self.name},
                ],
                "nodeInfo": self._info(),
                "conditions": [
                    _node_condition("Ready", "True", "KubeletReady"),
                    _node_condition("MemoryPressure", "False", "KubeletHasSufficientMemory"),
                    _node_condition("DiskPressure", "False", "KubeletHasNoDiskPressure"),
                    _node_condition("PIDPressure", "False", "KubeletHasSufficientPID"),
                ],
            },
        }

    def _info(self) -> Manifest:
        return {
            "architecture": self.architecture,
            "operatingSystem": "linux",
            "kernelVersion": os.uname().release,
            "kubeletVersion": KUBERNETES_VERSION,
            "osImage": "hollow node" if self.is_hollow else "process node",
            "containerRuntimeVersion": "hollow://1" if self.is_hollow else "process://1",
            "bootID": "",
            "machineID": "",
            "systemUUID": "",
            "kubeProxyVersion": "",
        }


class ProcessNode:
    """One node: registration, lease, and a worker per pod. Lives in one event loop."""

    def __init__(self, spec: NodeSpec, kubeconfig: Path, folder: Path, addresses: PodAddresses, guard: Guard) -> None:
        self.spec = spec
        self._client = KubeClient(kubeconfig)
        self._folder = folder
        self._addresses = addresses
        self._guard = guard
        self._workers: dict[str, PodWorker | HollowPod] = {}
        self._ending: dict[str, asyncio.Task[None]] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Register, and return once the node can take pods."""
        await self._client.__aenter__()
        self._host = PodHost(
            self.spec.name, self._client, self._folder, self._addresses, self._guard, self.spec.back_off,
            container_environment(),
        )  # fmt: skip
        await self._until_reachable(self._register)
        await self._until_reachable(self._renew_lease)
        self._tasks = [asyncio.create_task(self._keep_lease()), asyncio.create_task(self._follow_pods())]
        await self._until_reachable(self._untainted)
        logger.info("node=%s ready, hollow=%s", self.spec.name, self.spec.is_hollow)

    async def stop(self) -> None:
        """End every process. The Node and its pods stay in the API, as when a machine is switched off."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        workers, endings = list(self._workers.values()), list(self._ending.values())
        for ending in endings:
            ending.cancel()
        await asyncio.gather(*endings, return_exceptions=True)
        await asyncio.gather(*(worker.kill(_STOP_GRACE_S) for worker in workers))
        self._workers.clear()
        await self._client.__aexit__()

    async def _until_reachable(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        while True:
            try:
                return await work()
            except ApiError as error:
                if not error.is_temporary:
                    raise
            except UNREACHABLE as error:
                logger.debug("node=%s: the API server cannot be reached: %s", self.spec.name, error)
            await asyncio.sleep(_RETRY_S)

    async def _register(self) -> None:
        path = f"/api/v1/nodes/{self.spec.name}"
        manifest = self.spec.manifest()
        try:
            await self._client.create("/api/v1/nodes", manifest)
        except ApiError as error:
            if error.status != 409:
                raise
            # A node that was here before keeps what others wrote to it, and is told that it is back.
            await self._client.patch(path, {"metadata": {"labels": manifest["metadata"]["labels"]}})
            await self._client.patch(f"{path}/status", {"status": manifest["status"]})

    async def _untainted(self) -> None:
        """Wait until the node controller takes the not-ready taint off, which keeps pods from a new node."""
        while True:
            node = await self._client.get(f"/api/v1/nodes/{self.spec.name}")
            if not any(t["key"] == "node.kubernetes.io/not-ready" for t in node["spec"].get("taints", ())):
                return
            await asyncio.sleep(0.1)

    async def _renew_lease(self) -> None:
        path = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"
        now = timestamp().replace("Z", ".000000Z")
        spec = {"holderIdentity": self.spec.name, "leaseDurationSeconds": _LEASE_S, "renewTime": now}
        body = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": self.spec.name, "namespace": "kube-node-lease"},
            "spec": spec,
        }
        try:
            await self._client.patch(f"{path}/{self.spec.name}", {"spec": spec})
        except ApiError as error:
            if error.status != 404:
                raise
            await self._client.create(path, body)

    async def _keep_lease(self) -> None:
        while True:
            await asyncio.sleep(_LEASE_RENEWAL_S)
            await self._until_reachable(self._renew_lease)

    async def _follow_pods(self) -> None:
        """List, watch, and list again whenever the watch cannot go on: expiry, restart, lost connection."""
        while True:
            try:
                await self._list_and_watch()
            except ApiError as error:
                if error.status != 410:
                    logger.info("node=%s: watch ended: %s", self.spec.name, error)
            except UNREACHABLE as error:
                logger.info("node=%s: the API server went away: %s", self.spec.name, error)
            await asyncio.sleep(_RETRY_S)

    async def _list_and_watch(self) -> None:
        selector = f"spec.nodeName={self.spec.name}"
        listing = await self._client.get("/api/v1/pods", fieldSelector=selector)
        pods = {pod["metadata"]["uid"]: pod for pod in listing["items"]}
        for uid in self._workers.keys() - pods.keys():
            self._forget(uid)
        for pod in pods.values():
            self._handle(pod)
        version = listing["metadata"]["resourceVersion"]
        while True:
            async for event in self._client.watch("/api/v1/pods", version, fieldSelector=selector):
                version = event["object"]["metadata"]["resourceVersion"]
                if event["type"] == "DELETED":
                    self._forget(event["object"]["metadata"]["uid"])
                elif event["type"] != "BOOKMARK":
                    self._handle(event["object"])

    def _handle(self, pod: Manifest) -> None:
        """Bring the worker in line with the pod as the API has it; repeating it changes nothing."""
        uid = pod["metadata"]["uid"]
        grace_s = deletion_grace_s(pod)
        worker = self._workers.get(uid)
        if worker is None:
            if grace_s is None and is_finished(pod):
                return
            worker = self._workers[uid] = self._worker(pod)
            if grace_s is None:
                logger.debug("node=%s pod=%s: starting", self.spec.name, pod_name(pod))
                worker.start()
        worker.update(pod)
        if grace_s is not None:
            self._end(uid, worker.terminate(grace_s))

    def _worker(self, pod: Manifest) -> PodWorker | HollowPod:
        if self.spec.is_hollow:
            return HollowPod(pod, self._host, self.spec.hollow_delay_s, self.spec.becomes_ready(pod))
        return PodWorker(pod, self._host)

    def _forget(self, uid: str) -> None:
        """The pod's object is gone: so must its processes be, without any grace."""
        worker = self._workers.pop(uid, None)
        if worker is not None and uid not in self._ending:
            self._end(uid, worker.kill())
        elif worker is not None:
            worker.hurry()

    def _end(self, uid: str, work: Coroutine[Any, Any, None]) -> None:
        if uid in self._ending:
            work.close()
            return
        task = asyncio.create_task(work)
        self._ending[uid] = task
        task.add_done_callback(lambda done: self._ended(uid, done))

    def _ended(self, uid: str, task: asyncio.Task[None]) -> None:
        self._ending.pop(uid, None)
        self._workers.pop(uid, None)
        if not task.cancelled() and task.exception() is not None:
            logger.error("node=%s: ending a pod failed", self.spec.name, exc_info=task.exception())


class NodeHost:
    """Runs nodes in an event loop on a thread of its own, for callers that are not asynchronous."""

    def __init__(self, kubeconfig_of: Callable[[str], Path], state: Path) -> None:
        self._kubeconfig_of = kubeconfig_of
        self._state = state
        self._addresses = PodAddresses()
        self._nodes: dict[str, ProcessNode] = {}
        self._loop = LoopThread("process-nodes")

    def start(self) -> None:
        self._guard = Guard()
        self._loop.start()

    def add(self, *specs: NodeSpec) -> None:
        """Register nodes; return when all of them can take pods."""
        self._loop.run(self._add(specs))

    def remove(self, *names: str) -> None:
        """Stop nodes and end their processes; their Node objects are the caller's to delete."""
        self._loop.run(self._remove(names))

    def stop(self) -> None:
        self._loop.run(self._remove(tuple(self._nodes)))
        self._loop.stop()
        self._guard.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    async def _add(self, specs: Sequence[NodeSpec]) -> None:
        nodes = [
            ProcessNode(spec, self._kubeconfig_of(spec.name), self._state / "pods", self._addresses, self._guard)
            for spec in specs
        ]
        self._nodes |= {node.spec.name: node for node in nodes}
        await asyncio.gather(*(node.start() for node in nodes))

    async def _remove(self, names: Sequence[str]) -> None:
        await asyncio.gather(*(self._nodes.pop(name).stop() for name in names))


def container_environment() -> dict[str, str]:
    """The variables that every container starts with; the running Python's own programs come first on PATH."""
    inherited = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    path = os.environ.get("PATH", os.defpath)
    return inherited | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{path}"}


def machine_capacity() -> dict[str, str]:
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": str(os.cpu_count() or 1),
        "memory": f"{memory_bytes // 1024}Ki",
        "ephemeral-storage": "100Gi",
        "pods": "110",
    }


def _node_condition(kind: str, status: str, reason: str) -> Manifest:
    now = timestamp()
    return {
        "type": kind,
        "status": status,
        "reason": reason,
        "message": reason,
        "lastHeartbeatTime": now,
        "lastTransitionTime": now,
    }
