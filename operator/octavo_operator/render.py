"""A plan -> finished manifests, whole and in a fixed order. Pure.

Every object carries a hash of itself as it was meant, so that a later reader sees what was asked for even after the API
server filled in its defaults. Quantities are written as the API server keeps them.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any

from octavo_engine.config import EngineConfig
from octavo_engine.geometry import Geometry

from octavo_operator.api import API_VERSION, GROUP, KIND, InferenceServiceSpec, Scheduling
from octavo_operator.nodes import ARCH_LABEL, GPU_TAINT, PRODUCT_LABEL
from octavo_operator.observe import GPU_RESOURCE, MANAGED_BY, NODE_TYPE_LABEL, SERVICE_LABEL, Key, Manifest
from octavo_operator.plan import Plan, Variant
from octavo_operator.quantities import format_bytes, format_millicores

PORT = 8000
CONTAINER = "engine"
MANIFEST_HASH = f"{GROUP}/manifest-hash"
CONFIG_HASH = f"{GROUP}/config-hash"
PLAN_HASH = f"{GROUP}/plan-hash"
GEOMETRY = f"{GROUP}/geometry"

_CONFIG_FOLDER = "/etc/octavo"
_CONFIG_FILE = "engine.yaml"
_CACHE_FOLDER = "/cache"
_STARTUP_PERIOD_S = 2
# SIGKILL comes this long after the engine has given up on requests that still run.
_EXIT_MARGIN_S = 15

# Lists of a pod that merge by a key of their items; all other lists are replaced.
_MERGE_KEYS = {
    "containers": "name",
    "initContainers": "name",
    "volumes": "name",
    "env": "name",
    "imagePullSecrets": "name",
    "volumeMounts": "mountPath",
    "ports": "containerPort",
}


@dataclass(frozen=True, slots=True)
class Owner:
    """The resource that children belong to; without a uid (no cluster) they name no owner."""

    key: Key
    uid: str = ""


def render(owner: Owner, spec: InferenceServiceSpec, plan: Plan) -> list[Manifest]:
    """All objects of the plan, in the order in which they are applied. None if there is nothing to run on."""
    if not plan.variants:
        return []
    objects = [
        _service_account(owner),
        *(_config_map(owner, variant, plan.model.geometry) for variant in plan.variants),
        _service(owner),
        *(_deployment(owner, spec, plan, variant) for variant in plan.variants),
    ]
    return [_with_hash(each) for each in objects]


def service_url(key: Key) -> str:
    """Where the API is inside the cluster."""
    return f"http://{key.name}.{key.namespace}.svc:{PORT}"


def selector_labels(key: Key) -> dict[str, str]:
    """What the Service, and the scale subresource, find the engine pods by."""
    return {**MANAGED_BY, SERVICE_LABEL: key.name}


def label_selector(key: Key) -> str:
    """`selector_labels` as text."""
    return ",".join(f"{name}={value}" for name, value in selector_labels(key).items())


def _metadata(owner: Owner, name: str, labels: Mapping[str, str] | None = None) -> Manifest:
    metadata: Manifest = {
        "name": name,
        "namespace": owner.key.namespace,
        "labels": {"app.kubernetes.io/name": "octavo-engine", **selector_labels(owner.key), **(labels or {})},
    }
    if owner.uid:
        metadata["ownerReferences"] = [
            {
                "apiVersion": API_VERSION,
                "kind": KIND,
                "name": owner.key.name,
                "uid": owner.uid,
                "controller": True,
                "blockOwnerDeletion": True,
            }
        ]
    return metadata


def _service_account(owner: Owner) -> Manifest:
    """The engine's identity; it has no rights and no token."""
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": _metadata(owner, owner.key.name),
        "automountServiceAccountToken": False,
    }


def _config_map(owner: Owner, variant: Variant, geometry: Geometry | None) -> Manifest:
    """The engine's configuration; beside it the geometry that it was planned with, see `remembered_geometry`."""
    metadata = _metadata(owner, variant_name(owner, variant), {NODE_TYPE_LABEL: variant.node_type.name})
    if geometry is not None:
        known = {"model": variant.config.model, "geometry": asdict(geometry)}
        metadata["annotations"] = {GEOMETRY: json.dumps(known, sort_keys=True)}
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata,
        "data": {_CONFIG_FILE: variant.config.to_yaml()},
    }


