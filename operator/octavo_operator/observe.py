"""What the operator sees, as frozen values: the resource, its children, the Nodes. Pure readers of manifests.

Everything that decides (`nodes`, `plan`, `conditions`) takes these values and nothing else, so that a decision can be
repeated from what was observed.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any, Literal, TypeAlias

from octavo_engine.errors import SourceReason
from octavo_engine.geometry import Geometry

from octavo_operator.api import GROUP
from octavo_operator.claims import ClaimableDevices, group, observe_slice
from octavo_operator.quantities import parse_quantity

# A finished Kubernetes object, as it goes to or comes from the API server.
Manifest: TypeAlias = dict[str, Any]

SERVICE_LABEL = f"{GROUP}/inference-service"
NODE_TYPE_LABEL = f"{GROUP}/node-type"
# Instead of SERVICE_LABEL on the pods of a replica that answer no requests: Services and HPAs find the leaders alone.
WORKER_LABEL = f"{GROUP}/worker-of"
# GPUs of a pod, where it has several.
GPUS = f"{GROUP}/gpus"
# Of the template that a LeaderWorkerSet's pod was made from: the set's status does not say which it has seen.
TEMPLATE_HASH = f"{GROUP}/template-hash"
MANAGED_BY = {"app.kubernetes.io/managed-by": "octavo"}
MANAGED_SELECTOR = "app.kubernetes.io/managed-by=octavo"

# https://lws.sigs.k8s.io
LEADER_WORKER_SET_KIND = "LeaderWorkerSet"
GROUP_TEMPLATE = "leaderWorkerTemplate"
_SET_NAME_LABEL = "leaderworkerset.sigs.k8s.io/name"

GPU_DOMAIN = "nvidia.com/"
GPU_RESOURCE = f"{GPU_DOMAIN}gpu"


@dataclass(frozen=True, slots=True, order=True)
class Key:
    """Which resource: the unit of work."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


def key_of(manifest: Mapping[str, Any]) -> Key:
    """The key of an object itself."""
    metadata = manifest["metadata"]
    return Key(metadata.get("namespace", ""), metadata["name"])


def owner_key(manifest: Mapping[str, Any]) -> Key | None:
    """The key of the resource that a child belongs to, by its label."""
    metadata = manifest["metadata"]
    labels = metadata.get("labels", {})
    name = labels.get(SERVICE_LABEL) or labels.get(WORKER_LABEL)
    return Key(metadata["namespace"], name) if name else None


@dataclass(frozen=True, slots=True)
class Taint:
    """A Node's taint."""

    key: str
    value: str
    effect: str

    def __str__(self) -> str:
        return f"{self.key}={self.value}:{self.effect}" if self.value else f"{self.key}:{self.effect}"


@dataclass(frozen=True)
class ObservedNode:
    """What planning reads of a Node; two values are equal exactly if no plan can tell them apart.

    gpu_resources: extended resources of the GPU vendor's domain -> how many pods can be given
    claimable:     devices that pods can claim (DRA), from the node's ResourceSlices
    """

    name: str
    labels: Mapping[str, str]
    taints: tuple[Taint, ...]
    is_ready: bool
    is_cordoned: bool
    cpu_millicores: int
    memory_bytes: int
    gpu_resources: Mapping[str, int] = field(default_factory=dict)
    claimable: tuple[ClaimableDevices, ...] = ()


# The labels of a Node that a plan, or a user's nodeSelector, can depend on are all of them, except these, which change
# with every heartbeat of some add-on.
_VOLATILE_LABELS = frozenset({"nvidia.com/gfd.timestamp"})
# The cordon has a taint of its own, which says the same as `unschedulable`; and the node controller's taints say the
# same as the Ready condition.
_CONDITION_TAINT = "node.kubernetes.io/"


def observe_node(manifest: Mapping[str, Any]) -> ObservedNode:
    """Read a Node."""
    spec, status = manifest.get("spec", {}), manifest.get("status", {})
    allocatable = status.get("allocatable") or status.get("capacity") or {}
    labels = manifest["metadata"].get("labels") or {}
    taints = (
        Taint(each["key"], each.get("value") or "", each.get("effect", ""))
        for each in spec.get("taints") or []
        if not each["key"].startswith(_CONDITION_TAINT)
    )
    return ObservedNode(
        name=manifest["metadata"]["name"],
        labels={name: value for name, value in labels.items() if name not in _VOLATILE_LABELS},
        taints=tuple(taints),
        is_ready=_condition(status, "Ready") == "True",
        is_cordoned=bool(spec.get("unschedulable")),
        cpu_millicores=int(_quantity(allocatable, "cpu") * 1000),
        memory_bytes=int(_quantity(allocatable, "memory")),
        gpu_resources={name: int(_quantity(allocatable, name)) for name in allocatable if name.startswith(GPU_DOMAIN)},
    )


