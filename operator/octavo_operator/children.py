"""What the objects of one resource are called, how they are labelled, and whom they belong to. Pure."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from octavo_operator.api import API_VERSION, KIND
from octavo_operator.decision import Variant
from octavo_operator.observe import MANAGED_BY, SERVICE_LABEL, WORKER_LABEL, Key, Manifest

PORT = 8000
# A label of 63 characters holds this, the number of a group below 1,000 and the hash of a StatefulSet's revision.
_MAX_SET_NAME = 48


@dataclass(frozen=True, slots=True)
class Owner:
    """The resource that children belong to; without a uid (no cluster) they name no owner.

    annotations: the resource's own
    """

    key: Key
    uid: str = ""
    annotations: Mapping[str, str] = field(default_factory=dict)


def service_url(key: Key) -> str:
    """Where the API is inside the cluster."""
    return f"http://{key.name}.{key.namespace}.svc:{PORT}"


def selector_labels(key: Key) -> dict[str, str]:
    """What the Service, and the scale subresource, find the engine pods by."""
    return {**MANAGED_BY, SERVICE_LABEL: key.name}


def label_selector(key: Key) -> str:
    """`selector_labels` as text."""
    return ",".join(f"{name}={value}" for name, value in selector_labels(key).items())


def child_metadata(owner: Owner, name: str, labels: Mapping[str, str] | None = None) -> Manifest:
    """Metadata of a child: the labels that it is found by, and its owner."""
    metadata: Manifest = {
        "name": name,
        "namespace": owner.key.namespace,
        "labels": {"app.kubernetes.io/name": "octavo-engine", **selector_labels(owner.key), **(labels or {})},
    }
    return metadata | owner_references(owner)


def owner_references(owner: Owner) -> Manifest:
    """Metadata that has the garbage collector delete an object after its owner; empty without a cluster."""
    if not owner.uid:
        return {}
    reference = {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "name": owner.key.name,
        "uid": owner.uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }
    return {"ownerReferences": [reference]}


def variant_name(owner: Owner, variant: Variant) -> str:
    """Name of the Deployment and of the ConfigMap of one variant."""
    return f"{owner.key.name}-{variant.node_type.name}"


def leader_worker_set_name(owner: Owner, variant: Variant) -> str:
    """Name of the LeaderWorkerSet of a variant, short enough for the labels that are made of it.

    Its controller makes a headless Service of the same name, which must not be another resource's.
    """
    name = f"{variant_name(owner, variant)}-group"
    if len(name) <= _MAX_SET_NAME:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:6]
    return f"{name[: _MAX_SET_NAME - 7].rstrip('-')}-{digest}"


def worker_labels(key: Key) -> dict[str, str]:
    """Of the pods of a replica that answer no requests."""
    return {**MANAGED_BY, WORKER_LABEL: key.name}


def claim_template_name(owner: Owner, variant: Variant) -> str:
    """Another name for another selector or count, since the spec of a template cannot be changed."""
    claim = variant.node_type.claim
    several = f" x{variant.requests.num_gpus}" if variant.requests.num_gpus > 1 else ""
    digest = hashlib.sha256(f"{claim.selector if claim else ''}{several}".encode()).hexdigest()[:6]
    return f"{variant_name(owner, variant)}-{digest}"
