"""The operator under what clusters do to it: kills at any moment, many resources at once, a second replica, an API
server that goes away.
"""

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from api_objects import ApiObjects, eventually
from control_plane import ControlPlane
from kubectl import Kubectl
from kubernetes.client.exceptions import ApiException
from operator_harness import (
    CHILD_KINDS,
    OWN,
    Manifest,
    OperatorProcess,
    Recorder,
    assert_statuses_are_honest,
    has_reached,
    inference_service,
)
from plugin import HollowNodes
from urllib3.exceptions import HTTPError

API = "octavo.dev/v1alpha1"

MakeOperator = Callable[..., OperatorProcess]


@pytest.fixture
def make_operator(
    crd: str, kubeconfig: Path, namespace: str, tmp_path: Path, request: pytest.FixtureRequest
) -> MakeOperator:
    """Operators that serve the test's namespace alone; what still runs is ended afterwards."""

    def make(*arguments: str, log: str = "operator.log") -> OperatorProcess:
        process = OperatorProcess(kubeconfig, tmp_path / log, "--namespace", namespace, *arguments)
        request.addfinalizer(process.kill)
        return process

    return make


def are_all_serving(objects: ApiObjects, namespace: str, count: int) -> bool:
    found = objects.list("InferenceService", namespace, api=API)
    return len(found) == count and all(has_reached(each, "True", "Serving") for each in found)


def nothing_is_left(objects: ApiObjects, namespace: str) -> bool:
    return not any(objects.list(kind, namespace, OWN) for kind in (*CHILD_KINDS, "ReplicaSet", "Pod"))


@pytest.mark.timeout(600)
def test_converges_after_being_killed_at_any_moment_of_a_rollout(
    make_operator: MakeOperator,
    objects: ApiObjects,
    namespace: str,
    service_nodes: Callable[..., Manifest],
    record: Callable[[str], Recorder],
) -> None:
    rng = random.Random(20)
    scheduling = service_nodes(2)
    operator = make_operator("--no-leader-election", "--resync-seconds", "3600")
    recorder = record("killed")
    for attempt in range(8):
        operator.start()
        engine = {"maxNumSeqs": attempt + 1}
        service = inference_service("killed", namespace, scheduling=scheduling, engine=engine, scaling={"replicas": 2})
        # Before, during and after the operator's start: each moment is some test's moment.
        if attempt % 2:
            operator.wait_until_ready()
        objects.apply(service)
        time.sleep(rng.uniform(0, 1.5))
        operator.kill()
    operator.start().wait_until_ready()
    eventually(lambda: are_all_serving(objects, namespace, 1), "the last edit serves", 60)
    (config_map,) = objects.list("ConfigMap", namespace, OWN)
    assert "max_num_seqs: 8" in config_map["data"]["engine.yaml"]
    (deployment,) = objects.list("Deployment", namespace, OWN)
    assert deployment["status"]["updatedReplicas"] == deployment["status"]["readyReplicas"] == 2
    assert_statuses_are_honest(recorder.stop())
    objects.delete("InferenceService", "killed", namespace)
    eventually(lambda: nothing_is_left(objects, namespace), "nothing is left", 30)
    assert operator.stop() == 0


@pytest.mark.timeout(600)
def test_deletion_while_the_operator_is_dead_leaves_nothing(
    make_operator: MakeOperator, objects: ApiObjects, namespace: str, service_nodes: Callable[..., Manifest]
) -> None:
    operator = make_operator("--no-leader-election").start().wait_until_ready()
    objects.apply(inference_service("orphan", namespace, scheduling=service_nodes()))
    eventually(lambda: are_all_serving(objects, namespace, 1), "it serves", 60)
    operator.kill()
    objects.delete("InferenceService", "orphan", namespace)
    # The garbage collector learns of a new CRD every half minute.
    eventually(lambda: nothing_is_left(objects, namespace), "nothing is left", 60)


