"""One pod of a process node, from its binding to its deletion, and the status that it reports meanwhile."""

import asyncio
import base64
import logging
import shutil
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path

import certificates
from addresses import PodAddresses, reachable_address
from container import BackOff, Container, ContainerSetting, Launch, timestamp
from guard import Guard
from kube_client import UNREACHABLE, ApiError, KubeClient, Manifest, pod_path
from pod_environment import (
    ContainerConfigError,
    PodIdentity,
    command_line,
    environment_variables,
    expand,
    on_host,
)
from pod_volumes import container_mounts, made_folder, write_volume
from probes import ProbeTarget

logger = logging.getLogger(__name__)

# What every node reports as its own address: the machine, by an address that is not a loopback one.
HOST_IP = "10.243.0.1"

_CONFIG_RETRY_S = 1.0
_STATUS_RETRY_S = 0.3
_SERVICE_ACCOUNT_PATH = "/var/run/secrets/kubernetes.io/serviceaccount"


@dataclass(frozen=True, slots=True)
class PodHost:
    """What a node lends to each of its pods."""

    node_name: str
    client: KubeClient
    folder: Path
    addresses: PodAddresses
    guard: Guard
    back_off: BackOff
    environment: Mapping[str, str]


class PodReporter:
    """Keeps a pod's status subresource equal to what `status` returns. Writes are coalesced and retried."""

    def __init__(self, host: PodHost, pod: Manifest, status: Callable[[], Manifest]) -> None:
        self._host = host
        self._pod = pod
        self._status = status
        self._sent: Manifest | None = None
        self._changed = asyncio.Event()
        self._since: dict[str, tuple[str, str]] = {}

    def changed(self) -> None:
        self._changed.set()

    async def run(self) -> None:
        """Write until cancelled, or until the pod is gone."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            if not await self.write():
                return

    async def write(self) -> bool:
        """Write the status as it is now; False if the pod is no longer there."""
        while True:
            status = self._status()
            if status == self._sent:
                return True
            # The uid makes the server refuse a patch that is meant for an earlier pod of this name.
            body = {"metadata": {"uid": self._pod["metadata"]["uid"]}, "status": status}
            try:
                await self._host.client.patch(pod_path(self._pod, "/status"), body)
            except ApiError as error:
                if error.status == 404 or "metadata.uid" in str(error):
                    return False
                if not error.is_temporary and error.status != 409:
                    logger.error("pod=%s: status refused: %s", pod_name(self._pod), error)
                    self._sent = status
                    return True
            except UNREACHABLE as error:
                logger.debug("pod=%s: status not written: %s", pod_name(self._pod), error)
            else:
                self._sent = status
                return True
            await asyncio.sleep(_STATUS_RETRY_S)

    def condition(self, kind: str, is_true: bool, reason: str = "", message: str = "") -> Manifest:
        """A pod condition with the time of its last transition. Null clears a field that the server has."""
        status = "True" if is_true else "False"
        if self._since.get(kind, ("", ""))[0] != status:
            self._since[kind] = (status, timestamp())
        return {
            "type": kind,
            "status": status,
            "lastTransitionTime": self._since[kind][1],
            "reason": reason or None,
            "message": message or None,
        }

    async def delete(self) -> None:
        """Tell the server that nothing of the pod runs any more, which removes it for good."""
        body = {"gracePeriodSeconds": 0, "preconditions": {"uid": self._pod["metadata"]["uid"]}}
        while True:
            try:
                await self._host.client.delete(pod_path(self._pod), body)
            except ApiError as error:
                if not error.is_temporary:
                    return
            except UNREACHABLE as error:
                logger.debug("pod=%s: not deleted yet: %s", pod_name(self._pod), error)
            else:
                return
            await asyncio.sleep(_STATUS_RETRY_S)


class PodWorker:
    """Runs a pod's containers as processes."""

    def __init__(self, pod: Manifest, host: PodHost) -> None:
        self.pod = pod
        self._host = host
        self._ip = host.addresses.take(pod.get("status", {}).get("podIP"))
        self._identity = PodIdentity(pod, host.node_name, reachable_address(self._ip))
        metadata = pod["metadata"]
        self._folder = host.folder / f"{metadata['namespace']}_{metadata['name']}"
        self._reporter = PodReporter(host, pod, self._status)
        self._volumes: dict[str, Path] = {}
        self._started_at = timestamp()
        self._is_initialised = False
        self._has_volumes = False
        self._failure = ""
        self._background: set[asyncio.Task[None]] = set()
        self._running: asyncio.Task[None] | None = None
        self._reporting: asyncio.Task[None] | None = None
        spec = pod["spec"]
        init_policy = "Never" if spec.get("restartPolicy") == "Never" else "OnFailure"
        self._init_containers = [
            Container(one, self._setting(one, init_policy), self._restarts(one, "initContainerStatuses"))
            for one in spec.get("initContainers", ())
        ]
        self._containers = [
            Container(one, self._setting(one, spec.get("restartPolicy", "Always")), self._restarts(one))
            for one in spec["containers"]
        ]

    def start(self) -> None:
        self._reporting = self._spawn(self._reporter.run())
        self._running = asyncio.create_task(self._run())
        self._running.add_done_callback(self._log_failure)
        self._reporter.changed()

    def update(self, pod: Manifest) -> None:
        """The pod's object changed: readiness gates may, its containers cannot."""
        self.pod = pod
        self._reporter.changed()

    async def terminate(self, grace_s: float) -> None:
        """Graceful deletion: stop everything in `grace_s` seconds, report it, remove the pod from the API."""
        await self._stop(grace_s)
        # A pod that was never started here may be one that finished earlier: its status stays as it is.
        if self._running is not None:
            await self._reporter.write()
        await self._reporter.delete()

    async def kill(self, grace_s: float = 0.0) -> None:
        """End the pod's processes without a word to the API: its object is gone, or the node stops."""
        if self._reporting is not None:
            # Otherwise it may tell how the processes ended, and the pod would never run again.
            self._reporting.cancel()
            await asyncio.gather(self._reporting, return_exceptions=True)
        if grace_s == 0.0:
            self.hurry()
        # A graceful deletion that is under way already may have set itself a later deadline.
        timer = asyncio.get_running_loop().call_later(grace_s, self.hurry)
        await self._stop(grace_s)
        timer.cancel()

    def hurry(self) -> None:
        """Cut short whatever grace the processes were given."""
        for container in self._all:
            container.kill()

    @property
    def _all(self) -> list[Container]:
        return [*self._init_containers, *self._containers]

    async def _stop(self, grace_s: float) -> None:
        await asyncio.gather(*(container.end(grace_s) for container in self._all))
        tasks = [*self._background, *([self._running] if self._running else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._host.addresses.release(self._ip)
        # Logs stay for whoever wants to know what happened; secrets and data do not.
        shutil.rmtree(self._folder / "volumes", ignore_errors=True)

    async def _run(self) -> None:
        if self.pod["spec"].get("hostNetwork") or any(
            one.get("restartPolicy") for one in self.pod["spec"].get("initContainers", ())
        ):
            self._fail("the process node has no host network and no sidecar containers")
            return
        await self._make_volumes()
        for container in self._init_containers:
            exit_code = await container.run()
            if exit_code != 0:
                self._fail(f"init container {container.name} ended with {exit_code}")
                return
        self._is_initialised = True
        self._reporter.changed()
        await asyncio.gather(*(container.run() for container in self._containers))

    def _fail(self, message: str) -> None:
        self._failure = message
        self._reporter.changed()

    async def _make_volumes(self) -> None:
        folder = self._folder / "volumes"
        shutil.rmtree(folder, ignore_errors=True)
        for volume in self.pod["spec"].get("volumes", ()):
            while True:
                try:
                    self._volumes[volume["name"]] = await write_volume(
                        volume, folder / volume["name"], self._identity, self._lookup, self._token
                    )
                    break
                except ContainerConfigError as error:
                    self._event("Warning", "FailedMount", f"volume {volume['name']}: {error}")
                await asyncio.sleep(_CONFIG_RETRY_S)
        self._has_volumes = True
        self._reporter.changed()

    def _setting(self, container: Manifest, restart_policy: str) -> ContainerSetting:
        folder = self._folder / container["name"]
        return ContainerSetting(
            restart_policy=restart_policy,
            grace_s=self.pod["spec"].get("terminationGracePeriodSeconds", 30),
            back_off=self._host.back_off,
            guard=self._host.guard,
            log=folder.with_name(f"{container['name']}.log"),
            termination_log=folder / "termination-log",
            prepare=self._prepare,
            on_change=lambda: self._reporter.changed(),
            on_event=self._event,
        )

    def _restarts(self, container: Manifest, key: str = "containerStatuses") -> int:
        """A container that ran under an earlier life of this node counts on from there."""
        for status in self.pod.get("status", {}).get(key, ()):
            if status["name"] == container["name"] and status.get("containerID"):
                return int(status["restartCount"]) + 1
        return 0

    async def _prepare(self, container: Manifest) -> Launch:
        folder = made_folder(self._folder / container["name"])
        mounts = container_mounts(container, self._volumes, folder / "termination-log")
        base = await self._base_environment(container)
        variables = await environment_variables(container, self._identity, base, self._lookup)
        environment = on_host(variables, base, mounts)
        working_directory = made_folder(Path(mounts.rewrite(container.get("workingDir", str(folder)))))
        target = ProbeTarget(
            address=self._identity.address,
            ports={port["name"]: port["containerPort"] for port in container.get("ports", ()) if "name" in port},
            environment=environment,
            folder=working_directory,
            command_of=lambda words: [mounts.rewrite(expand(word, variables)) for word in words],
        )
        return Launch(command_line(container, variables, mounts), environment, working_directory, target)

    async def _base_environment(self, container: Manifest) -> dict[str, str]:
        """What the node gives to every container, below its own variables."""
        environment = dict(self._host.environment)
        environment["HOSTNAME"] = self.pod["metadata"]["name"]
        environment["OCTAVO_HOST"] = self._identity.address
        environment["KUBERNETES_SERVICE_HOST"], environment["KUBERNETES_SERVICE_PORT"] = (
            self._host.client.server.removeprefix("https://").rsplit(":", 1)
        )
        for mount in container.get("volumeMounts", ()):
            if mount["mountPath"] == _SERVICE_ACCOUNT_PATH:
                environment["KUBECONFIG"] = str(self._write_kubeconfig(self._volumes[mount["name"]]))
        return environment

    def _write_kubeconfig(self, account: Path) -> Path:
        """In-cluster clients look for the account at a fixed path, which no process has here."""
        path = self._folder / "kubeconfig"
        certificates.write_private(path, certificates.kubeconfig(
            self._host.client.server,
            (account / "ca.crt").read_bytes(),
            {"token": (account / "token").read_text()},
            namespace=self.pod["metadata"]["namespace"],
        ))  # fmt: skip
        return path

    async def _lookup(self, kind: str, name: str) -> Mapping[str, bytes] | None:
        namespace = self.pod["metadata"]["namespace"]
        plural = {"ConfigMap": "configmaps", "Secret": "secrets"}[kind]
        try:
            found = await self._host.client.get_or_none(f"/api/v1/namespaces/{namespace}/{plural}/{name}")
        except ApiError as error:
            # A node may read what its pods refer to; the authoriser learns of a new pod with a short delay.
            raise ContainerConfigError(str(error)) from error
        except UNREACHABLE as error:
            raise ContainerConfigError(f"the API server cannot be reached: {error}") from error
        if found is None:
            return None
        binary_key, text_key = ("binaryData", "data") if kind == "ConfigMap" else ("data", "stringData")
        data = {key: base64.b64decode(value) for key, value in (found.get(binary_key) or {}).items()}
        return data | {key: value.encode() for key, value in (found.get(text_key) or {}).items()}

    async def _token(self, audience: str, lifetime_s: int) -> str:
        metadata, spec = self.pod["metadata"], self.pod["spec"]
        account = spec.get("serviceAccountName", "default")
        bound = {"kind": "Pod", "apiVersion": "v1", "name": metadata["name"], "uid": metadata["uid"]}
        request = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "spec": {
                "audiences": [audience] if audience else [],
                "expirationSeconds": lifetime_s,
                "boundObjectRef": bound,
            },
        }
        path = f"/api/v1/namespaces/{metadata['namespace']}/serviceaccounts/{account}/token"
        try:
            answer = await self._host.client.create(path, request)
        except (ApiError, *UNREACHABLE) as error:
            raise ContainerConfigError(f"no token for service account {account}: {error}") from error
        return str(answer["status"]["token"])

    def _event(self, kind: str, reason: str, message: str) -> None:
        logger.debug("pod=%s: %s: %s", pod_name(self.pod), reason, message)
        self._spawn(self._send_event(kind, reason, message))

    async def _send_event(self, kind: str, reason: str, message: str) -> None:
        metadata, now = self.pod["metadata"], timestamp()
        event = {
            "metadata": {"generateName": f"{metadata['name']}.", "namespace": metadata["namespace"]},
            "involvedObject": {
                "apiVersion": "v1", "kind": "Pod", "name": metadata["name"],
                "namespace": metadata["namespace"], "uid": metadata["uid"],
            },
            "type": kind, "reason": reason, "message": message[:1000],
            "source": {"component": "process-node", "host": self._host.node_name},
            "firstTimestamp": now, "lastTimestamp": now, "count": 1,
        }  # fmt: skip
        try:
            await self._host.client.create(f"/api/v1/namespaces/{metadata['namespace']}/events", event)
        except (ApiError, *UNREACHABLE) as error:
            # An event is a courtesy; the status has what matters.
            logger.debug("pod=%s: event %s not recorded: %s", pod_name(self.pod), reason, error)

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        task.add_done_callback(self._log_failure)
        return task

    def _log_failure(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            logger.error("pod=%s: the process node failed", pod_name(self.pod), exc_info=task.exception())

    def _status(self) -> Manifest:
        unready = [container.name for container in self._containers if not container.is_ready]
        gates = self._closed_gates()
        not_ready = f"containers with unready status: [{' '.join(unready)}]" if unready else ""
        condition = self._reporter.condition
        is_ready = not unready and not gates
        ready_reason = "ContainersNotReady" if unready else "ReadinessGatesNotReady" if gates else ""
        ready_message = not_ready or (f"readiness gates not true: {' '.join(gates)}" if gates else "")
        return {
            "phase": self._phase(),
            "reason": "Unsupported" if self._failure and not self._has_volumes else None,
            "message": self._failure or None,
            "hostIP": HOST_IP,
            "podIP": self._ip,
            "podIPs": [{"ip": self._ip}],
            "startTime": self._started_at,
            "conditions": [
                condition("PodReadyToStartContainers", self._has_volumes),
                condition("Initialized", self._is_initialised),
                condition("ContainersReady", not unready, "ContainersNotReady" if unready else "", not_ready),
                condition("Ready", is_ready, ready_reason, ready_message),
            ],
            "initContainerStatuses": [container.status() for container in self._init_containers],
            "containerStatuses": [container.status() for container in self._containers],
        }

    def _closed_gates(self) -> list[str]:
        wanted = {gate["conditionType"] for gate in self.pod["spec"].get("readinessGates", ())}
        conditions = self.pod.get("status", {}).get("conditions", ())
        return sorted(wanted - {one["type"] for one in conditions if one["status"] == "True"})

    def _phase(self) -> str:
        if self._failure:
            return "Failed"
        if all(container.is_finished for container in self._containers):
            return "Failed" if any(container.exit_code for container in self._containers) else "Succeeded"
        has_run = [container.restart_count or "waiting" not in container.state for container in self._containers]
        return "Running" if all(has_run) else "Pending"


class HollowPod:
    """Reports a pod as running, without any process."""

    def __init__(self, pod: Manifest, host: PodHost, delay_s: float, becomes_ready: bool) -> None:
        self.pod = pod
        self._host = host
        self._delay_s = delay_s
        self._becomes_ready = becomes_ready
        self._ip = host.addresses.take(pod.get("status", {}).get("podIP"))
        self._started_at = timestamp()
        self._reporter = PodReporter(host, pod, self._status)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    def update(self, pod: Manifest) -> None:
        self.pod = pod

    async def terminate(self, grace_s: float) -> None:
        await self.kill()
        await self._reporter.delete()

    async def kill(self, grace_s: float = 0.0) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._host.addresses.release(self._ip)

    def hurry(self) -> None:
        """There is nothing to hurry."""

    async def _run(self) -> None:
        await asyncio.sleep(self._delay_s)
        await self._reporter.write()

    def _status(self) -> Manifest:
        condition, is_ready = self._reporter.condition, self._becomes_ready
        return {
            "phase": "Running",
            "hostIP": HOST_IP,
            "podIP": self._ip,
            "podIPs": [{"ip": self._ip}],
            "startTime": self._started_at,
            "conditions": [
                condition("PodReadyToStartContainers", True),
                condition("Initialized", True),
                condition("ContainersReady", is_ready, "" if is_ready else "ContainersNotReady"),
                condition("Ready", is_ready, "" if is_ready else "ContainersNotReady"),
            ],
            "containerStatuses": [self._container_status(one) for one in self.pod["spec"]["containers"]],
        }

    def _container_status(self, container: Manifest) -> Manifest:
        return {
            "name": container["name"],
            "image": container.get("image", ""),
            "imageID": "",
            "containerID": f"hollow://{container['name']}",
            "ready": self._becomes_ready,
            "started": True,
            "restartCount": 0,
            "state": {"running": {"startedAt": self._started_at}},
        }


def pod_name(pod: Manifest) -> str:
    return f"{pod['metadata']['namespace']}/{pod['metadata']['name']}"


def is_finished(pod: Manifest) -> bool:
    return pod.get("status", {}).get("phase") in {"Succeeded", "Failed"}


def deletion_grace_s(pod: Manifest) -> float | None:
    """Seconds that a pod under deletion has left from the request on; None if nobody deleted it."""
    metadata = pod["metadata"]
    return float(metadata.get("deletionGracePeriodSeconds", 30)) if "deletionTimestamp" in metadata else None