def remembered_geometry(config_maps: Sequence[Manifest], address: str) -> Geometry | None:
    """The geometry that running engines were planned with, if it is of the model at `address`.

    It bridges the time in which a hub cannot be reached: engines must not roll because of that.
    """
    for each in config_maps:
        text = each["metadata"].get("annotations", {}).get(GEOMETRY, "{}")
        try:
            known = json.loads(text)
            if known.get("model") == address:
                return Geometry(**known["geometry"])
        except (ValueError, TypeError, KeyError):
            # Written by another version, or edited: then it is no memory, and the hub has to be asked.
            continue
    return None


def _service(owner: Owner) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(owner, owner.key.name),
        "spec": {
            "type": "ClusterIP",
            "selector": selector_labels(owner.key),
            "ports": [{"name": "http", "port": PORT, "targetPort": "http", "protocol": "TCP"}],
        },
    }


def variant_name(owner: Owner, variant: Variant) -> str:
    """Name of the Deployment and of the ConfigMap of one variant."""
    return f"{owner.key.name}-{variant.node_type.name}"


def _deployment(owner: Owner, spec: InferenceServiceSpec, plan: Plan, variant: Variant) -> Manifest:
    labels = {NODE_TYPE_LABEL: variant.node_type.name}
    selector = {**selector_labels(owner.key), **labels}
    template = merge(_pod_template(owner, spec, variant), _user_template(spec))
    # A template that changed the labels would make pods that nobody finds.
    template["metadata"]["labels"].update(selector)
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {**_metadata(owner, variant_name(owner, variant), labels), "annotations": {PLAN_HASH: plan.hash}},
        "spec": {
            "replicas": variant.replicas,
            "progressDeadlineSeconds": variant.deadline_s,
            "revisionHistoryLimit": 3,
            "selector": {"matchLabels": selector},
            "strategy": {
                "type": "RollingUpdate",
                "rollingUpdate": {
                    "maxSurge": 1 if variant.is_surge else 0,
                    "maxUnavailable": 0 if variant.is_surge else 1,
                },
            },
            "template": template,
        },
    }


def _pod_template(owner: Owner, spec: InferenceServiceSpec, variant: Variant) -> Manifest:
    scheduling = spec.scheduling or Scheduling()
    labels = {**selector_labels(owner.key), NODE_TYPE_LABEL: variant.node_type.name}
    pod: Manifest = {
        "serviceAccountName": owner.key.name,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": int(variant.config.drain_timeout_s) + _EXIT_MARGIN_S,
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "affinity": _affinity(scheduling, variant),
        "containers": [_container(spec, variant)],
        "volumes": [
            {"name": "config", "configMap": {"name": variant_name(owner, variant)}},
            {"name": "tmp", "emptyDir": {}},
            {"name": "cache", "emptyDir": {}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
        ],
    }
    tolerations = _tolerations(scheduling, variant)
    if tolerations:
        pod["tolerations"] = tolerations
    if scheduling.node_selector:
        pod["nodeSelector"] = dict(scheduling.node_selector)
    if scheduling.topology_spread:
        same_service = {"labelSelector": {"matchLabels": selector_labels(owner.key)}}
        pod["topologySpreadConstraints"] = [
            each.model_dump(mode="json", by_alias=True) | same_service for each in scheduling.topology_spread
        ]
    if scheduling.priority_class_name:
        pod["priorityClassName"] = scheduling.priority_class_name
    if scheduling.runtime_class_name:
        pod["runtimeClassName"] = scheduling.runtime_class_name
    return {
        "metadata": {"labels": labels, "annotations": {CONFIG_HASH: config_hash(variant.config)}},
        "spec": pod,
    }


def config_hash(config: EngineConfig) -> str:
    """Rolls the pods when the ConfigMap's content changes."""
    return hashlib.sha256(config.to_yaml().encode()).hexdigest()[:16]


def _container(spec: InferenceServiceSpec, variant: Variant) -> Manifest:
    container: Manifest = {
        "name": CONTAINER,
        "image": variant.image,
        "command": ["octavo", "serve", "--config", f"{_CONFIG_FOLDER}/{_CONFIG_FILE}"],
        "ports": [{"name": "http", "containerPort": PORT, "protocol": "TCP"}],
        "env": _environment(spec),
        "resources": _resources(variant),
        "startupProbe": {
            **_probe("/startupz"),
            "periodSeconds": _STARTUP_PERIOD_S,
            "failureThreshold": -(-variant.startup_s // _STARTUP_PERIOD_S),
        },
        "readinessProbe": {**_probe("/readyz"), "periodSeconds": 2, "failureThreshold": 2},
        "livenessProbe": {**_probe("/livez"), "periodSeconds": 10, "failureThreshold": 3},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "config", "mountPath": _CONFIG_FOLDER, "readOnly": True},
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "cache", "mountPath": _CACHE_FOLDER},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }
    if spec.model.secret_ref:
        container["envFrom"] = [{"secretRef": {"name": spec.model.secret_ref.name}}]
    return container


