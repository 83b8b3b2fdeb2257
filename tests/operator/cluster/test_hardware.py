"""Node types of every kind on a real API server: parts of GPUs, claims, profiles, drivers, and clusters that change."""

import json
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from api_objects import ApiObjects, eventually
from kubectl import Kubectl, KubectlError
from operator_harness import (
    CHILD_KINDS,
    OWN,
    GetService,
    Manifest,
    OperatorProcess,
    ServiceNodes,
    condition,
    inference_service,
    wait_for,
)
from operator_samples import gpu_device, hardware_profile, resource_slice


def gpu_labels(product: str, memory_mib: int, compute: str, driver: int = 580) -> dict[str, str]:
    """What GPU feature discovery writes."""
    major, _, minor = compute.partition(".")
    return {
        "nvidia.com/gpu.product": product, "nvidia.com/gpu.memory": str(memory_mib),
        "nvidia.com/gpu.compute.major": major, "nvidia.com/gpu.compute.minor": minor,
        "nvidia.com/cuda.driver.major": str(driver),
    }  # fmt: skip


H100 = gpu_labels("NVIDIA-H100-80GB-HBM3", 81_559, "9.0")
GH200 = gpu_labels("NVIDIA-GH200-480GB", 97_871, "9.0")
B200 = gpu_labels("NVIDIA-B200", 183_359, "10.0")
L4 = gpu_labels("NVIDIA-L4", 23_034, "8.9")
LARGE = {"cpu": "64", "memory": "512Gi"}


def variants_of(found: Manifest) -> dict[str, Manifest]:
    return {each["nodeType"]: each for each in found["status"]["plan"]["variants"]}


def rejected_of(found: Manifest) -> dict[str, str]:
    return {each["nodeType"]: each["why"] for each in found["status"]["plan"].get("rejected", [])}


def deployments_of(objects: ApiObjects, namespace: str) -> dict[str, Manifest]:
    found = objects.list("Deployment", namespace, OWN)
    return {each["metadata"]["labels"]["octavo.dev/node-type"]: each for each in found}


@pytest.fixture
def profile(crd: str, objects: ApiObjects) -> Iterator[Callable[..., Manifest]]:
    """Applies a HardwareProfile, which belongs to the whole cluster and goes with the test."""
    names: list[str] = []

    def apply(name: str, **fields: Any) -> Manifest:
        names.append(name)
        return objects.apply(hardware_profile(name, **fields))

    yield apply
    for name in names:
        objects.delete("HardwareProfile", name)


def profile_condition(objects: ApiObjects, name: str, reason: str) -> Manifest:
    def found() -> Manifest | None:
        ready = condition(objects.get("HardwareProfile", name), "Ready")
        return ready if ready.get("reason") == reason else None

    return eventually(found, f"HardwareProfile {name}: {reason}")


def test_gh200_and_b200_run_side_by_side_each_in_its_own_way(
    operator_process: OperatorProcess,
    objects: ApiObjects,
    namespace: str,
    service_nodes: ServiceNodes,
    get_service: GetService,
) -> None:
    service_nodes(labels=GH200, capacity={"nvidia.com/gpu": "1", **LARGE}, architecture="arm64")
    scheduling = service_nodes(labels=B200, capacity={"nvidia.com/gpu": "8", **LARGE})
    spec = {"hardware": {"types": ["gh200-96gb", "b200"]}, "scaling": {"replicas": 2}, "scheduling": scheduling}
    objects.apply(inference_service("pair", namespace, **spec))
    variants = variants_of(wait_for(get_service, "pair", "True", "Serving"))
    gh200, b200 = variants["gh200-96gb"], variants["b200"]
    assert (gh200["arch"], gh200["kernelVariant"], gh200["tensorParallel"]) == ("arm64", "grace-hopper", 1)
    assert (b200["arch"], b200["kernelVariant"], b200["tensorParallel"]) == ("amd64", "blackwell", 1)
    assert gh200["predicted"]["decodeMs"] > b200["predicted"]["decodeMs"]
    placed = {
        pod["metadata"]["labels"]["octavo.dev/node-type"]: objects.get("Node", pod["spec"]["nodeName"])
        for pod in objects.list("Pod", namespace, OWN)
    }
    architectures = {name: node["metadata"]["labels"]["kubernetes.io/arch"] for name, node in placed.items() if node}
    assert architectures == {"gh200-96gb": "arm64", "b200": "amd64"}
    assert len(objects.list("Service", namespace, OWN)) == 1


