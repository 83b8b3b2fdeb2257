"""`octavo plan` as a user runs it."""

import json
from copy import deepcopy

import pytest
import yaml
from click.testing import CliRunner
from octavo_operator.children import Owner
from octavo_operator.errors import ConnectionSettingsError, ManifestError, NothingFitsError
from octavo_operator.observe import Key
from octavo_operator.plan import make_plan
from octavo_operator.plan_cluster import differences
from octavo_operator.plan_command import plan
from octavo_operator.render import render
from operator_harness import inference_service
from operator_samples import (
    DEFAULTS,
    LLAMA_8B,
    gh200_node,
    gpu_device,
    h100_node,
    hardware_profile,
    node_manifest,
    resource_slice,
    spec,
)

NODES = [
    node_manifest("cpu-0"),
    node_manifest("gh200-0", product="NVIDIA-GH200-480GB", memory_mib=97_871, compute="9.0", gpus=1, arch="arm64"),
]


@pytest.fixture
def run(tmp_path):
    def call(*arguments, service=None, nodes=None):
        (tmp_path / "model.yaml").write_text(yaml.safe_dump(service or inference_service("tiny", "default")))
        text = yaml.safe_dump({"apiVersion": "v1", "kind": "List", "items": NODES}) if nodes is None else nodes
        (tmp_path / "nodes.yaml").write_text(text)
        files = ["-f", str(tmp_path / "model.yaml"), "--nodes", str(tmp_path / "nodes.yaml")]
        return CliRunner().invoke(plan, [*files, *arguments], terminal_width=200, env={"COLUMNS": "200"})

    return call


def test_prints_variants_memory_and_rejections_for_people(run):
    result = run()
    assert result.exit_code == 0, result.output
    for text in ("gh200-96gb x1", "memory: KV cache", "grace-hopper", "hardware.types: [cpu] would choose it"):
        assert text in result.output


@pytest.mark.parametrize(("output", "load"), [("json", json.loads), ("yaml", yaml.safe_load)])
def test_prints_the_status_for_programs(run, output, load):
    (variant,) = load(run("-o", output).output)["variants"]
    assert (variant["nodeType"], variant["arch"], variant["product"]) == ("gh200-96gb", "arm64", "NVIDIA-GH200-480GB")
    assert variant["memory"]["weights"] > 0


def test_prints_manifests_that_kubectl_takes(run):
    documents = list(yaml.safe_load_all(run("--manifests").output))
    assert [each["kind"] for each in documents] == ["ServiceAccount", "ConfigMap", "Service", "Deployment"]


def test_takes_nodes_as_several_documents(run):
    result = run("-o", "json", nodes=yaml.safe_dump_all(NODES))
    assert json.loads(result.output)["variants"][0]["nodeType"] == gh200_node().name.replace("-0", "-96gb")


def test_says_why_nothing_fits_in_one_sentence(run):
    service = inference_service("tiny", "default", hardware={"types": ["b200"]})
    result = run(service=service)
    assert isinstance(result.exception, NothingFitsError)
    assert str(result.exception) == "hardware.types asks for b200; the cluster has cpu, gh200-96gb"