def _environment(spec: InferenceServiceSpec) -> list[Manifest]:
    """Caches go where a read-only container may write; the user's variables come last and win."""
    own = {
        "HF_HOME": f"{_CACHE_FOLDER}/huggingface",
        "HOME": _CACHE_FOLDER,
        "TRITON_CACHE_DIR": f"{_CACHE_FOLDER}/triton",
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
    gpus = {GPU_RESOURCE: str(variant.requests.num_gpus)}
    return {"requests": {**requests, **gpus}, "limits": gpus}


def _tolerations(scheduling: Scheduling, variant: Variant) -> list[Manifest]:
    own = [{"key": GPU_TAINT, "operator": "Exists"}] if variant.node_type.is_gpu else []
    asked = scheduling.tolerations or []
    return [*own, *(each.model_dump(mode="json", by_alias=True, exclude_none=True) for each in asked)]


def _affinity(scheduling: Scheduling, variant: Variant) -> Manifest:
    """The nodes that the plan is for, exactly; added to each alternative of the user's own affinity."""
    node_type = variant.node_type
    product: Manifest = {"key": PRODUCT_LABEL, "operator": "DoesNotExist"}
    if node_type.product:
        product = {"key": PRODUCT_LABEL, "operator": "In", "values": [node_type.product]}
    own = [{"key": ARCH_LABEL, "operator": "In", "values": [node_type.arch]}, product]
    if node_type.is_gpu and not node_type.product:
        own = own[:1]
    affinity = deepcopy(scheduling.affinity or {})
    required = affinity.setdefault("nodeAffinity", {}).setdefault("requiredDuringSchedulingIgnoredDuringExecution", {})
    terms = required.setdefault("nodeSelectorTerms", []) or [{}]
    required["nodeSelectorTerms"] = [
        {**term, "matchExpressions": [*own, *term.get("matchExpressions", [])]} for term in terms
    ]
    return affinity


def _user_template(spec: InferenceServiceSpec) -> Manifest:
    template = spec.pod_template
    return template.model_dump(mode="json", by_alias=True, exclude_none=True) if template else {}


def merge(base: Manifest, patch: Mapping[str, Any]) -> Manifest:
    """`patch` over `base`: mappings merge, lists of containers, volumes, variables and mounts merge by their key."""
    merged = dict(base)
    for name, value in patch.items():
        current = merged.get(name)
        if isinstance(value, Mapping) and isinstance(current, dict):
            merged[name] = merge(current, value)
        elif isinstance(value, list) and isinstance(current, list) and name in _MERGE_KEYS:
            merged[name] = _merge_list(current, value, _MERGE_KEYS[name])
        else:
            merged[name] = deepcopy(value)
    return merged


def _merge_list(base: Sequence[Manifest], patch: Sequence[Manifest], key: str) -> list[Manifest]:
    merged = {each.get(key): each for each in base}
    for each in patch:
        merged[each.get(key)] = merge(merged.get(each.get(key), {}), each)
    return list(merged.values())


def _with_hash(manifest: Manifest) -> Manifest:
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:16]
    return merge(manifest, {"metadata": {"annotations": {MANIFEST_HASH: digest}}})


def differs(desired: Any, live: Any) -> bool:
    """Whether a field that we set has another value in the live object. Fields that others added do not count.

    Items of lists are compared by name where they have one, else by place.
    """
    if isinstance(desired, Mapping):
        return not isinstance(live, Mapping) or any(differs(value, live.get(name)) for name, value in desired.items())
    if isinstance(desired, list):
        return not isinstance(live, list) or _lists_differ(desired, live)
    return bool(desired != live)


def _lists_differ(desired: Sequence[Any], live: Sequence[Any]) -> bool:
    if desired and all(isinstance(each, Mapping) and "name" in each for each in desired):
        by_name = {each.get("name"): each for each in live if isinstance(each, Mapping)}
        return any(differs(each, by_name.get(each["name"])) for each in desired)
    if len(desired) != len(live):
        return True
    return any(differs(each, other) for each, other in zip(desired, live, strict=True))