def test_a_mig_slice_is_scheduled_by_its_own_resource(
    operator_process: OperatorProcess,
    objects: ApiObjects,
    namespace: str,
    service_nodes: ServiceNodes,
    get_service: GetService,
) -> None:
    labels = {**H100, "nvidia.com/mig-1g.10gb.memory": "9984", "nvidia.com/mig-1g.10gb.count": "7"}
    scheduling = service_nodes(labels=labels, capacity={"nvidia.com/gpu": "0", "nvidia.com/mig-1g.10gb": "7", **LARGE})
    objects.apply(inference_service("slice", namespace, scheduling=scheduling))
    found = wait_for(get_service, "slice", "True", "Serving")
    assert found["status"]["hardware"] == "h100-mig-1g-10gb x1"
    (pod,) = objects.list("Pod", namespace, OWN)
    assert pod["spec"]["containers"][0]["resources"]["limits"] == {"nvidia.com/mig-1g.10gb": "1"}
    memory = found["status"]["plan"]["variants"][0]["memory"]
    assert sum(memory.values()) == pytest.approx(9_984 << 20, rel=0.01)


def test_a_driver_that_is_too_old_is_refused_before_scheduling_and_its_update_is_noticed(
    operator_process: OperatorProcess,
    objects: ApiObjects,
    namespace: str,
    service_nodes: ServiceNodes,
    get_service: GetService,
) -> None:
    labels = {**L4, "nvidia.com/cuda.driver.major": "550"}
    scheduling = service_nodes(labels=labels, capacity={"nvidia.com/gpu": "1", **LARGE})
    objects.apply(inference_service("old", namespace, scheduling=scheduling))
    found = wait_for(get_service, "old", "False", "NoFittingHardware")
    assert "its NVIDIA driver 550 is too old: the engine's image brings CUDA 13" in condition(found, "Ready")["message"]
    assert not objects.list("Deployment", namespace)
    (node,) = objects.list("Node", selector=f"test={namespace}")
    patch = {"metadata": {"labels": {"nvidia.com/cuda.driver.major": "580"}}}
    objects.merge("Node", node["metadata"]["name"], patch)
    assert wait_for(get_service, "old", "True", "Serving")["status"]["hardware"] == "l4 x1"


def allocated(objects: ApiObjects, namespace: str) -> list[set[str]]:
    """The devices of each claim that has some."""
    found = [each.get("status", {}).get("allocation") for each in objects.list("ResourceClaim", namespace)]
    return [{result["device"] for result in each["devices"]["results"]} for each in found if each]


def test_devices_that_only_dra_offers_are_claimed(
    operator_process: OperatorProcess,
    objects: ApiObjects,
    namespace: str,
    service_nodes: ServiceNodes,
    get_service: GetService,
) -> None:
    objects.apply(
        {
            "apiVersion": "resource.k8s.io/v1", "kind": "DeviceClass", "metadata": {"name": "gpu.nvidia.com"},
            "spec": {"selectors": [{"cel": {"expression": "device.driver == 'gpu.nvidia.com'"}}]},
        }
    )  # fmt: skip
    scheduling = service_nodes(capacity=LARGE)
    (node,) = objects.list("Node", selector=f"test={namespace}")
    devices = [gpu_device(f"gpu-{index}", "NVIDIA H100 80GB HBM3", "9.0", 81_559) for index in range(3)]
    manifest = resource_slice(node["metadata"]["name"], *devices)
    objects.apply(manifest)
    try:
        spec = {"scheduling": scheduling, "scaling": {"replicas": 2}, "hardware": {"types": ["h100"]}}
        objects.apply(inference_service("claim", namespace, **spec))
        found = wait_for(get_service, "claim", "True", "Serving")
        assert found["status"]["hardware"] == "h100 x2"
        assert [len(each) for each in allocated(objects, namespace)] == [1, 1]
        objects.merge("InferenceService", "claim", {"spec": {"scaling": {"replicas": 0}}}, namespace)
        wait_for(get_service, "claim", "True", "ScaledToZero")
        spread = {"scaling": {"replicas": 1}, "parallelism": {"tensor": 3}}
        objects.merge("InferenceService", "claim", {"spec": spread}, namespace)
        wait_for(get_service, "claim", "True", "Serving")
        assert [each for each in allocated(objects, namespace) if len(each) > 1] == [{"gpu-0", "gpu-1", "gpu-2"}]
        objects.delete("InferenceService", "claim", namespace)
        eventually(lambda: not objects.list("ResourceClaimTemplate", namespace), "the template goes with the resource")
    finally:
        objects.delete("ResourceSlice", manifest["metadata"]["name"])


