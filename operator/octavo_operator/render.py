"""A plan -> finished manifests, whole and in a fixed order. Pure.

Every object carries a hash of itself as it was meant, so that a later reader sees what was asked for even after the API
server filled in its defaults. Quantities are written as the API server keeps them.
"""

import hashlib
import json
from collections.abc import Sequence

from octavo_engine.errors import UnsupportedModelError
from octavo_engine.geometry import Geometry, geometry_from_data, geometry_to_data

from octavo_operator.api import GROUP, InferenceServiceSpec
from octavo_operator.children import (
    PORT,
    Owner,
    child_metadata,
    claim_template_name,
    leader_worker_set_name,
    selector_labels,
    variant_name,
)
from octavo_operator.decision import Plan, Variant
from octavo_operator.merge import merge
from octavo_operator.network import network_policies
from octavo_operator.observe import GROUP_TEMPLATE, LEADER_WORKER_SET_KIND, NODE_TYPE_LABEL, TEMPLATE_HASH, Manifest
from octavo_operator.pods import CLAIM, CONFIG_FILE, pod_template, user_template
from octavo_operator.running import SPEC_HASH, VARIANT, remember, spec_hash

MANIFEST_HASH = f"{GROUP}/manifest-hash"
PLAN_HASH = f"{GROUP}/plan-hash"
GEOMETRY = f"{GROUP}/geometry"


def render(owner: Owner, spec: InferenceServiceSpec, plan: Plan) -> list[Manifest]:
    """All objects of the plan, in the order in which they are applied. None if there is nothing to run on."""
    if not plan.variants:
        return []
    objects = [
        _service_account(owner),
        *(_config_map(owner, variant, plan.model.geometry) for variant in plan.variants),
        *(_claim_template(owner, variant) for variant in plan.variants if variant.node_type.claim),
        _service(owner),
        *network_policies(owner, spec, plan),
        *(_workload(owner, spec, plan, variant) for variant in plan.variants),
    ]
    return [_with_hash(each) for each in objects]


def _service_account(owner: Owner) -> Manifest:
    """The engine's identity; it has no rights and no token."""
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": child_metadata(owner, owner.key.name),
        "automountServiceAccountToken": False,
    }


def _config_map(owner: Owner, variant: Variant, geometry: Geometry | None) -> Manifest:
    """The engine's configuration; beside it what it was planned with, see `remembered_geometry` and `recall`."""
    metadata = child_metadata(owner, variant_name(owner, variant), {NODE_TYPE_LABEL: variant.node_type.name})
    metadata["annotations"] = {VARIANT: remember(variant)}
    if geometry is not None:
        known = {"model": variant.config.model, "geometry": geometry_to_data(geometry)}
        metadata["annotations"][GEOMETRY] = json.dumps(known, sort_keys=True)
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata,
        "data": {CONFIG_FILE: variant.config.to_yaml()},
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
                return geometry_from_data(known["geometry"])
        except (ValueError, TypeError, KeyError, AttributeError, UnsupportedModelError):
            # Written by another version, or edited: then it is no memory, and the hub has to be asked.
            continue
    return None


def _service(owner: Owner) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": child_metadata(owner, owner.key.name),
        "spec": {
            "type": "ClusterIP",
            "selector": selector_labels(owner.key),
            "ports": [{"name": "http", "port": PORT, "targetPort": "http", "protocol": "TCP"}],
        },
    }


def _workload(owner: Owner, spec: InferenceServiceSpec, plan: Plan, variant: Variant) -> Manifest:
    """What makes a variant's pods: a Deployment, or a LeaderWorkerSet where a replica has pods on several nodes."""
    labels = {NODE_TYPE_LABEL: variant.node_type.name}
    make = _leader_worker_set if variant.split.num_nodes > 1 else _deployment
    manifest = make(owner, spec, variant, labels)
    manifest["metadata"]["annotations"] = {PLAN_HASH: plan.hash, SPEC_HASH: spec_hash(spec, owner.annotations)}
    return manifest


def _deployment(owner: Owner, spec: InferenceServiceSpec, variant: Variant, labels: dict[str, str]) -> Manifest:
    selector = {**selector_labels(owner.key), **labels}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": child_metadata(owner, variant_name(owner, variant), labels),
        "spec": {
            "replicas": variant.replicas,
            "progressDeadlineSeconds": variant.deadline_s,
            "revisionHistoryLimit": 3,
            "selector": {"matchLabels": selector},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": _rolling_update(variant)},
            "template": _template(owner, spec, variant),
        },
    }


def _leader_worker_set(owner: Owner, spec: InferenceServiceSpec, variant: Variant, labels: dict[str, str]) -> Manifest:
    """One group of pods for each replica: a leader, which serves, and workers; a pod that restarts restarts all."""
    leader = _template(owner, spec, variant)
    worker = _template(owner, spec, variant, is_worker=True)
    digest = {"metadata": {"annotations": {TEMPLATE_HASH: _digest([leader, worker])}}}
    return {
        "apiVersion": "leaderworkerset.x-k8s.io/v1",
        "kind": LEADER_WORKER_SET_KIND,
        "metadata": child_metadata(owner, leader_worker_set_name(owner, variant), labels),
        "spec": {
            "replicas": variant.replicas,
            "startupPolicy": "LeaderCreated",
            "networkConfig": {"subdomainPolicy": "Shared"},
            "rolloutStrategy": {"type": "RollingUpdate", "rollingUpdateConfiguration": _rolling_update(variant)},
            GROUP_TEMPLATE: {
                "size": variant.split.num_nodes,
                "restartPolicy": "RecreateGroupOnPodRestart",
                "leaderTemplate": merge(leader, digest),
                "workerTemplate": merge(worker, digest),
            },
        },
    }


def _template(owner: Owner, spec: InferenceServiceSpec, variant: Variant, *, is_worker: bool = False) -> Manifest:
    own = pod_template(owner, spec, variant, is_worker=is_worker)
    template = merge(own, user_template(spec))
    # A template that changed the labels would make pods that nobody finds.
    template["metadata"]["labels"].update(own["metadata"]["labels"])
    return template


def _rolling_update(variant: Variant) -> Manifest:
    return {"maxSurge": 1 if variant.is_surge else 0, "maxUnavailable": 0 if variant.is_surge else 1}


def _claim_template(owner: Owner, variant: Variant) -> Manifest:
    """What each pod claims where no device plugin offers the devices."""
    claim = variant.node_type.claim
    assert claim is not None
    exactly = {
        "deviceClassName": claim.device_class,
        "selectors": [{"cel": {"expression": claim.selector}}],
        "allocationMode": "ExactCount",
        "count": variant.requests.num_gpus,
    }
    return {
        "apiVersion": "resource.k8s.io/v1",
        "kind": "ResourceClaimTemplate",
        "metadata": child_metadata(
            owner, claim_template_name(owner, variant), {NODE_TYPE_LABEL: variant.node_type.name}
        ),
        "spec": {"spec": {"devices": {"requests": [{"name": CLAIM, "exactly": exactly}]}}},
    }


def _with_hash(manifest: Manifest) -> Manifest:
    return merge(manifest, {"metadata": {"annotations": {MANIFEST_HASH: _digest(manifest)}}})


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