@pytest.mark.timeout(600)
def test_reconciles_200_resources_in_under_a_minute(
    make_operator: MakeOperator,
    objects: ApiObjects,
    kubectl: Kubectl,
    namespace: str,
    hollow_nodes: HollowNodes,
    record_property: Callable[[str, object], None],
) -> None:
    count = 200
    hollow_nodes(4, labels={"test": namespace}, capacity={"cpu": "2000", "memory": "4Ti"})
    scheduling = {"nodeSelector": {"test": namespace}}
    # Small requests: 200 engines on four nodes.
    resources = {"requests": {"cpu": "100m", "memory": "1Gi"}}
    template = {"spec": {"containers": [{"name": "engine", "resources": resources}]}}
    services = [
        inference_service(f"many-{number:03}", namespace, scheduling=scheduling, podTemplate=template)
        for number in range(count)
    ]
    for service in services:
        objects.apply(service)
    operator = make_operator("--no-leader-election")
    started = time.monotonic()
    operator.start()

    # A list of 200 objects is work for this process too, so it looks but once a second.
    while not are_all_serving(objects, namespace, count):
        assert time.monotonic() - started < 120, operator.log.read_text()[-2000:]
        time.sleep(1)
    serving_s = time.monotonic() - started
    metrics = operator.metrics()
    passes = metrics['octavo_operator_reconciles_total{result="success"}']
    writes = sum(value for name, value in metrics.items() if name.startswith("octavo_operator_writes_total"))
    print(f"all serving after {serving_s:.1f} s, {passes:.0f} passes, {writes:.0f} writes")
    for name, value in (("serving_s", serving_s), ("passes", passes), ("writes", writes)):
        record_property(name, value)
    assert serving_s < 60
    kubectl("delete", "inferenceservices", "--all", f"--namespace={namespace}", "--wait=false", timeout_s=120)
    eventually(lambda: nothing_is_left(objects, namespace), "nothing is left", 120)


@pytest.mark.timeout(600)
def test_a_second_replica_takes_over(
    make_operator: MakeOperator, objects: ApiObjects, namespace: str, service_nodes: Callable[..., Manifest]
) -> None:
    election = ("--lease-namespace", namespace, "--lease-name", "test", "--lease-seconds", "5")
    scheduling = service_nodes()
    first = make_operator(*election, log="first.log").start().wait_until_ready()

    def holder() -> str:
        lease = objects.get("Lease", "test", namespace) or {}
        return str(lease.get("spec", {}).get("holderIdentity") or "")

    eventually(holder, "the first leads")
    first_holder = holder()
    second = make_operator(*election, log="second.log").start().wait_until_ready()
    assert first.metrics()["octavo_operator_leader"] == 1
    assert second.metrics()["octavo_operator_leader"] == 0

    first.kill()
    objects.apply(inference_service("after-kill", namespace, scheduling=scheduling))
    eventually(lambda: are_all_serving(objects, namespace, 1), "the second acts once the Lease is over", 30)
    assert holder() != first_holder

    third = make_operator(*election, log="third.log").start().wait_until_ready()
    assert second.stop() == 0
    started = time.monotonic()
    eventually(lambda: third.metrics()["octavo_operator_leader"] == 1, "the third leads", 10)
    assert time.monotonic() - started < 5, "a leader that stops gives its Lease back"
    objects.apply(inference_service("after-stop", namespace, scheduling=scheduling))
    eventually(lambda: are_all_serving(objects, namespace, 2), "the third acts", 30)
    assert third.stop() == 0
    assert not holder()


@pytest.mark.timeout(600)
def test_survives_an_api_server_that_goes_away(
    make_operator: MakeOperator,
    objects: ApiObjects,
    control_plane: ControlPlane,
    namespace: str,
    service_nodes: Callable[..., Manifest],
) -> None:
    scheduling = service_nodes()
    operator = make_operator("--no-leader-election", "--resync-seconds", "3600").start().wait_until_ready()
    objects.apply(inference_service("before", namespace, scheduling=scheduling))
    eventually(lambda: are_all_serving(objects, namespace, 1), "it serves", 60)
    control_plane.stop_component("kube-apiserver")
    time.sleep(3)
    control_plane.start_component("kube-apiserver")

    def is_applied() -> bool:
        try:
            objects.apply(inference_service("after", namespace, scheduling=scheduling))
        except (HTTPError, ApiException):
            return False
        return True

    eventually(is_applied, "the API server is back", 60)
    eventually(lambda: are_all_serving(objects, namespace, 2), "the operator goes on", 90)
    assert operator.probe("/healthz") == 200
    assert "Traceback" not in operator.log.read_text()