def test_a_profile_makes_an_unknown_device_known(
    operator_process: OperatorProcess,
    objects: ApiObjects,
    namespace: str,
    service_nodes: ServiceNodes,
    get_service: GetService,
    profile: Callable[..., Manifest],
) -> None:
    suffix = uuid.uuid4().hex[:6]
    product, name = f"NVIDIA-X{suffix}", f"x{suffix}"
    scheduling = service_nodes(labels=gpu_labels(product, 60_000, "9.0"), capacity={"nvidia.com/gpu": "4", **LARGE})
    spec = {"scheduling": scheduling, "hardware": {"types": [name]}, "planOnly": True}
    objects.apply(inference_service("made", namespace, **spec))
    before = wait_for(get_service, "made", "True", "PlanOnly")
    assert "is not in the hardware table" in before["status"]["plan"]["variants"][0]["why"]

    profile(name, products=[product], basedOn="h100", memoryMib=60_000, memoryBandwidthGbps=1_000, title="Test device")
    assert profile_condition(objects, name, "InUse")["message"] == "1 nodes are recognised by it"

    def is_known() -> Manifest | None:
        found = get_service("made")
        return (
            found if found and found["status"]["plan"]["variants"][0]["why"] == "the only node type that fits" else None
        )

    after = eventually(is_known, "the plan uses the profile")
    was, now = (each["status"]["plan"]["variants"][0]["predicted"]["decodeMs"] for each in (before, after))
    assert now > 2 * was


REFUSED_PROFILES: dict[str, tuple[str, Manifest, str]] = {
    "neither base nor numbers": ("x1", {"products": ["X"]}, "needs computeCapability, memoryMib"),
    "recognised by nothing": ("x2", {"basedOn": "h100", "memoryMib": 5}, "needs products or computeCapability"),
    "unknown base": ("x3", {"products": ["X"], "basedOn": "h300"}, 'Unsupported value: "h300"'),
    "generic": ("generic", {"memoryMib": 5}, "generic is the row of devices that nothing describes"),
    "memory of a CPU": ("cpu", {"memoryMib": 5}, "its memory is the node's"),
    "name of a file": (
        "x.y",
        {"products": ["X"], "basedOn": "h100"},
        "lower-case letters, digits and dashes",
    ),
    "negative": ("x4", {"products": ["X"], "basedOn": "h100", "memoryMib": -1}, "greater than or equal to 1"),
    "price": ("x5", {"products": ["X"], "basedOn": "h100", "pricePerHour": "much"}, "pricePerHour"),
}


@pytest.mark.parametrize("case", REFUSED_PROFILES)
def test_refuses_an_invalid_profile_with_a_sentence(crd: str, kubectl: Kubectl, case: str) -> None:
    name, fields, sentence = REFUSED_PROFILES[case]
    manifest = hardware_profile(name, **fields)
    with pytest.raises(KubectlError) as refusal:
        kubectl("apply", "--server-side", "--dry-run=server", "--validate=false", "-f", "-", manifests=[manifest])
    assert sentence in str(refusal.value)


