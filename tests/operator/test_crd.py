"""The CRD is generated, checked in, structural, small, and explains itself."""

from pathlib import Path

import pytest
import yaml
from octavo_operator.api import InferenceService
from octavo_operator.crd import CHART_FILE, CRD_FILE, chart_yaml, crd_yaml, custom_resource_definition

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("file", "text"), [(CRD_FILE, crd_yaml()), (CHART_FILE, chart_yaml())])
def test_the_checked_in_file_is_what_the_generator_writes(file, text):
    assert (ROOT / file).read_text() == text, "run `python -m octavo_operator.crd`"


def fields(schema, path=""):
    yield path, schema
    for name, each in schema.get("properties", {}).items():
        yield from fields(each, f"{path}.{name}")
    for name in ("items", "additionalProperties"):
        if isinstance(schema.get(name), dict):
            yield from fields(schema[name], f"{path}[]")


SCHEMA = custom_resource_definition()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]


def test_every_field_is_described():
    silent = [path for path, each in fields(SCHEMA) if not each.get("description") and "[]" not in path]
    assert silent == ["", ".metadata"] or silent == [".metadata"]


def test_there_are_no_defaults_and_every_list_says_how_it_merges():
    for path, each in fields(SCHEMA):
        assert "default" not in each, path
        if each.get("type") == "array":
            assert "x-kubernetes-list-type" in each or path == ".status.conditions", path


def test_only_pass_through_fields_keep_what_is_unknown():
    open_fields = {path for path, each in fields(SCHEMA) if each.get("x-kubernetes-preserve-unknown-fields")}
    assert open_fields == {
        ".spec.podTemplate", ".spec.podTemplate.metadata", ".spec.podTemplate.spec", ".spec.scheduling.affinity",
    }  # fmt: skip


def test_it_is_far_below_the_size_that_kubectl_apply_can_annotate():
    assert len(crd_yaml()) < 262_144 / 4


EXAMPLES = [file for file in sorted((ROOT / "examples").glob("*.yaml")) if file.name != "nodes.yaml"]


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.name)
def test_examples_are_valid(file):
    for document in yaml.safe_load_all(file.read_text()):
        InferenceService.model_validate(document)


def test_the_shortest_example_has_seven_lines():
    assert len((ROOT / "examples/smollm2.yaml").read_text().splitlines()) == 7
