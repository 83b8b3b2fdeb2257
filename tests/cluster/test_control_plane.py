"""The control plane is the real one: version, validation, apply, garbage collection, controllers."""

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import binaries
import pytest
from api_objects import ApiObjects, eventually
from control_plane import ControlPlane, process_ids_of
from kubectl import Kubectl
from kubernetes.dynamic.exceptions import DynamicApiError
from plugin import HollowNodes

UP = Path(__file__).with_name("up.py")


def config_map(namespace: str, name: str, **data: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name, "namespace": namespace},
        "data": data,
    }


def deployment(namespace: str, name: str, **environment: str) -> dict[str, Any]:
    labels = {"app": name}
    container = {
        "name": "main",
        "image": "none",
        "env": [{"name": key, "value": value} for key, value in environment.items()],
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "replicas": 2,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": {"containers": [container]}},
        },
    }


def test_kubectl_and_server_report_the_built_version(kubectl: Kubectl) -> None:
    version = json.loads(kubectl("version", "-o", "json"))
    assert version["serverVersion"]["gitVersion"] == "v1.34.4"
    assert (version["serverVersion"]["major"], version["serverVersion"]["minor"]) == ("1", "34")


def test_refuses_a_custom_resource_that_breaks_a_cel_rule(objects: ApiObjects, namespace: str) -> None:
    rule = {"rule": "self.low <= self.high", "message": "low must not be above high"}
    number = {"type": "integer"}
    spec = {"type": "object", "properties": {"low": number, "high": number}, "x-kubernetes-validations": [rule]}
    definition = {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": "ranges.example.com"},
        "spec": {
            "group": "example.com",
            "scope": "Namespaced",
            "names": {"plural": "ranges", "singular": "range", "kind": "Range", "listKind": "RangeList"},
            "versions": [{
                "name": "v1", "served": True, "storage": True,
                "schema": {"openAPIV3Schema": {"type": "object", "properties": {"spec": spec}}},
            }],
        },
    }  # fmt: skip
    objects.apply(definition)
    eventually(lambda: objects.is_established("ranges.example.com"), "the custom resource is established")
    custom = {"apiVersion": "example.com/v1", "kind": "Range", "metadata": {"name": "one", "namespace": namespace}}
    eventually(lambda: objects.apply(custom | {"spec": {"low": 1, "high": 2}}), "a valid range is taken")
    with pytest.raises(DynamicApiError, match="low must not be above high"):
        objects.apply(custom | {"spec": {"low": 3, "high": 2}}, force=True)
    objects.delete("CustomResourceDefinition", "ranges.example.com")


def test_server_side_apply_keeps_fields_of_other_managers(objects: ApiObjects, namespace: str) -> None:
    objects.apply(config_map(namespace, "shared", mine="1"), field_manager="first")
    objects.apply(config_map(namespace, "shared", theirs="2"), field_manager="second")
    with pytest.raises(DynamicApiError, match="conflict"):
        objects.apply(config_map(namespace, "shared", mine="3"), field_manager="second")
    merged = objects.get("ConfigMap", "shared", namespace)
    assert merged is not None
    assert merged["data"] == {"mine": "1", "theirs": "2"}


def test_collects_objects_whose_owner_is_deleted(objects: ApiObjects, namespace: str) -> None:
    owner = objects.apply(config_map(namespace, "owner"))
    reference = {"apiVersion": "v1", "kind": "ConfigMap", "name": "owner", "uid": owner["metadata"]["uid"]}
    owned = config_map(namespace, "owned")
    owned["metadata"]["ownerReferences"] = [reference]
    objects.apply(owned)
    objects.delete("ConfigMap", "owner", namespace)
    eventually(lambda: objects.get("ConfigMap", "owned", namespace) is None, "the owned object is collected")


def test_a_deployment_rolls(objects: ApiObjects, namespace: str, hollow_nodes: HollowNodes) -> None:
    hollow_nodes(labels={"pool": "rolling"})

    def rolled_out() -> bool:
        found = objects.get("Deployment", "web", namespace) or {}
        status = found.get("status", {})
        counts = [status.get(key) for key in ("updatedReplicas", "readyReplicas", "replicas")]
        return bool(counts == [2, 2, 2] and status["observedGeneration"] == found["metadata"]["generation"])

    for colour in ("blue", "green"):
        manifest = deployment(namespace, "web", COLOUR=colour)
        manifest["spec"]["template"]["spec"]["nodeSelector"] = {"pool": "rolling"}
        objects.apply(manifest)
        eventually(rolled_out, f"{colour} is rolled out")
    sets = objects.list("ReplicaSet", namespace, "app=web")
    assert sorted(one["spec"]["replicas"] for one in sets) == [0, 2]


@contextlib.contextmanager
def started(state: Path) -> Iterator[subprocess.Popen[str]]:
    """up.py as a user starts it, with its kubeconfig printed."""
    with subprocess.Popen(
        [sys.executable, str(UP), "--keep-state", str(state), "--until-eof"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    ) as up:  # fmt: skip
        assert up.stdout is not None
        assert up.stdout.readline().strip() == str(state / "kubeconfig")
        yield up
        up.wait(20)


def sleeper(state: Path) -> dict[str, Any]:
    """A pod whose process can be told by the state folder in its command line."""
    command = ["sh", "-c", "sleep 600; exit", str(state)]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "sleeper", "namespace": "default"},
        "spec": {"containers": [{"name": "main", "image": "none", "command": command}]},
    }


def restarts_of_the_running_sleeper(kubectl: Kubectl) -> str:
    status = "{.status.containerStatuses[0]}"
    found = json.loads(kubectl("get", "pod", "sleeper", "-o", f"jsonpath={status}") or "{}")
    return str(found["restartCount"]) if "running" in found.get("state", {}) else ""


def test_up_goes_on_from_a_kept_state_and_leaves_no_process(control_plane: ControlPlane, tmp_path: Path) -> None:
    state = tmp_path / "state"
    kubectl = Kubectl(control_plane.kubectl, state / "kubeconfig")
    with started(state) as up:
        kubectl("apply", "-f", "-", manifests=[sleeper(state)])
        eventually(lambda: restarts_of_the_running_sleeper(kubectl) == "0", "the pod runs")
        address = kubectl("get", "pod", "sleeper", "-o", "jsonpath={.status.podIP}")
        assert up.stdin is not None
        up.stdin.close()
    assert up.returncode == 0
    assert process_ids_of(state) == []
    with started(state) as up:
        eventually(lambda: int(restarts_of_the_running_sleeper(kubectl) or 0) >= 1, "the pod runs again", 60)
        assert kubectl("get", "pod", "sleeper", "-o", "jsonpath={.status.podIP}") == address
        up.send_signal(signal.SIGINT)
    assert up.returncode == 0
    assert process_ids_of(state) == []


def test_up_leaves_no_process_when_it_is_killed(control_plane: ControlPlane, tmp_path: Path) -> None:
    state = tmp_path / "state"
    kubectl = Kubectl(control_plane.kubectl, state / "kubeconfig")
    with started(state) as up:
        kubectl("apply", "-f", "-", manifests=[sleeper(state)])
        eventually(lambda: restarts_of_the_running_sleeper(kubectl) == "0", "the pod runs")
        assert len(process_ids_of(state)) > len(binaries.COMPONENTS)
        up.kill()
    eventually(lambda: process_ids_of(state) == [], "every process is gone")