def with_claimable(nodes: Iterable[ObservedNode], slices: Iterable[Manifest]) -> list[ObservedNode]:
    """The nodes with the devices that their ResourceSlices offer to claims."""
    devices: dict[str, list[ClaimableDevices]] = defaultdict(list)
    for manifest in slices:
        name, found = observe_slice(manifest)
        devices[name] += found
    return [replace(each, claimable=group(devices[each.name])) if devices[each.name] else each for each in nodes]


def _quantity(resources: Mapping[str, Any], name: str) -> Decimal:
    return parse_quantity(resources.get(name, 0))


def _condition(status: Mapping[str, Any], name: str) -> str:
    found = [each for each in status.get("conditions") or [] if each.get("type") == name]
    return str(found[0].get("status", "Unknown")) if found else "Unknown"


@dataclass(frozen=True, slots=True)
class WorkloadState:
    """How far the controller of a Deployment or a LeaderWorkerSet has come.

    is_current:       false while its controller has not seen the latest spec
    gpus_per_replica: also 1 on a CPU
    surges:           whether a rollout starts a pod beside the old ones
    progress_since:   when the step began that it is in; empty where the controller itself watches the deadline
    """

    node_type: str
    is_current: bool
    desired: int
    replicas: int
    updated: int
    ready: int
    available: int
    is_past_deadline: bool
    failure: str
    kind: str = "Deployment"
    name: str = ""
    gpus_per_replica: int = 1
    surges: bool = False
    progress_since: str = ""

    @property
    def is_complete(self) -> bool:
        """Whether all that was asked for runs, and nothing else."""
        exact = self.updated == self.replicas == self.desired
        return self.is_current and exact and self.available >= self.desired


def observe_workload(manifest: Mapping[str, Any], pods: Iterable[Mapping[str, Any]]) -> WorkloadState:
    """Read a Deployment, or a LeaderWorkerSet; pods: of the same resource."""
    return (
        _observe_leader_worker_set(manifest, pods)
        if GROUP_TEMPLATE in manifest["spec"]
        else _observe_deployment(manifest)
    )


def _observe_deployment(manifest: Mapping[str, Any]) -> WorkloadState:
    status = manifest.get("status") or {}
    metadata = manifest["metadata"]
    conditions = {each["type"]: each for each in status.get("conditions") or []}
    is_current = status.get("observedGeneration", 0) >= metadata.get("generation", 0)
    past = conditions.get("Progressing", {}).get("reason") == "ProgressDeadlineExceeded"
    failed = conditions.get("ReplicaFailure", {})
    return WorkloadState(
        name=metadata["name"],
        node_type=metadata.get("labels", {}).get(NODE_TYPE_LABEL, ""),
        is_current=is_current,
        desired=manifest["spec"].get("replicas", 1),
        replicas=status.get("replicas", 0),
        updated=status.get("updatedReplicas", 0),
        ready=status.get("readyReplicas", 0),
        available=status.get("availableReplicas", 0),
        gpus_per_replica=_gpus(manifest["spec"].get("template") or {}),
        is_past_deadline=is_current and past,
        failure=str(failed.get("message", "")) if failed.get("status") == "True" else "",
        surges=_surges(manifest["spec"].get("strategy"), "rollingUpdate"),
    )


