"""A variant -> the template of its engine pods, safe by default; the user's own template is merged last. Pure."""

import hashlib
from copy import deepcopy

from octavo_engine.config import EngineConfig

from octavo_operator.api import GROUP, InferenceServiceSpec, Scheduling
from octavo_operator.children import (
    PORT,
    Owner,
    claim_template_name,
    selector_labels,
    variant_name,
    worker_labels,
)
from octavo_operator.decision import Variant
from octavo_operator.fit import SHARED_MEMORY_BYTES
from octavo_operator.nodes import GPU_TAINT
from octavo_operator.observe import GPUS, NODE_TYPE_LABEL, Manifest
from octavo_operator.offers import ARCH_LABEL, DRIVER_LABEL, PRODUCT_LABEL
from octavo_operator.quantities import format_bytes, format_millicores

CONTAINER = "engine"
CONFIG_HASH = f"{GROUP}/config-hash"

# Name of a pod's claim to its devices, and of the request in it.
CLAIM = "gpu"
# What the `restricted` level of Pod Security Standards asks for, and a root file system that nobody writes to.
POD_SECURITY: Manifest = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
CONTAINER_SECURITY: Manifest = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}

CONFIG_FOLDER = "/etc/octavo"
CONFIG_FILE = "engine.yaml"
CACHE_FOLDER = "/cache"
_STARTUP_PERIOD_S = 2
# SIGKILL comes this long after the engine has given up on requests that still run.
_EXIT_MARGIN_S = 15


def pod_template(owner: Owner, spec: InferenceServiceSpec, variant: Variant, *, is_worker: bool = False) -> Manifest:
    """The template as Octavo would have it, before `user_template` is merged into it.

    is_worker: of the pods beside the first of a replica over several nodes
    """
    scheduling = spec.scheduling or Scheduling()
    found_by = worker_labels(owner.key) if is_worker else selector_labels(owner.key)
    labels = {**found_by, NODE_TYPE_LABEL: variant.node_type.name}
    num_gpus = variant.requests.num_gpus
    pod: Manifest = {
        "serviceAccountName": owner.key.name,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": int(variant.config.drain_timeout_s) + _EXIT_MARGIN_S,
        "securityContext": POD_SECURITY,
        "affinity": _affinity(scheduling, variant),
        "containers": [_container(spec, variant)],
        "volumes": [
            {"name": "config", "configMap": {"name": variant_name(owner, variant)}},
            {"name": "tmp", "emptyDir": {}},
            {"name": "cache", "emptyDir": {}},
            {"name": "shm", "emptyDir": _shared_memory(num_gpus)},
        ],
    }
    if variant.node_type.claim:
        template_name = claim_template_name(owner, variant)
        pod["resourceClaims"] = [{"name": CLAIM, "resourceClaimTemplateName": template_name}]
    tolerations = _tolerations(scheduling, variant)
    if tolerations:
        pod["tolerations"] = tolerations
    if scheduling.node_selector:
        pod["nodeSelector"] = dict(scheduling.node_selector)
    # The replicas are spread: a worker belongs near its leader.
    if scheduling.topology_spread and not is_worker:
        same_service = {"labelSelector": {"matchLabels": selector_labels(owner.key)}}
        pod["topologySpreadConstraints"] = [
            each.model_dump(mode="json", by_alias=True) | same_service for each in scheduling.topology_spread
        ]
    if scheduling.priority_class_name:
        pod["priorityClassName"] = scheduling.priority_class_name
    if scheduling.runtime_class_name:
        pod["runtimeClassName"] = scheduling.runtime_class_name
    annotations = {CONFIG_HASH: config_hash(variant.config)} | ({GPUS: str(num_gpus)} if num_gpus > 1 else {})
    return {"metadata": {"labels": labels, "annotations": annotations}, "spec": pod}


def _shared_memory(num_gpus: int) -> Manifest:
    """/dev/shm, which the memory request covers; an engine on one device leaves it empty."""
    size = {"sizeLimit": format_bytes(num_gpus * SHARED_MEMORY_BYTES)} if num_gpus > 1 else {}
    return {"medium": "Memory", **size}


def config_hash(config: EngineConfig) -> str:
    """Rolls the pods when the ConfigMap's content changes."""
    return hashlib.sha256(config.to_yaml().encode()).hexdigest()[:16]


