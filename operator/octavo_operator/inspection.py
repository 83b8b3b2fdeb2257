"""A Job that reads the geometry of a model which the operator cannot see, and what came of it. Pure.

The Job runs `octavo inspect` in the engine's image, with the volumes and the token that the engine will have. Its pod's
termination message is the geometry, or the reason why there is none. It reads no weights and asks for no GPU.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, cast, get_args

from octavo_engine.errors import SourceReason
from octavo_engine.geometry import geometry_from_data

from octavo_operator.api import GROUP, InferenceServiceSpec, Scheduling
from octavo_operator.children import Owner, owner_references
from octavo_operator.fit import model_address
from octavo_operator.merge import merge
from octavo_operator.modelgeometry import REFUSALS, has_own_key, read_geometry, why_not_read
from octavo_operator.nodes import GPU_TAINT
from octavo_operator.observe import MANAGED_BY, Manifest, ModelGeometry
from octavo_operator.pods import CACHE_FOLDER, CONTAINER, CONTAINER_SECURITY, POD_SECURITY, environment, user_template

# Not the labels that the Service finds engines by.
INSPECTION_LABEL = f"{GROUP}/inspection"
_DEADLINE_S = 300
# A failed Job is looked at until it goes; then another one tries. One that succeeded is not needed for longer either.
_KEEP_S = 600
# What the engine would fail with, too, again and again.
_FINAL = frozenset({"ModelNotFound", "ModelAccessDenied", "ModelUnreadable"})


def needs_inspection(spec: InferenceServiceSpec, model: ModelGeometry) -> bool:
    """Whether a pod of the engine may see what the operator does not: its files, its token, its Python packages."""
    if model.geometry is not None or model.is_unsupported or spec.plan_only:
        return False
    is_package = spec.model.uri.startswith("pkg://") and model.reason == "ModelUnreadable"
    has_key = model.reason in REFUSALS and has_own_key(spec)
    return why_not_read(spec.model.uri) is not None or is_package or has_key


def inspection_job(owner: Owner, spec: InferenceServiceSpec, image: str) -> Manifest:
    """The Job. Its name changes with all that its answer depends on."""
    pod = merge({"metadata": {"labels": {}}, "spec": _pod(spec, image)}, user_template(spec))
    # A template may add what an engine has and an inspection has not: probes, a GPU, other arguments.
    for each in pod["spec"]["containers"]:
        if each["name"] == CONTAINER:
            each |= _command(spec) | {"resources": _RESOURCES}
            for probe in ("startupProbe", "readinessProbe", "livenessProbe", "args"):
                each.pop(probe, None)
    digest = hashlib.sha256(json.dumps(pod, sort_keys=True).encode()).hexdigest()[:10]
    name = f"{owner.key.name}-inspect-{digest}"
    labels = {**MANAGED_BY, INSPECTION_LABEL: name}
    pod["metadata"]["labels"] = labels
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": name,
            "namespace": owner.key.namespace,
            "labels": labels,
            **owner_references(owner),
        },
        "spec": {
            "backoffLimit": 1,
            "activeDeadlineSeconds": _DEADLINE_S,
            "ttlSecondsAfterFinished": _KEEP_S,
            "template": pod,
        },
    }


_RESOURCES: Manifest = {"requests": {"cpu": "100m", "memory": "256Mi"}}


def _command(spec: InferenceServiceSpec) -> Manifest:
    return {"command": ["octavo", "inspect", model_address(spec), "--output-file", "/dev/termination-log"]}


def _pod(spec: InferenceServiceSpec, image: str) -> Manifest:
    scheduling = spec.scheduling or Scheduling()
    container: Manifest = {
        "name": CONTAINER,
        "image": image,
        **_command(spec),
        "env": environment(spec),
        "resources": _RESOURCES,
        "securityContext": CONTAINER_SECURITY,
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}, {"name": "cache", "mountPath": CACHE_FOLDER}],
    }
    if spec.model.secret_ref:
        container["envFrom"] = [{"secretRef": {"name": spec.model.secret_ref.name}}]
    asked = scheduling.tolerations or []
    pod: Manifest = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": POD_SECURITY,
        # Where there are GPU nodes alone, it runs on one of them, beside the engines.
        "tolerations": [
            {"key": GPU_TAINT, "operator": "Exists"},
            *(each.model_dump(mode="json", by_alias=True, exclude_none=True) for each in asked),
        ],
        "containers": [container],
        "volumes": [{"name": "tmp", "emptyDir": {}}, {"name": "cache", "emptyDir": {}}],
    }
    if scheduling.node_selector:
        pod["nodeSelector"] = dict(scheduling.node_selector)
    return pod


def read_inspection(job: Mapping[str, Any], pods: Sequence[Manifest]) -> ModelGeometry | None:
    """What came of a Job; None while it runs. pods: those of its label."""
    name = job["metadata"]["name"]
    newest = max(pods, key=_created, default=None)
    message = _message(newest) if newest else ""
    answer = _read_answer(message, name)
    if answer is not None:
        return answer
    for each in job.get("status", {}).get("conditions") or []:
        if each["type"] == "Failed" and each["status"] == "True":
            why = message.strip() or each.get("message") or each.get("reason")
            return ModelGeometry(problem=f"the inspection Job {name} failed: {why}", reason="InspectionFailed")
    return None


def _created(pod: Mapping[str, Any]) -> datetime:
    return datetime.fromisoformat(pod["metadata"]["creationTimestamp"])


def _message(pod: Mapping[str, Any]) -> str:
    """What the container left when it ended; empty while it runs."""
    for each in pod.get("status", {}).get("containerStatuses") or []:
        if each["name"] == CONTAINER:
            return str(each.get("state", {}).get("terminated", {}).get("message", ""))
    return ""


def _read_answer(message: str, name: str) -> ModelGeometry | None:
    """None for a message that `octavo inspect` did not write."""
    try:
        data = json.loads(message)
    except ValueError:
        return None
    if not isinstance(data, dict):
        return None
    if "architecture" in data:
        return read_geometry(lambda _: geometry_from_data(data), name)
    problem, reason = str(data.get("message", "")), data.get("reason")
    if reason == "ModelNotSupported":
        return ModelGeometry(problem=problem, is_unsupported=True)
    if reason in get_args(SourceReason):
        return ModelGeometry(problem=problem, is_unsupported=reason in _FINAL, reason=cast("SourceReason", reason))
    return None