def _observe_leader_worker_set(manifest: Mapping[str, Any], pods: Iterable[Mapping[str, Any]]) -> WorkloadState:
    """A replica is a group; its status is about groups, and says nothing of the spec that it is about.

    So a group counts as updated and ready only if its leader says so, too.
    """
    status, metadata, template = manifest.get("status") or {}, manifest["metadata"], manifest["spec"][GROUP_TEMPLATE]
    leaders = [
        each
        for each in pods
        if each["metadata"].get("labels", {}).get(_SET_NAME_LABEL) == metadata["name"]
        and SERVICE_LABEL in each["metadata"]["labels"]
        and "deletionTimestamp" not in each["metadata"]
    ]
    wanted = _annotation(template["leaderTemplate"], TEMPLATE_HASH)
    updated = sum(_annotation(each, TEMPLATE_HASH) == wanted for each in leaders)
    ready = min(status.get("readyReplicas", 0), sum(observe_pod(each).is_ready for each in leaders))
    since = [
        each["lastTransitionTime"]
        for each in status.get("conditions") or []
        if each["type"] in ("Progressing", "UpdateInProgress") and each["status"] == "True"
    ]
    return WorkloadState(
        kind=LEADER_WORKER_SET_KIND,
        name=metadata["name"],
        node_type=metadata.get("labels", {}).get(NODE_TYPE_LABEL, ""),
        is_current=bool(status),
        desired=manifest["spec"].get("replicas", 1),
        replicas=status.get("replicas", 0),
        updated=min(status.get("updatedReplicas", 0), updated),
        ready=ready,
        available=ready,
        gpus_per_replica=_gpus(template["leaderTemplate"]) * template["size"],
        is_past_deadline=False,
        failure="",
        surges=_surges(manifest["spec"].get("rolloutStrategy"), "rollingUpdateConfiguration"),
        progress_since=max(since, default=""),
    )


def _annotation(manifest: Mapping[str, Any], name: str) -> str:
    return str(((manifest.get("metadata") or {}).get("annotations") or {}).get(name, ""))


def _surges(strategy: Mapping[str, Any] | None, name: str) -> bool:
    return bool(((strategy or {}).get(name) or {}).get("maxSurge", 0))


def _gpus(pod: Mapping[str, Any]) -> int:
    """Of a pod or a template; 1 where it says nothing, which is what a CPU's engines count as, too."""
    text = _annotation(pod, GPUS)
    return int(text) if text.isdigit() else 1


@dataclass(frozen=True, slots=True)
class PodState:
    """Why an engine pod does not run, if it does not: `problem` is empty while all is well; `node` until it has one.

    num_gpus: that it holds; 1 on a CPU
    """

    name: str
    node_type: str
    is_unschedulable: bool
    problem: str
    node: str = ""
    is_ready: bool = False
    num_gpus: int = 1


def observe_pod(manifest: Mapping[str, Any]) -> PodState:
    """Read an engine pod."""
    status = manifest.get("status") or {}
    conditions = {each["type"]: each for each in status.get("conditions") or []}
    scheduled = conditions.get("PodScheduled", {})
    is_unschedulable = scheduled.get("status") == "False" and scheduled.get("reason") == "Unschedulable"
    problem = f"cannot be scheduled: {scheduled.get('message', '')}" if is_unschedulable else _container_problem(status)
    metadata = manifest["metadata"]
    return PodState(
        name=metadata["name"],
        node_type=metadata.get("labels", {}).get(NODE_TYPE_LABEL, ""),
        node=manifest.get("spec", {}).get("nodeName", ""),
        is_ready=conditions.get("Ready", {}).get("status") == "True",
        num_gpus=_gpus(manifest),
        is_unschedulable=is_unschedulable and "deletionTimestamp" not in metadata,
        problem=problem if "deletionTimestamp" not in metadata else "",
    )


_STARTING = frozenset({"ContainerCreating", "PodInitializing", ""})


def _container_problem(status: Mapping[str, Any]) -> str:
    containers = [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]
    for container in containers:
        waiting = container.get("state", {}).get("waiting", {})
        if waiting.get("reason", "") in _STARTING:
            continue
        last = container.get("lastState", {}).get("terminated", {})
        said = str(last.get("message") or waiting.get("message") or "").strip()
        code = f" (exit code {last['exitCode']})" if "exitCode" in last else ""
        return f"{waiting['reason']}{code}{': ' + said if said else ''}"
    return ""


GeometryReason: TypeAlias = SourceReason | Literal["GeometryUnknown", "Inspecting", "InspectionFailed"]


@dataclass(frozen=True, slots=True)
class ModelGeometry:
    """The model's geometry as far as it is known.

    geometry: None while it cannot be read from here
    problem:  why it is None, or why no engine runs it, in a sentence; reason: the same in a word
    is_unsupported: an engine would not serve this model at all
    """

    geometry: Geometry | None = None
    problem: str = ""
    is_unsupported: bool = False
    reason: GeometryReason = "GeometryUnknown"