WRONG = {
    "typo": (
        {"service": inference_service("x", "default", engin={})}, "spec.engin: octavo.dev/v1alpha1 has no such field",
    ),
    "other kind": ({"service": {"kind": "Pod"}}, "the file holds 0 objects of kind InferenceService"),
    "no nodes": ({"nodes": "kind: Pod"}, "a Pod is no Node"),
    "not yaml": ({"nodes": "a: ["}, "is not YAML"),
    "bad quantity": (
        {"nodes": yaml.safe_dump(node_manifest("x", memory="much"))}, "'much' is not a quantity such as 500m or 16Gi",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_explains_what_is_wrong_with_a_file(run, case):
    settings, sentence = WRONG[case]
    result = run(**settings)
    assert isinstance(result.exception, ManifestError)
    assert sentence in str(result.exception)


def test_shows_each_gpus_memory_to_scale(run):
    (bar,) = [line for line in run().output.splitlines() if "▓" in line and "│" in line]
    parts = bar.split("│")[2].split()[0]
    assert len(parts) == 40
    data = json.loads(run("-o", "json").output)["variants"][0]["memory"]
    total = sum(data.values())
    assert parts.count("▓") == pytest.approx(40 * data["kv"] / total, abs=1.01)
    assert parts.count("·") == pytest.approx(40 * data["reserve"] / total, abs=1.01)
    assert "█ weights, ▓ KV cache, ▒ activations and runtime, · reserve" in run().output


def test_prints_the_problem_as_the_operator_writes_it(run):
    result = run("-o", "json", service=inference_service("tiny", "default", hardware={"types": ["b200"]}))
    data = json.loads(result.stdout)
    assert data["problem"]["reason"] == "NoFittingHardware"
    assert {each["nodeType"] for each in data["rejected"]} == {"cpu", "gh200-96gb"}
    assert "variants" not in data


def test_every_field_of_the_designed_status_is_there(run):
    (variant,) = json.loads(run("-o", "json").output)["variants"]
    assert {
        "nodeType", "product", "arch", "image", "kernelVariant", "tensorParallel", "maxNumSeqs", "maxNumBatchedTokens",
        "kvBlocks", "memory", "predicted", "why", "resource",
    } <= set(variant)  # fmt: skip
    assert {"weights", "kv", "activations", "reserve"} <= set(variant["memory"])
    assert variant["predicted"]["decodeMs"] > 0


X_NODE = node_manifest("x-0", product="NVIDIA-X1", memory_mib=60_000, compute="9.0", gpus=4)


def test_takes_hardware_profiles_of_a_file(run, tmp_path):
    file = tmp_path / "profiles.yaml"
    profile = hardware_profile("x1", products=["NVIDIA-X1"], basedOn="h100", memoryBandwidthGbps=1_000)
    file.write_text(yaml.safe_dump(profile))
    nodes = yaml.safe_dump(X_NODE)
    before = json.loads(run("-o", "json", nodes=nodes).output)["variants"][0]
    after = json.loads(run("-o", "json", "--hardware-profiles", str(file), nodes=nodes).output)["variants"][0]
    assert "is not in the hardware table" in before["why"]
    assert after["why"] == "the only node type that fits"
    assert after["predicted"]["decodeMs"] > 2 * before["predicted"]["decodeMs"]


WRONG_PROFILES = {
    "contradiction": (
        hardware_profile("x1", products=["X"], basedOn="a100-80gb", fp8Tflops=1),
        "HardwareProfile x1: compute capability 8.0",
    ),
    "other kind": ({"kind": "Pod", "metadata": {"name": "x"}}, "a Pod"),
    "typing error": (hardware_profile("x1", products=["X"], based="h100"), "HardwareProfile x1: spec.based"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_PROFILES)
def test_explains_what_is_wrong_with_a_profile(run, tmp_path, case):
    manifest, sentence = WRONG_PROFILES[case]
    file = tmp_path / "profiles.yaml"
    file.write_text(yaml.safe_dump(manifest))
    result = run("--hardware-profiles", str(file))
    assert isinstance(result.exception, ManifestError)
    assert sentence in str(result.exception)


def test_takes_resource_slices_beside_the_nodes(run):
    devices = [gpu_device("gpu-0", "NVIDIA GH200 480GB", "9.0", 97_871)]
    nodes = [node_manifest("dra-0", arch="arm64"), resource_slice("dra-0", *devices)]
    result = run("-o", "json", nodes=yaml.safe_dump_all(nodes))
    (variant,) = json.loads(result.output)["variants"]
    assert (variant["nodeType"], variant["resource"], variant["product"]) == (
        "gh200-96gb", "gpu.nvidia.com", "NVIDIA GH200 480GB",
    )  # fmt: skip


def test_the_difference_is_of_the_fields_that_the_plan_sets():
    asked = spec()
    made = make_plan(asked, [h100_node()], LLAMA_8B, DEFAULTS)
    desired = render(Owner(Key("default", "llama")), asked, made)
    live = [dict(deepcopy(each), status={"x": 1}) for each in desired]
    live[-1]["spec"]["template"]["spec"]["containers"][0]["imagePullPolicy"] = "Always"
    assert differences(desired, live) == ""
    live[-1]["spec"]["replicas"] = 3
    text = differences(desired, live)
    assert "--- live/Deployment/llama-h100" in text
    assert "-  replicas: 3\n" in text
    assert "+  replicas: 1\n" in text
    gone = differences(desired[:-1], desired)
    assert "--- live/Deployment/llama-h100\n+++ /dev/null" in gone
    new = differences(desired, desired[1:])
    assert "--- /dev/null\n+++ plan/ServiceAccount/llama" in new


def test_without_nodes_and_without_a_cluster_it_says_what_is_missing(tmp_path):
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(inference_service("tiny", "default")))
    arguments = ["-f", str(tmp_path / "model.yaml"), "--kubeconfig", str(tmp_path / "none")]
    result = CliRunner().invoke(plan, arguments)
    assert isinstance(result.exception, ConnectionSettingsError)
