"""An InferenceService's whole life on a real API server, with the operator as a real process."""

import time
from collections.abc import Callable
from typing import Any

import pytest
from api_objects import ApiObjects, eventually
from kubectl import Kubectl, KubectlError
from operator_harness import (
    CHILD_KINDS,
    MODEL,
    OWN,
    GetService,
    Manifest,
    OperatorProcess,
    Recorder,
    ServiceNodes,
    assert_statuses_are_honest,
    condition,
    inference_service,
    kstatus,
    wait_for,
)
from plugin import HollowNodes

GPU_LABELS = {
    "l4": {
        "nvidia.com/gpu.product": "NVIDIA-L4", "nvidia.com/gpu.memory": "23034",
        "nvidia.com/gpu.compute.major": "8", "nvidia.com/gpu.compute.minor": "9",
    },
    "gh200": {
        "nvidia.com/gpu.product": "NVIDIA-GH200-480GB", "nvidia.com/gpu.memory": "97871",
        "nvidia.com/gpu.compute.major": "9", "nvidia.com/gpu.compute.minor": "0",
    },
}  # fmt: skip


def deployments(objects: ApiObjects, namespace: str) -> list[Manifest]:
    return objects.list("Deployment", namespace, OWN)


REFUSED: dict[str, tuple[Manifest, str]] = {
    "scheme": ({"model": {"uri": "gs://bucket/model"}}, "model.uri must be hf://organisation/name"),
    "bucket's name": ({"model": {"uri": "s3://My_Bucket/model"}}, "model.uri must be hf://organisation/name"),
    "no registry": ({"model": {"uri": "oci://org/model:v1"}}, "model.uri must be hf://organisation/name"),
    "relative path": ({"model": {"uri": "models/llama"}}, "model.uri must be hf://organisation/name"),
    "no model": ({"model": {}}, "spec.model.uri: Required value"),
    "revision without a hub": (
        {"model": {"uri": MODEL, "revision": "main"}}, "model.revision belongs to an hf:// address",
    ),
    "hardware that is no name": (
        {"model": {"uri": MODEL}, "hardware": {"types": ["NVIDIA H100"]}}, "spec.hardware.types[0]",
    ),
    "an even share of nothing": (
        {"model": {"uri": MODEL}, "hardware": {"preference": "Even"}}, "are about hardware.types: name the types",
    ),
    "unknown kernels": ({"model": {"uri": MODEL}, "engine": {"kernelVariant": "volta"}}, 'Unsupported value: "volta"'),
    "asked for and excluded": (
        {"model": {"uri": MODEL}, "hardware": {"types": ["cpu"], "exclude": ["cpu"]}}, "must not name the same type",
    ),
    "GPUs that are no product": (
        {"model": {"uri": MODEL}, "hardware": {"gpusPerReplica": 8}, "parallelism": {"tensor": 4, "pipeline": 1}},
        "must be parallelism.tensor times parallelism.pipeline",
    ),
    "GPUs that do not divide": (
        {"model": {"uri": MODEL}, "hardware": {"gpusPerReplica": 6}, "parallelism": {"tensor": 4}},
        "must be parallelism.tensor times parallelism.pipeline",
    ),
    "no GPU": ({"model": {"uri": MODEL}, "hardware": {"gpusPerReplica": 0}}, "greater than or equal to 1"),
    "a CPU that is spread": (
        {"model": {"uri": MODEL}, "hardware": {"types": ["cpu"]}, "parallelism": {"tensor": 2}},
        "an engine on a CPU is not spread",
    ),
    "nobody to let in": (
        {"model": {"uri": MODEL}, "security": {"networkPolicy": {"ingressFrom": []}}}, "should have at least 1 items",
    ),
    "negative replicas": ({"model": {"uri": MODEL}, "scaling": {"replicas": -1}}, "greater than or equal to 0"),
    "unknown dtype": ({"model": {"uri": MODEL}, "engine": {"dtype": "int3"}}, 'Unsupported value: "int3"'),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_an_invalid_spec_with_a_sentence(crd: str, kubectl: Kubectl, namespace: str, case: str) -> None:
    spec, sentence = REFUSED[case]
    manifest = {**inference_service("invalid", namespace), "spec": spec}
    with pytest.raises(KubectlError) as refusal:
        kubectl("apply", "--server-side", "--validate=false", "-f", "-", manifests=[manifest])
    assert sentence in str(refusal.value)


def test_kubectl_points_at_a_typing_error(crd: str, kubectl: Kubectl, namespace: str) -> None:
    with pytest.raises(KubectlError, match=r'unknown field "(spec\.)?engin"'):
        kubectl("apply", "-f", "-", manifests=[inference_service("typo", namespace, engin={})])


@pytest.mark.parametrize(("name", "sentence"), [("a" * 41, "at most 40 characters"), ("1st", "start with a letter")])
def test_refuses_a_name_that_children_cannot_take(
    crd: str, kubectl: Kubectl, namespace: str, name: str, sentence: str
) -> None:
    with pytest.raises(KubectlError) as refusal:
        kubectl("apply", "--server-side", "-f", "-", manifests=[inference_service(name, namespace)])
    assert sentence in str(refusal.value)


def test_kubectl_explain_teaches(crd: str, kubectl: Kubectl) -> None:
    def explained() -> str:
        try:
            return kubectl("explain", "inferenceservice.spec.engine.maxModelLen")
        except KubectlError:
            return ""

    assert "Longest context in tokens" in eventually(explained, "the schema is published")
    undescribed = [
        line
        for line in kubectl("explain", "inferenceservice", "--recursive").splitlines()
        if "<no description>" in line
    ]
    assert not undescribed


def test_whole_life_follows_kstatus(
    operator_process: OperatorProcess,
    objects: ApiObjects,
    kubectl: Kubectl,
    namespace: str,
    service_nodes: ServiceNodes,
    get_service: GetService,
    record: Callable[[str], Recorder],
) -> None:
    scheduling = service_nodes(2)
    recorder = record("life")
    time.sleep(1)

    objects.apply(inference_service("life", namespace, scheduling=scheduling))
    made = wait_for(get_service, "life", "True", "Serving")
    assert made["status"]["url"] == f"http://life.{namespace}.svc:8000"
    assert made["status"]["hardware"] == "cpu x1"
    assert condition(made, "ModelFits")["status"] == "True"
    (first,) = deployments(objects, namespace)

    engine = {"maxNumSeqs": 7}
    objects.apply(inference_service("life", namespace, scheduling=scheduling, engine=engine))
    edited = wait_for(get_service, "life", "True", "Serving")
    (second,) = deployments(objects, namespace)
    assert second["metadata"]["uid"] == first["metadata"]["uid"]
    assert second["status"]["observedGeneration"] > first["status"]["observedGeneration"]
    assert edited["status"]["plan"]["variants"][0]["maxNumSeqs"] == 7
    assert edited["status"]["plan"]["hash"] != made["status"]["plan"]["hash"]
    assert len(objects.list("ReplicaSet", namespace)) == 2

    kubectl("scale", "oisvc/life", "--replicas=3", f"--namespace={namespace}")
    scaled = wait_for(get_service, "life", "True", "Serving")
    assert scaled["status"]["readyReplicas"] == 3

    objects.merge("InferenceService", "life", {"spec": {"suspend": True}}, namespace)
    suspended = wait_for(get_service, "life", "True", "Suspended")
    assert suspended["status"]["readyReplicas"] == 0
    assert condition(suspended, "Available")["status"] == "False"

    objects.merge("InferenceService", "life", {"spec": {"suspend": False}}, namespace)
    wait_for(get_service, "life", "True", "Serving")

    objects.merge("InferenceService", "life", {"spec": {"engine": {"maxModelLen": 2**31 - 1}}}, namespace)
    unfit = wait_for(get_service, "life", "False", "ModelDoesNotFit")
    assert kstatus(unfit) == "Failed"
    objects.merge("InferenceService", "life", {"spec": {"engine": {"maxModelLen": None}}}, namespace)
    wait_for(get_service, "life", "True", "Serving")

    objects.delete("InferenceService", "life", namespace)
    leaves_nothing(objects, namespace)
    states = recorder.stop()
    assert_statuses_are_honest(states)
    seen = [kstatus(state) for state in states]
    compact = [each for index, each in enumerate(seen) if index == 0 or seen[index - 1] != each]
    assert compact[:2] == ["InProgress", "Current"]
    assert "Failed" in compact
    assert compact.count("Current") >= 5


def leaves_nothing(objects: ApiObjects, namespace: str, timeout_s: float = 30.0) -> None:
    """Everything that carries our labels goes, and the Pods and ReplicaSets with it."""

    def rest() -> list[str]:
        return [
            f"{kind} {each['metadata']['name']}"
            for kind in (*CHILD_KINDS, "Pod", "ReplicaSet")
            for each in objects.list(kind, namespace, OWN)
        ]

    eventually(lambda: not rest(), "nothing is left", timeout_s)


@pytest.mark.parametrize("kind", CHILD_KINDS)
def test_a_deleted_child_is_back_within_five_seconds(
    operator_process: OperatorProcess,
    objects: ApiObjects,
    namespace: str,
    service_nodes: ServiceNodes,
    get_service: GetService,
    kind: str,
) -> None:
    objects.apply(inference_service("back", namespace, scheduling=service_nodes()))
    wait_for(get_service, "back", "True")
    (child,) = objects.list(kind, namespace, OWN)
    objects.delete(kind, child["metadata"]["name"], namespace)

    def is_new() -> bool:
        found = objects.list(kind, namespace, OWN)
        return len(found) == 1 and found[0]["metadata"]["uid"] != child["metadata"]["uid"]

    eventually(is_new, f"the {kind} is back", timeout_s=5)
    wait_for(get_service, "back", "True")


FOREIGN_EDITS: dict[str, tuple[str, Manifest, Callable[[Manifest], Any]]] = {
    "replicas": ("Deployment", {"spec": {"replicas": 5}}, lambda found: found["spec"]["replicas"]),
    "image": (
        "Deployment",
        {"spec": {"template": {"spec": {"containers": [{"name": "engine", "image": "evil"}]}}}},
        lambda found: found["spec"]["template"]["spec"]["containers"][0].get("command"),
    ),
    "configuration": ("ConfigMap", {"data": {"engine.yaml": "model: other"}}, lambda found: found["data"]),
    "selector": ("Service", {"spec": {"selector": {"app": "other"}}}, lambda found: found["spec"]["selector"].get(
        "octavo.dev/inference-service")),
    "removed selector": (
        "Service", {"spec": {"selector": {"octavo.dev/inference-service": None}}},
        lambda found: found["spec"]["selector"].get("octavo.dev/inference-service"),
    ),
    "token": ("ServiceAccount", {"automountServiceAccountToken": True},
              lambda found: found["automountServiceAccountToken"]),
}  # fmt: skip


@pytest.mark.parametrize("case", FOREIGN_EDITS)
def test_a_foreign_edit_of_an_owned_field_is_reverted(
    operator_process: OperatorProcess,
    objects: ApiObjects,
    namespace: str,
    service_nodes: ServiceNodes,
    get_service: GetService,
    case: str,
) -> None:
    kind, patch, read = FOREIGN_EDITS[case]
    objects.apply(inference_service("own", namespace, scheduling=service_nodes()))
    wait_for(get_service, "own", "True")
    (before,) = objects.list(kind, namespace, OWN)
    objects.merge(kind, before["metadata"]["name"], patch, namespace)

    def is_reverted() -> bool:
        found = objects.get(kind, before["metadata"]["name"], namespace)
        return found is not None and read(found) == read(before)

    eventually(is_reverted, "the edit is reverted", timeout_s=5)


def test_a_network_policy_comes_and_goes_with_its_field(
    operator_process: OperatorProcess,
    objects: ApiObjects,
    namespace: str,
    service_nodes: ServiceNodes,
    get_service: GetService,
) -> None:
    peer = {"namespaceSelector": {"matchLabels": {"team": "gateway"}}}
    security = {"networkPolicy": {"ingressFrom": [peer]}}
    objects.apply(inference_service("closed", namespace, scheduling=service_nodes(), security=security))
    made = wait_for(get_service, "closed", "True", "Serving")
    (policy,) = objects.list("NetworkPolicy", namespace, OWN)
    assert policy["spec"]["ingress"][0]["from"] == [peer]
    objects.merge("NetworkPolicy", "closed", {"spec": {"ingress": []}}, namespace)

    def is_reverted() -> bool:
        (found,) = objects.list("NetworkPolicy", namespace, OWN)
        return bool(found["spec"].get("ingress"))

    eventually(is_reverted, "the foreign edit is reverted", timeout_s=5)
    wrong = {"networkPolicy": {"ingressFrom": [{"ipBlock": {"cidr": "everywhere"}}]}}
    objects.merge("InferenceService", "closed", {"spec": {"security": wrong}}, namespace)
    refused = wait_for(get_service, "closed", "False", "RejectedByApiServer")
    assert "everywhere" in condition(refused, "Ready")["message"]
    objects.merge("InferenceService", "closed", {"spec": {"security": None}}, namespace)
    assert wait_for(get_service, "closed", "True", "Serving")["status"]["plan"] == made["status"]["plan"]
    assert not objects.list("NetworkPolicy", namespace, OWN)


def test_a_foreign_addition_stays(
    operator_process: OperatorProcess,
    objects: ApiObjects,
    namespace: str,
    service_nodes: ServiceNodes,
    get_service: GetService,
) -> None:
    objects.apply(inference_service("guest", namespace, scheduling=service_nodes()))
    wait_for(get_service, "guest", "True")
    before = operator_process.num_passes()
    objects.merge("Service", "guest", {"metadata": {"annotations": {"example.com/team": "search"}}}, namespace)
    eventually(lambda: operator_process.num_passes() > before, "the edit was looked at")
    found = objects.get("Service", "guest", namespace)
    assert found is not None
    assert found["metadata"]["annotations"]["example.com/team"] == "search"


def test_an_unfit_model_gets_conditions_and_no_pod(
    operator_process: OperatorProcess,
    objects: ApiObjects,
    namespace: str,
    service_nodes: ServiceNodes,
    get_service: GetService,
) -> None:
    scheduling = service_nodes(capacity={"memory": "1Gi", "cpu": "2"})
    objects.apply(inference_service("unfit", namespace, scheduling=scheduling))
    found = wait_for(get_service, "unfit", "False", "ModelDoesNotFit")
    assert condition(found, "Stalled")["status"] == "True"
    assert condition(found, "HardwareMatched")["status"] == "True"
    assert "the smallest GPU that would fit is NVIDIA L4" in condition(found, "ModelFits")["message"]
    assert "cpu" in {each["nodeType"] for each in found["status"]["plan"]["rejected"]}
    assert not objects.list("Pod", namespace)
    assert not objects.list("Deployment", namespace)


def test_missing_hardware_gets_conditions_and_arrives_later(
    operator_process: OperatorProcess,
    objects: ApiObjects,
    namespace: str,
    service_nodes: ServiceNodes,
    get_service: GetService,
) -> None:
    scheduling = service_nodes()
    objects.apply(inference_service("later", namespace, scheduling=scheduling, hardware={"types": ["l4"]}))
    found = wait_for(get_service, "later", "False", "NoFittingHardware")
    assert "hardware.types asks for l4; the cluster has cpu" in condition(found, "HardwareMatched")["message"]
    service_nodes(labels=GPU_LABELS["l4"], capacity={"nvidia.com/gpu": "1"})
    assert wait_for(get_service, "later", "True", "Serving")["status"]["hardware"] == "l4 x1"


def test_spreads_over_named_node_types_and_pins_each(
    operator_process: OperatorProcess,
    objects: ApiObjects,
    namespace: str,
    service_nodes: ServiceNodes,
    get_service: GetService,
) -> None:
    service_nodes(labels=GPU_LABELS["l4"], capacity={"nvidia.com/gpu": "2"})
    taint = {"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}
    scheduling = service_nodes(
        labels=GPU_LABELS["gh200"], capacity={"nvidia.com/gpu": "1"}, architecture="arm64", taints=[taint]
    )
    spec = {"hardware": {"types": ["l4", "gh200-96gb"]}, "scaling": {"replicas": 3}, "scheduling": scheduling}
    objects.apply(inference_service("mixed", namespace, **spec))
    found = wait_for(get_service, "mixed", "True", "Serving")
    assert found["status"]["readyReplicas"] == 3
    variants = {each["nodeType"]: each for each in found["status"]["plan"]["variants"]}
    assert {name: each["replicas"] for name, each in variants.items()} == {"l4": 2, "gh200-96gb": 1}
    assert variants["gh200-96gb"]["arch"] == "arm64"
    for pod in objects.list("Pod", namespace, OWN):
        node = objects.get("Node", pod["spec"]["nodeName"])
        assert node is not None
        wanted = variants[pod["metadata"]["labels"]["octavo.dev/node-type"]]
        assert node["metadata"]["labels"]["nvidia.com/gpu.product"] == wanted["product"]


def test_rolls_without_a_spare_gpu(
    operator_process: OperatorProcess,
    objects: ApiObjects,
    namespace: str,
    service_nodes: ServiceNodes,
    get_service: GetService,
) -> None:
    scheduling = service_nodes(labels=GPU_LABELS["l4"], capacity={"nvidia.com/gpu": "1"})
    objects.apply(inference_service("tight", namespace, scheduling=scheduling))
    wait_for(get_service, "tight", "True", "Serving")
    objects.apply(inference_service("tight", namespace, scheduling=scheduling, engine={"maxNumSeqs": 3}))
    found = wait_for(get_service, "tight", "True", "Serving")
    assert found["status"]["plan"]["variants"][0]["maxNumSeqs"] == 3


def test_plan_only_creates_nothing(
    operator_process: OperatorProcess,
    objects: ApiObjects,
    namespace: str,
    service_nodes: ServiceNodes,
    get_service: GetService,
) -> None:
    objects.apply(inference_service("dry", namespace, scheduling=service_nodes(), planOnly=True))
    found = wait_for(get_service, "dry", "True", "PlanOnly")
    assert found["status"]["plan"]["variants"][0]["memory"]["weights"] > 0
    assert not any(objects.list(kind, namespace, OWN) for kind in CHILD_KINDS)


def test_a_rollout_that_never_gets_ready_stalls_and_the_old_pod_serves_on(
    operator_process: OperatorProcess,
    objects: ApiObjects,
    namespace: str,
    hollow_nodes: HollowNodes,
    get_service: GetService,
) -> None:
    def becomes_ready(pod: Manifest) -> bool:
        return pod["spec"]["containers"][0]["image"] != "broken"

    hollow_nodes(1, labels={"test": namespace}, becomes_ready=becomes_ready)
    common = {"scheduling": {"nodeSelector": {"test": namespace}}, "rollout": {"progressDeadlineSeconds": 10}}
    objects.apply(inference_service("stuck", namespace, **common))
    wait_for(get_service, "stuck", "True", "Serving")
    objects.apply(inference_service("stuck", namespace, **common, engine={"image": "broken"}))
    found = wait_for(get_service, "stuck", "False", "ProgressDeadlineExceeded")
    assert condition(found, "Stalled")["status"] == "True"
    assert condition(found, "Available")["status"] == "True"
    objects.apply(inference_service("stuck", namespace, **common, engine={"image": "mended"}))
    wait_for(get_service, "stuck", "True", "Serving")


def test_a_pod_template_that_the_api_server_refuses_is_explained(
    operator_process: OperatorProcess,
    objects: ApiObjects,
    namespace: str,
    service_nodes: ServiceNodes,
    get_service: GetService,
) -> None:
    template = {"spec": {"restartPolicy": "Sometimes"}}
    objects.apply(inference_service("wrong", namespace, scheduling=service_nodes(), podTemplate=template))
    found = wait_for(get_service, "wrong", "False", "RejectedByApiServer")
    assert "restartPolicy" in condition(found, "Stalled")["message"]


def test_leaves_an_object_of_somebody_else_alone(
    operator_process: OperatorProcess,
    objects: ApiObjects,
    namespace: str,
    service_nodes: ServiceNodes,
    get_service: GetService,
) -> None:
    ports = [{"port": 80, "protocol": "TCP"}]
    own = {
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "taken", "namespace": namespace},
        "spec": {"ports": ports, "selector": {"app": "mine"}},
    }  # fmt: skip
    objects.apply(own)
    objects.apply(inference_service("taken", namespace, scheduling=service_nodes()))
    found = wait_for(get_service, "taken", "False", "NameConflict")
    assert "Service taken exists already" in condition(found, "Ready")["message"]
    service = objects.get("Service", "taken", namespace)
    assert service is not None
    assert service["spec"]["selector"] == {"app": "mine"}
    assert "ownerReferences" not in service["metadata"]
    objects.delete("Service", "taken", namespace)
    wait_for(get_service, "taken", "True", "Serving")


def test_writes_nothing_while_nothing_changes(
    operator_process: OperatorProcess,
    objects: ApiObjects,
    namespace: str,
    service_nodes: ServiceNodes,
    get_service: GetService,
) -> None:
    # Spelled otherwise than the API server keeps it.
    limits = {"memory": "65536Mi", "cpu": "40000m"}
    template = {"spec": {"containers": [{"name": "engine", "resources": {"limits": limits}}]}}
    for name in ("calm", "calm-too"):
        objects.apply(inference_service(name, namespace, scheduling=service_nodes(), podTemplate=template))
    for name in ("calm", "calm-too"):
        wait_for(get_service, name, "True", "Serving")
    time.sleep(1)

    def versions() -> dict[str, str]:
        found = [each for kind in (*CHILD_KINDS, "InferenceService") for each in objects.list(kind, namespace)]
        events = objects.list("Event", namespace)
        found += [each for each in events if each["involvedObject"]["kind"] == "InferenceService"]
        return {each["metadata"]["uid"]: each["metadata"]["resourceVersion"] for each in found}

    before = versions()
    for number in range(2):
        passes = operator_process.num_passes()
        # Something about a node that may bear on a plan, and does not on this one: each resource is looked at.
        for each in objects.list("Node", selector=f"test={namespace}"):
            objects.merge("Node", each["metadata"]["name"], {"metadata": {"labels": {"touched": str(number)}}})
        eventually(lambda passes=passes: operator_process.num_passes() >= passes + 2, "both were looked at")
    time.sleep(0.5)
    assert versions() == before


def test_never_writes_to_spec(
    operator_process: OperatorProcess,
    objects: ApiObjects,
    kubectl: Kubectl,
    namespace: str,
    service_nodes: ServiceNodes,
    get_service: GetService,
) -> None:
    manifest = inference_service("pure", namespace, scheduling=service_nodes())
    objects.apply(manifest)
    found = wait_for(get_service, "pure", "True")
    assert found["spec"] == manifest["spec"]
    assert found["metadata"]["generation"] == 1
    assert "finalizers" not in found["metadata"]
    assert "annotations" not in found["metadata"]
    fields = {each["manager"]: each["fieldsV1"] for each in found["metadata"]["managedFields"]}
    assert set(fields["octavo-operator"]) == {"f:status"}
    table = kubectl("get", "oisvc", "pure", f"--namespace={namespace}")
    assert table.split()[:6] == ["NAME", "READY", "REASON", "HARDWARE", "REPLICAS", "URL"]
    assert f"http://pure.{namespace}.svc:8000" in table


def test_pods_pass_the_restricted_standard(
    operator_process: OperatorProcess,
    objects: ApiObjects,
    namespace: str,
    service_nodes: ServiceNodes,
    get_service: GetService,
) -> None:
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    objects.merge("Namespace", namespace, {"metadata": {"labels": labels}})
    objects.apply(inference_service("strict", namespace, scheduling=service_nodes()))
    wait_for(get_service, "strict", "True", "Serving")


def test_tells_what_it_did_in_events(
    operator_process: OperatorProcess,
    objects: ApiObjects,
    kubectl: Kubectl,
    namespace: str,
    service_nodes: ServiceNodes,
    get_service: GetService,
) -> None:
    objects.apply(inference_service("told", namespace, scheduling=service_nodes()))
    wait_for(get_service, "told", "True", "Serving")

    def described() -> str:
        text = kubectl("describe", "oisvc", "told", f"--namespace={namespace}")
        return text if all(each in text for each in ("PlanChosen", "Created", "Deployment told-cpu", "Serving")) else ""

    eventually(described, "the events are there")
