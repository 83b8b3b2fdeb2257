"""Models that only a pod can see: the operator has a Job look, and plans with what it says."""

import json
from pathlib import Path

import pytest
from api_objects import ApiObjects
from operator_harness import (
    TINY_CONFIG,
    GetService,
    OperatorProcess,
    condition,
    inference_service,
    on_a_volume,
    wait_for,
)


@pytest.mark.usefixtures("cluster")
def test_a_model_on_a_volume_is_planned_with_its_geometry(
    operator_process: OperatorProcess, objects: ApiObjects, namespace: str, get_service: GetService, tmp_path: Path
) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(TINY_CONFIG))
    objects.apply(inference_service("volume", namespace, **on_a_volume(tmp_path)))
    found = wait_for(get_service, "volume", "True", "ScaledToZero", 90)
    assert condition(found, "ModelFits")["reason"] == "Fits"
    (variant,) = found["status"]["plan"]["variants"]
    assert variant["maxModelLen"] == 64
    assert variant["memory"]["weights"] > 0
    (job,) = objects.list("Job", namespace, api="batch/v1")
    assert job["metadata"]["ownerReferences"][0]["name"] == "volume"


@pytest.mark.usefixtures("cluster")
def test_a_model_that_is_not_there_stops_the_plan_and_starts_no_engine(
    operator_process: OperatorProcess, objects: ApiObjects, namespace: str, get_service: GetService, tmp_path: Path
) -> None:
    objects.apply(inference_service("nothing", namespace, **on_a_volume(tmp_path, scaling={"replicas": 1})))
    found = wait_for(get_service, "nothing", "False", "ModelUnreadable", 90)
    assert condition(found, "Stalled")["status"] == "True"
    assert "there is no folder" in condition(found, "Ready")["message"]
    assert not objects.list("Deployment", namespace)