def test_a_profile_that_contradicts_itself_or_an_older_one_says_so(
    operator_process: OperatorProcess, objects: ApiObjects, profile: Callable[..., Manifest]
) -> None:
    suffix = uuid.uuid4().hex[:6]
    profile(f"float8-{suffix}", products=[f"A{suffix}"], basedOn="a100-80gb", fp8Tflops=600)
    message = profile_condition(objects, f"float8-{suffix}", "Contradiction")["message"]
    assert message == "compute capability 8.0 computes no float8, but fp8Tflops is set"
    assert condition(objects.get("HardwareProfile", f"float8-{suffix}"), "Stalled")["status"] == "True"
    profile(f"older-{suffix}", products=[f"B{suffix}"], basedOn="h100")
    profile_condition(objects, f"older-{suffix}", "InUse")
    time.sleep(1.1)
    profile(f"a-newer-{suffix}", products=[f"B{suffix}"], basedOn="h200")
    assert (
        f"belongs to HardwareProfile older-{suffix}"
        in profile_condition(objects, f"a-newer-{suffix}", "ProductTaken")["message"]
    )
    objects.delete("HardwareProfile", f"older-{suffix}")
    profile_condition(objects, f"a-newer-{suffix}", "InUse")


def test_new_hardware_is_told_and_taken_up_when_asked(
    operator_process: OperatorProcess,
    objects: ApiObjects,
    namespace: str,
    service_nodes: ServiceNodes,
    get_service: GetService,
) -> None:
    scheduling = service_nodes(labels=L4, capacity={"nvidia.com/gpu": "1", **LARGE})
    objects.apply(inference_service("calm", namespace, scheduling=scheduling))
    found = wait_for(get_service, "calm", "True", "Serving")
    assert condition(found, "PlanOutdated")["status"] == "False"
    (pod,) = objects.list("Pod", namespace, OWN)
    generation = deployments_of(objects, namespace)["l4"]["metadata"]["generation"]

    service_nodes(labels=H100, capacity={"nvidia.com/gpu": "8", **LARGE})

    def outdated() -> Manifest | None:
        found = condition(get_service("calm"), "PlanOutdated")
        return found if found.get("status") == "True" else None

    message = eventually(outdated, "PlanOutdated")["message"]
    assert message.startswith("a plan made now would run on h100 x1 instead of l4 x1; what serves is kept as it is")
    # Its own status is what the next pass is about.
    time.sleep(1)
    assert [each["metadata"]["uid"] for each in objects.list("Pod", namespace, OWN)] == [pod["metadata"]["uid"]]
    assert deployments_of(objects, namespace)["l4"]["metadata"]["generation"] == generation
    assert condition(get_service("calm"), "Ready")["status"] == "True"

    objects.merge("InferenceService", "calm", {"metadata": {"annotations": {"octavo.dev/replan": "1"}}}, namespace)
    eventually(lambda: set(deployments_of(objects, namespace)) == {"h100"}, "the H100 has taken over", timeout_s=40)
    found = wait_for(get_service, "calm", "True", "Serving")
    assert found["status"]["hardware"] == "h100 x1"
    assert condition(found, "PlanOutdated")["status"] == "False"


def test_changed_labels_restart_nothing_until_the_policy_says_so(
    operator_process: OperatorProcess,
    objects: ApiObjects,
    namespace: str,
    service_nodes: ServiceNodes,
    get_service: GetService,
) -> None:
    scheduling = service_nodes(labels=L4, capacity={"nvidia.com/gpu": "2", **LARGE})
    objects.apply(inference_service("label", namespace, scheduling=scheduling))
    wait_for(get_service, "label", "True", "Serving")
    (pod,) = objects.list("Pod", namespace, OWN)
    (node,) = objects.list("Node", selector=f"test={namespace}")
    patch = {"metadata": {"labels": {"nvidia.com/gpu.product": "NVIDIA-L4-SHARED", "nvidia.com/gpu.replicas": "2"}}}
    objects.merge("Node", node["metadata"]["name"], patch)

    def outdated() -> Manifest | None:
        found = condition(get_service("label"), "PlanOutdated")
        return found if found.get("status") == "True" else None

    assert "would run on l4-shared x1 instead of l4 x1" in eventually(outdated, "PlanOutdated")["message"]
    # Its own status is what the next pass is about.
    time.sleep(1)
    assert [each["metadata"]["uid"] for each in objects.list("Pod", namespace, OWN)] == [pod["metadata"]["uid"]]
    objects.merge("InferenceService", "label", {"spec": {"rollout": {"replan": "Automatic"}}}, namespace)
    eventually(lambda: set(deployments_of(objects, namespace)) == {"l4-shared"}, "the shares are used", timeout_s=40)
    assert wait_for(get_service, "label", "True", "Serving")["status"]["hardware"] == "l4-shared x1"


