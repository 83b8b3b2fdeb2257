"""values.yaml, its schema and the README say the same, and a wrong value is refused by name."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

CHART = Path(__file__).parents[2] / "charts/octavo"
SCHEMA = json.loads((CHART / "values.schema.json").read_text())
VALUES = yaml.safe_load((CHART / "values.yaml").read_text())
# Helm puts this one into every chart that another one brings.
HELMS_OWN = {"global"}


def nodes(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, schema
    for name, each in schema.get("properties", {}).items():
        yield from nodes(each, f"{path}.{name}".lstrip("."))


def test_the_schema_knows_exactly_the_values_that_there_are() -> None:
    def compare(values: dict[str, Any], schema: dict[str, Any], path: str) -> None:
        assert set(values) == set(schema["properties"]) - HELMS_OWN, path
        for name, each in values.items():
            if isinstance(each, dict) and "properties" in schema["properties"][name] and name != "resources":
                compare(each, schema["properties"][name], f"{path}.{name}")

    compare(VALUES, SCHEMA, "values")


def test_every_field_of_the_schema_is_described_and_no_object_of_ours_takes_unknown_fields() -> None:
    for path, schema in nodes(SCHEMA):
        assert path == "" or schema.get("description") or path.startswith(("resources.", "extraEnv")), path
        if "properties" in schema:
            assert schema["additionalProperties"] is False, path


WRONG = {
    "a misspelt value": ("replica=3", "replica"),
    "a misspelt part of one": ("image.tags=1", "tags"),
    "text for a number": ("replicas=two", "/replicas"),
    "too many workers": ("workers=65", "/workers"),
    "no level of a log": ("logLevel=loud", "/logLevel"),
    "half a digest": ("image.digest=sha256:abc", "/image/digest"),
    "a tag in the repository's place": ("image.repository=octavo/operator@sha256", "/image/repository"),
    "no namespace's name": ("watchNamespace=Team_A", "/watchNamespace"),
    "an interval without a unit": ("monitoring.interval=30", "/monitoring/interval"),
    "a number for a label": ("podLabels.team=1", "/podLabels/team"),
    "no quantity": ("resources.limits.memory=much", "/resources/limits/memory"),
    "a variable without a name": ("extraEnv[0].value=x", "/extraEnv/0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_value_is_refused_by_name(call_helm: Callable[..., str], case: str) -> None:
    setting, place = WRONG[case]
    with pytest.raises(AssertionError, match="don't meet the specifications") as refused:
        call_helm("template", "octavo", str(CHART), "--kube-version=1.34", f"--set={setting}")
    assert place in str(refused.value)


def leaves(values: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, each in values.items():
        if isinstance(each, dict) and each and name not in ("resources", "labels"):
            yield from leaves(each, f"{path}{name}.")
        else:
            yield f"{path}{name}", each


@pytest.mark.parametrize(("name", "default"), list(leaves(VALUES)))
def test_the_readme_lists_the_value_and_its_default(name: str, default: Any) -> None:
    rows = [line for line in (CHART / "README.md").read_text().splitlines() if line.startswith(f"| `{name}` |")]
    assert len(rows) == 1, f"{name} has {len(rows)} rows"
    shown = rows[0].split("|")[2].strip().strip("`")
    assert yaml.safe_load(shown) == default
