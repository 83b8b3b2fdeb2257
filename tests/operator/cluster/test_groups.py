"""Models over several GPUs, and over several nodes, with the real controller of LeaderWorkerSets."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from api_objects import ApiObjects, eventually
from kubectl import Kubectl
from leader_worker_sets import LeaderWorkerSets
from octavo_engine.geometry import geometry_to_data
from operator_harness import (
    OWN,
    GetService,
    Manifest,
    OperatorProcess,
    ServiceNodes,
    condition,
    inference_service,
    wait_for,
)
from operator_samples import llama

H100 = {
    "nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3", "nvidia.com/gpu.memory": "81559",
    "nvidia.com/gpu.compute.major": "9", "nvidia.com/gpu.compute.minor": "0", "nvidia.com/cuda.driver.major": "580",
}  # fmt: skip
EIGHT = {"cpu": "128", "memory": "2Ti", "nvidia.com/gpu": "8"}
LLAMA_70B = llama(num_layers=80, hidden_size=8192)
LLAMA_405B = llama(num_layers=126, hidden_size=16384)


def service_of(name: str, namespace: str, geometry: object, **spec: object) -> Manifest:
    model = {"uri": "hf://meta-llama/Llama", "geometry": geometry_to_data(geometry)}  # type: ignore[arg-type]
    return inference_service(name, namespace, **{"model": model, **spec})


def engine_of(objects: ApiObjects, namespace: str) -> Manifest:
    (config_map,) = objects.list("ConfigMap", namespace, OWN)
    found: Manifest = yaml.safe_load(config_map["data"]["engine.yaml"])
    return found


@pytest.fixture
def own_operator(crd: str, kubeconfig: Path, namespace: str, tmp_path: Path) -> Iterator[OperatorProcess]:
    """Of one test alone: a CRD that goes ends kopf's watches with a traceback, and new ones begin."""
    arguments = ("--namespace", namespace, "--no-leader-election", "--resync-seconds", "2")
    with OperatorProcess(kubeconfig, tmp_path / "log", *arguments) as process:
        yield process


def test_a_model_takes_the_gpus_of_a_node_that_hold_it(
    own_operator: OperatorProcess,
    objects: ApiObjects,
    namespace: str,
    service_nodes: ServiceNodes,
    get_service: GetService,
) -> None:
    service_nodes(labels=H100, capacity={**EIGHT, "nvidia.com/gpu": "2"})
    scheduling = service_nodes(labels=H100, capacity={**EIGHT, "nvidia.com/gpu": "4"})
    engine = {"maxModelLen": 65_536}
    objects.apply(service_of("wide", namespace, LLAMA_70B, scheduling=scheduling, engine=engine))
    found = wait_for(get_service, "wide", "True", "Serving")
    (variant,) = found["status"]["plan"]["variants"]
    assert (variant["tensorParallel"], variant.get("nodesPerReplica")) == (4, None)
    assert variant["why"].endswith("a replica takes 4 GPUs of a node: fewer do not hold the model")
    assert sum(variant["memory"].values()) == pytest.approx(81_559 << 20, rel=0.01)
    (pod,) = objects.list("Pod", namespace, OWN)
    assert pod["spec"]["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": "4"}
    (shared,) = [each["emptyDir"] for each in pod["spec"]["volumes"] if each["name"] == "shm"]
    assert shared == {"medium": "Memory", "sizeLimit": "4Gi"}
    assert engine_of(objects, namespace)["tensor_parallel_size"] == 4

    objects.merge("InferenceService", "wide", {"spec": {"hardware": {"gpusPerReplica": 8}}}, namespace)
    refused = wait_for(get_service, "wide", "False", "ModelDoesNotFit")
    assert "hardware.gpusPerReplica: 8 cannot be had: there are 2 nodes" in condition(refused, "ModelFits")["message"]


def groups_of(objects: ApiObjects, namespace: str) -> list[Manifest]:
    return objects.list("LeaderWorkerSet", namespace, OWN, api="leaderworkerset.x-k8s.io/v1")


def pods_of(objects: ApiObjects, namespace: str) -> dict[str, Manifest]:
    return {
        each["metadata"]["name"]: each
        for each in objects.list("Pod", namespace, OWN)
        if "deletionTimestamp" not in each["metadata"]
    }