def test_fills_the_preferred_type_before_the_next(
    operator_process: OperatorProcess,
    objects: ApiObjects,
    namespace: str,
    service_nodes: ServiceNodes,
    get_service: GetService,
) -> None:
    service_nodes(labels=H100, capacity={"nvidia.com/gpu": "1", **LARGE})
    scheduling = service_nodes(labels=L4, capacity={"nvidia.com/gpu": "4", **LARGE})
    hardware = {"types": ["l4", "h100"], "preference": "Listed"}
    spec = {"scheduling": scheduling, "hardware": hardware, "scaling": {"replicas": 5}}
    objects.apply(inference_service("fill", namespace, **spec))
    found = wait_for(get_service, "fill", "True", "Serving")
    assert {name: each["replicas"] for name, each in variants_of(found).items()} == {"l4": 4, "h100": 1}
    assert variants_of(found)["l4"]["why"] == "number 1 in hardware.types"


def test_a_plan_of_parts_is_shown_without_being_made(
    operator_process: OperatorProcess,
    objects: ApiObjects,
    namespace: str,
    service_nodes: ServiceNodes,
    get_service: GetService,
) -> None:
    scheduling = service_nodes(
        labels={**L4, "nvidia.com/gpu.product": "NVIDIA-L4-SHARED", "nvidia.com/gpu.replicas": "4"},
        capacity={"nvidia.com/gpu": "4", **LARGE},
    )
    spec = {"scheduling": scheduling, "planOnly": True, "hardware": {"types": ["l4-shared", "h300"]}}
    objects.apply(inference_service("dry", namespace, **spec))
    found = wait_for(get_service, "dry", "True", "PlanOnly")
    variant = variants_of(found)["l4-shared"]
    assert sum(variant["memory"].values()) == pytest.approx((23_034 // 4) << 20, rel=0.01)
    assert "it is no node type here, no HardwareProfile" in rejected_of(found)["h300"]
    assert not any(objects.list(kind, namespace, OWN) for kind in CHILD_KINDS)


def plan_on_cluster(kubeconfig: Path, file: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """`octavo plan` as a user runs it beside a cluster."""
    octavo = str(Path(sys.executable).with_name("octavo"))
    command = [octavo, "plan", "-f", str(file), "--kubeconfig", str(kubeconfig), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_octavo_plan_shows_the_difference_to_what_the_cluster_has(
    operator_process: OperatorProcess,
    objects: ApiObjects,
    namespace: str,
    service_nodes: ServiceNodes,
    get_service: GetService,
    kubeconfig: Path,
    tmp_path: Path,
) -> None:
    scheduling = service_nodes(labels=L4, capacity={"nvidia.com/gpu": "2", **LARGE})
    manifest = inference_service("shown", namespace, scheduling=scheduling)
    file = tmp_path / "model.yaml"
    file.write_text(yaml.safe_dump(manifest))

    before = plan_on_cluster(kubeconfig, file, "--diff")
    assert before.returncode == 1, before.stderr
    assert "+++ plan/Deployment/shown-l4" in before.stdout

    objects.apply(manifest)
    found = wait_for(get_service, "shown", "True", "Serving")
    same = plan_on_cluster(kubeconfig, file, "--diff")
    assert (same.returncode, same.stdout) == (0, ""), same.stdout + same.stderr
    printed = json.loads(plan_on_cluster(kubeconfig, file, "-o", "json").stdout)
    assert printed == found["status"]["plan"]

    manifest["spec"]["engine"] = {"maxNumSeqs": 7}
    file.write_text(yaml.safe_dump(manifest))
    other = plan_on_cluster(kubeconfig, file, "--diff")
    assert other.returncode == 1
    assert "+    max_num_seqs: 7" in other.stdout
    assert "live/Service/shown" not in other.stdout

    manifest["spec"]["hardware"] = {"types": ["b300"]}
    file.write_text(yaml.safe_dump(manifest))
    nothing = plan_on_cluster(kubeconfig, file, "--diff")
    assert nothing.returncode == 2
    assert "hardware.types asks for b300" in nothing.stderr