def _container(spec: InferenceServiceSpec, variant: Variant) -> Manifest:
    container: Manifest = {
        "name": CONTAINER,
        "image": variant.image,
        "command": ["octavo", "serve", "--config", f"{CONFIG_FOLDER}/{CONFIG_FILE}"],
        "ports": [{"name": "http", "containerPort": PORT, "protocol": "TCP"}],
        "env": environment(spec),
        "resources": _resources(variant),
        "startupProbe": {
            **_probe("/startupz"),
            "periodSeconds": _STARTUP_PERIOD_S,
            "failureThreshold": -(-variant.startup_s // _STARTUP_PERIOD_S),
        },
        "readinessProbe": {**_probe("/readyz"), "periodSeconds": 2, "failureThreshold": 2},
        "livenessProbe": {**_probe("/livez"), "periodSeconds": 10, "failureThreshold": 3},
        "securityContext": CONTAINER_SECURITY,
        "volumeMounts": [
            {"name": "config", "mountPath": CONFIG_FOLDER, "readOnly": True},
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "cache", "mountPath": CACHE_FOLDER},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }
    if spec.model.secret_ref:
        container["envFrom"] = [{"secretRef": {"name": spec.model.secret_ref.name}}]
    return container


def environment(spec: InferenceServiceSpec) -> list[Manifest]:
    """Caches go where a read-only container may write; the user's variables come last and win."""
    own = {
        "HF_HOME": f"{CACHE_FOLDER}/huggingface",
        "HOME": CACHE_FOLDER,
        "OCTAVO_KERNEL_CACHE_DIR": f"{CACHE_FOLDER}/kernels",
    }
    extra = {each.name: each.value for each in (spec.engine.extra_env if spec.engine else None) or []}
    return [{"name": name, "value": value} for name, value in {**own, **extra}.items()]


def _probe(path: str) -> Manifest:
    return {"httpGet": {"path": path, "port": "http"}, "timeoutSeconds": 5}


def _resources(variant: Variant) -> Manifest:
    """Requests without limits: a CPU engine may use idle cores, and the engine bounds its own memory."""
    requests = {
        "cpu": format_millicores(variant.requests.cpu_millicores),
        "memory": format_bytes(variant.requests.memory_bytes),
    }
    if not variant.requests.num_gpus:
        return {"requests": requests}
    if variant.node_type.claim:
        return {"requests": requests, "claims": [{"name": CLAIM}]}
    gpus = {variant.node_type.resource: str(variant.requests.num_gpus)}
    return {"requests": {**requests, **gpus}, "limits": gpus}


def _tolerations(scheduling: Scheduling, variant: Variant) -> list[Manifest]:
    own = [{"key": GPU_TAINT, "operator": "Exists"}] if variant.node_type.is_gpu else []
    asked = scheduling.tolerations or []
    return [*own, *(each.model_dump(mode="json", by_alias=True, exclude_none=True) for each in asked)]


def _affinity(scheduling: Scheduling, variant: Variant) -> Manifest:
    """The nodes that the plan is for, exactly; added to each alternative of the user's own affinity."""
    node_type = variant.node_type
    own: list[Manifest] = [{"key": ARCH_LABEL, "operator": "In", "values": [node_type.arch]}]
    if node_type.products:
        own.append({"key": PRODUCT_LABEL, "operator": "In", "values": list(node_type.products)})
    elif not node_type.is_gpu:
        own.append({"key": PRODUCT_LABEL, "operator": "DoesNotExist"})
    if node_type.min_driver_major:
        own.append({"key": DRIVER_LABEL, "operator": "Gt", "values": [str(node_type.min_driver_major - 1)]})
    affinity = deepcopy(scheduling.affinity or {})
    required = affinity.setdefault("nodeAffinity", {}).setdefault("requiredDuringSchedulingIgnoredDuringExecution", {})
    terms = required.setdefault("nodeSelectorTerms", []) or [{}]
    required["nodeSelectorTerms"] = [
        {**term, "matchExpressions": [*own, *term.get("matchExpressions", [])]} for term in terms
    ]
    return affinity


def user_template(spec: InferenceServiceSpec) -> Manifest:
    """spec.podTemplate, as it is merged into a pod."""
    template = spec.pod_template
    return template.model_dump(mode="json", by_alias=True, exclude_none=True) if template else {}