@pytest.mark.timeout(240)
def test_a_model_over_two_nodes_lives_as_a_leader_worker_set(
    own_operator: OperatorProcess,
    objects: ApiObjects,
    kubectl: Kubectl,
    namespace: str,
    service_nodes: ServiceNodes,
    get_service: GetService,
    leader_worker_sets: LeaderWorkerSets,
) -> None:
    scheduling = service_nodes(5, labels=H100, capacity=EIGHT)
    objects.apply(service_of("huge", namespace, LLAMA_405B, scheduling=scheduling))
    missing = wait_for(get_service, "huge", "False", "LeaderWorkerSetMissing")
    assert "install it from https://lws.sigs.k8s.io" in condition(missing, "ModelFits")["message"]
    assert condition(missing, "HardwareMatched")["status"] == "True"

    leader_worker_sets.install()
    served = wait_for(get_service, "huge", "True", "Serving", 60)
    (variant,) = served["status"]["plan"]["variants"]
    assert (variant["tensorParallel"], variant["pipelineParallel"], variant["nodesPerReplica"]) == (8, 2, 2)
    assert (served["status"]["replicas"], served["status"]["readyReplicas"]) == (1, 1)
    engine = engine_of(objects, namespace)
    assert (engine["tensor_parallel_size"], engine["pipeline_parallel_size"], engine["num_nodes"]) == (8, 2, 2)
    (groups,) = groups_of(objects, namespace)
    assert groups["metadata"]["ownerReferences"][0]["name"] == "huge"
    pods = pods_of(objects, namespace)
    assert set(pods) == {"huge-h100-group-0", "huge-h100-group-0-1"}
    assert len({pod["spec"]["nodeName"] for pod in pods.values()}) == 2
    for index, pod in enumerate(pods[name] for name in sorted(pods)):
        (container,) = pod["spec"]["containers"]
        environment = {each["name"]: each.get("value") for each in container["env"]}
        assert environment["LWS_GROUP_SIZE"] == "2"
        assert environment["LWS_WORKER_INDEX"] == str(index)
        assert environment["LWS_LEADER_ADDRESS"] == f"huge-h100-group-0.huge-h100-group.{namespace}"
        assert container["resources"]["limits"] == {"nvidia.com/gpu": "8"}

    def endpoints() -> list[str]:
        found = objects.list("EndpointSlice", namespace, "kubernetes.io/service-name=huge")
        return [end["targetRef"]["name"] for each in found for end in each.get("endpoints") or []]

    assert eventually(endpoints, "the Service has endpoints") == ["huge-h100-group-0"]
    selected = objects.list("Pod", namespace, served["status"]["selector"])
    assert [each["metadata"]["name"] for each in selected] == ["huge-h100-group-0"]

    kubectl("scale", "oisvc/huge", "--replicas=2", f"--namespace={namespace}")
    scaled = wait_for(get_service, "huge", "True", "Serving", 60)
    assert (scaled["status"]["replicas"], scaled["status"]["readyReplicas"]) == (2, 2)
    assert len(pods_of(objects, namespace)) == 4

    # Somebody else's replicas do not stay.
    patch = {"spec": {"replicas": 1, "leaderWorkerTemplate": {"size": 3}}}
    objects.merge("LeaderWorkerSet", groups["metadata"]["name"], patch, namespace)

    def is_reverted() -> bool:
        (found,) = groups_of(objects, namespace)
        return (found["spec"]["replicas"], found["spec"]["leaderWorkerTemplate"]["size"]) == (2, 2)

    eventually(is_reverted, "the foreign edit is reverted")
    wait_for(get_service, "huge", "True", "Serving", 60)

    # An edit rolls group by group, and nothing says Serving before the last one is new.
    objects.merge("InferenceService", "huge", {"spec": {"engine": {"maxNumSeqs": 7}}}, namespace)
    wait_for(get_service, "huge", "True", "Serving", 90)
    hashes = {
        pod["metadata"]["annotations"]["octavo.dev/template-hash"] for pod in pods_of(objects, namespace).values()
    }
    (groups,) = groups_of(objects, namespace)
    leader = groups["spec"]["leaderWorkerTemplate"]["leaderTemplate"]["metadata"]["annotations"]
    assert hashes == {leader["octavo.dev/template-hash"]}

    # What one node holds needs no group: the other kind takes over. (What the set made goes when the garbage collector
    # has learned of the new kind, which takes it half a minute.)
    smaller = {"model": {"geometry": geometry_to_data(LLAMA_70B)}, "scaling": {"replicas": 1}}
    objects.merge("InferenceService", "huge", {"spec": smaller}, namespace)
    wait_for(get_service, "huge", "True", "Serving", 60)
    assert not groups_of(objects, namespace)
    (deployment,) = objects.list("Deployment", namespace, OWN)
    assert deployment["metadata"]["name"] == "huge-h100"

    def has_begun_anew() -> bool:
        # Said at the start, too.
        is_noticed = own_operator.log.read_text().count("no LeaderWorkerSet objects") == 2
        return is_noticed and own_operator.probe("/readyz") == 200

    # Without the CRD all is as it was before; its going ends the watches, which begin anew in a healthy process.
    with own_operator.probed("/healthz") as answers:
        leader_worker_sets.uninstall()
        objects.merge(
            "InferenceService", "huge", {"spec": {"model": {"geometry": geometry_to_data(LLAMA_405B)}}}, namespace
        )
        wait_for(get_service, "huge", "False", "LeaderWorkerSetMissing")
        eventually(has_begun_anew, "the watches begin anew")
    assert answers == {200}
