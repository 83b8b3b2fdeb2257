"""The Job that looks where the operator cannot: who needs it, what it runs, what its end means."""

import json

import pytest
from octavo_engine.geometry import geometry_to_data
from octavo_operator.children import Owner, label_selector
from octavo_operator.inspection import INSPECTION_LABEL, inspection_job, needs_inspection, read_inspection
from octavo_operator.modelgeometry import IN_CONTAINER, WITH_ENGINES_KEYS
from octavo_operator.observe import Key, ModelGeometry
from operator_samples import LLAMA_8B, llama, spec

OWNER = Owner(Key("ns", "llama"), "uid-1")
ON_A_VOLUME = {
    "model": {"uri": "/models/llama", "secretRef": {"name": "token"}},
    "podTemplate": {
        "metadata": {"labels": {"team": "a"}},
        "spec": {
            "volumes": [{"name": "models", "persistentVolumeClaim": {"claimName": "models"}}],
            "containers": [
                {
                    "name": "engine",
                    "volumeMounts": [{"name": "models", "mountPath": "/models"}],
                    "resources": {"limits": {"nvidia.com/gpu": "1"}},
                    "startupProbe": {"periodSeconds": 9},
                }
            ],
        },
    },
}


def job(**fields):
    return inspection_job(OWNER, spec(**{**ON_A_VOLUME, **fields}), "engine:1")


def container(manifest):
    (found,) = manifest["spec"]["template"]["spec"]["containers"]
    return found


def refused(reason):
    return ModelGeometry(problem="no", reason=reason)


NEEDS = {
    "a path": ({"model": {"uri": "/models/llama"}}, ModelGeometry(problem=IN_CONTAINER), True),
    "a path, planned only": ({"model": {"uri": "/m"}, "planOnly": True}, ModelGeometry(problem=IN_CONTAINER), False),
    "a bucket": ({"model": {"uri": "s3://bucket/llama"}}, ModelGeometry(problem=WITH_ENGINES_KEYS), True),
    "a registry": ({"model": {"uri": "oci://ghcr.io/a/b"}}, ModelGeometry(problem=WITH_ENGINES_KEYS), True),
    "known": ({}, LLAMA_8B, False),
    "gated, without a key": ({}, refused("ModelAccessDenied"), False),
    "gated, with a key": ({"model": {"uri": "hf://a/b", "secretRef": {"name": "t"}}}, refused("ModelNotFound"), True),
    "a hub in trouble": ({"model": {"uri": "hf://a/b", "secretRef": {"name": "t"}}}, refused("HubUnavailable"), False),
    "a package": ({"model": {"uri": "pkg://name/a.gguf"}}, refused("ModelUnreadable"), True),
    "not supported": ({"model": {"uri": "/m"}}, ModelGeometry(problem="no", is_unsupported=True), False),
}  # fmt: skip


@pytest.mark.parametrize(("fields", "model", "expected"), NEEDS.values(), ids=NEEDS)
def test_only_what_a_pod_may_see_better_is_inspected(fields, model, expected):
    assert needs_inspection(spec(**fields), model) is expected


def test_runs_inspect_with_the_engines_volumes_and_token_and_without_a_gpu():
    made = job()
    pod, engine = made["spec"]["template"]["spec"], container(made)
    assert engine["command"] == ["octavo", "inspect", "/models/llama", "--output-file", "/dev/termination-log"]
    assert engine["image"] == "engine:1"
    assert engine["envFrom"] == [{"secretRef": {"name": "token"}}]
    assert {each["mountPath"] for each in engine["volumeMounts"]} == {"/tmp", "/cache", "/models"}
    assert {each["name"] for each in pod["volumes"]} == {"tmp", "cache", "models"}
    assert engine["resources"] == {"requests": {"cpu": "100m", "memory": "256Mi"}}
    assert "startupProbe" not in engine
    assert pod["restartPolicy"] == "Never"


def test_its_pods_meet_the_restricted_level():
    pod = job()["spec"]["template"]["spec"]
    assert pod["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    security = container(job())["securityContext"]
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert not security["allowPrivilegeEscalation"]
    assert security["readOnlyRootFilesystem"]


def test_the_service_does_not_find_its_pods():
    made = job()
    labels = made["spec"]["template"]["metadata"]["labels"]
    wanted = dict(each.split("=") for each in label_selector(OWNER.key).split(","))
    assert not wanted.items() <= labels.items()
    assert labels[INSPECTION_LABEL] == made["metadata"]["name"]
    assert len(made["metadata"]["name"]) <= 63
    assert made["metadata"]["ownerReferences"][0]["uid"] == "uid-1"


def test_another_model_is_another_job_and_another_limit_is_not():
    name = job()["metadata"]["name"]
    assert job(engine={"maxNumSeqs": 3})["metadata"]["name"] == name
    assert job(model={"uri": "/models/other"})["metadata"]["name"] != name
    assert job(podTemplate=None)["metadata"]["name"] != name


def pod(message="", created="2026-01-01T00:00:00Z", *, ended=True):
    state = {"terminated": {"exitCode": 0, "message": message}} if ended else {"running": {}}
    return {
        "metadata": {"name": "p", "creationTimestamp": created},
        "status": {"containerStatuses": [{"name": "engine", "state": state}]},
    }


def failed(message):
    return {**job(), "status": {"conditions": [{"type": "Failed", "status": "True", "message": message}]}}


def said(reason):
    return json.dumps({"reason": reason, "message": "why"})


def test_a_geometry_comes_back_as_it_was_written():
    found = read_inspection(job(), [pod(json.dumps(geometry_to_data(llama())))])
    assert found == LLAMA_8B


ENDS = {
    "running": ([pod(ended=False)], job(), None),
    "no pod yet": ([], job(), None),
    "something else went wrong, and another pod tries": ([pod("no such image")], job(), None),
    "the newest counts": (
        [pod(said("ModelUnreadable")), pod(created="2026-01-01T00:00:09Z", ended=False)], job(), None,
    ),
    "the model is not there": (
        [pod(said("ModelUnreadable"))], job(), ModelGeometry(None, "why", True, "ModelUnreadable"),
    ),
    "the model is not supported": ([pod(said("ModelNotSupported"))], job(), ModelGeometry(None, "why", True)),
    "the hub is in trouble": (
        [pod(said("HubUnavailable"))], job(), ModelGeometry(None, "why", False, "HubUnavailable"),
    ),
    "a contradiction": (
        [pod(json.dumps({**geometry_to_data(llama()), "num_heads": 31}))], job(),
        ModelGeometry(None, "geometry.num_heads=31 is not a multiple of num_kv_heads=8", True),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("pods", "made", "expected"), ENDS.values(), ids=ENDS)
def test_what_its_end_means(pods, made, expected):
    assert read_inspection(made, pods) == expected


def test_a_job_that_failed_says_why():
    found = read_inspection(failed("Job was active longer than specified deadline"), [])
    assert found.reason == "InspectionFailed"
    assert found.problem.endswith(" failed: Job was active longer than specified deadline")
    assert not found.is_unsupported
    found = read_inspection(failed("Job has reached the specified backoff limit"), [pod("exec format error")])
    assert found.problem.endswith(" failed: exec format error")
