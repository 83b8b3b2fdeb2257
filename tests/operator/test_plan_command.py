"""`octavo plan` as a user runs it."""

import json

import pytest
import yaml
from click.testing import CliRunner
from octavo_operator.errors import ManifestError, NothingFitsError
from octavo_operator.plan_command import plan
from operator_harness import inference_service
from operator_samples import gh200_node, node_manifest

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
