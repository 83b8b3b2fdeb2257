"""The CRDs are generated, checked in, structural, small, and explain themselves."""

from pathlib import Path

import pytest
import yaml
from octavo_operator.crd import (
    HARDWARE_PROFILE,
    INFERENCE_SERVICE,
    RESOURCES,
    crd_yaml,
    custom_resource_definition,
    files,
)

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("file", files(), ids=str)
def test_the_checked_in_file_is_what_the_generator_writes(file):
    assert (ROOT / file).read_text() == files()[file], "run `python -m octavo_operator.crd`"


def fields(schema, path=""):
    yield path, schema
    for name, each in schema.get("properties", {}).items():
        yield from fields(each, f"{path}.{name}")
    for name in ("items", "additionalProperties"):
        if isinstance(schema.get(name), dict):
            yield from fields(schema[name], f"{path}[]")


def schema_of(resource):
    return custom_resource_definition(resource)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]


every_resource = pytest.mark.parametrize("resource", RESOURCES, ids=lambda each: each.kind)


@every_resource
def test_every_field_is_described(resource):
    silent = [path for path, each in fields(schema_of(resource)) if not each.get("description") and "[]" not in path]
    assert silent == ["", ".metadata"] or silent == [".metadata"]


@every_resource
def test_there_are_no_defaults_and_every_list_says_how_it_merges(resource):
    for path, each in fields(schema_of(resource)):
        assert "default" not in each, path
        if each.get("type") == "array":
            assert "x-kubernetes-list-type" in each or path == ".status.conditions", path


def test_only_pass_through_fields_keep_what_is_unknown():
    open_fields = {
        path for path, each in fields(schema_of(INFERENCE_SERVICE)) if each.get("x-kubernetes-preserve-unknown-fields")
    }
    assert open_fields == {
        ".spec.model.geometry",
        ".spec.podTemplate", ".spec.podTemplate.metadata", ".spec.podTemplate.spec", ".spec.scheduling.affinity",
        ".spec.security.networkPolicy.ingressFrom[]", ".spec.security.networkPolicy.egress[]",
    }  # fmt: skip


def test_a_hardware_profile_keeps_nothing_unknown():
    assert not any(each.get("x-kubernetes-preserve-unknown-fields") for _, each in fields(schema_of(HARDWARE_PROFILE)))


@every_resource
def test_it_is_far_below_the_size_that_kubectl_apply_can_annotate(resource):
    assert len(crd_yaml(resource)) < 262_144 / 4


EXAMPLES = [file for file in sorted((ROOT / "examples").glob("*.yaml")) if file.name != "nodes.yaml"]


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.name)
def test_examples_are_valid(file):
    for document in yaml.safe_load_all(file.read_text()):
        next(each.model for each in RESOURCES if each.kind == document["kind"]).model_validate(document)


def test_the_shortest_example_has_seven_lines():
    assert len((ROOT / "examples/smollm2.yaml").read_text().splitlines()) == 7
