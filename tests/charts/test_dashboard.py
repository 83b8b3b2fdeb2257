"""The Grafana dashboard asks only for metrics and labels that the programs export."""

import inspect
import json
import re
from pathlib import Path

import pytest
from octavo_engine.server import metrics as engine_metrics
from octavo_engine.server.metrics import COUNTERS, GAUGES
from octavo_engine.server.metrics import Metrics as EngineMetrics
from octavo_operator.metrics import Metrics as OperatorMetrics
from prometheus_client.parser import text_string_to_metric_families

DASHBOARD = json.loads((Path(__file__).parents[2] / "charts/octavo/files/dashboard.json").read_text())
PANELS = [each for each in DASHBOARD["panels"] if each["type"] != "row"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]
VARIABLES = {each["name"]: each for each in DASHBOARD["templating"]["list"]}
METRIC = re.compile(r"\b(?:octavo|vllm)[_:][a-z0-9_]+")


@pytest.fixture(scope="module")
def exported() -> set[str]:
    """Names as Prometheus stores them, suffixes included."""
    engine = EngineMetrics("model")
    names = {each.name for each in GAUGES} | {f"{each.name}_total" for each in COUNTERS}
    # A counter with labels shows nothing before its first count, and some gauges nothing before an engine is ready.
    names.add("octavo_request_success_total")
    names |= set(re.findall(r'_gauge\(\s*"(octavo_\w+)"', inspect.getsource(engine_metrics)))
    for text in (engine.render().decode(), _text_of(OperatorMetrics())):
        families = list(text_string_to_metric_families(text))
        names |= {sample.name for family in families for sample in family.samples}
        names |= {f"{family.name}_total" for family in families if family.type == "counter"}
    return names


def _text_of(metrics: OperatorMetrics) -> str:
    from prometheus_client import generate_latest

    return generate_latest(metrics.registry).decode()


def test_every_metric_is_exported(exported: set[str]) -> None:
    queries = [*EXPRESSIONS, *(each.get("definition", "") for each in VARIABLES.values())]
    asked = {name for each in queries for name in METRIC.findall(each)}
    assert len(asked) > 15
    assert asked <= exported, asked - exported


def test_every_variable_is_defined() -> None:
    own = {"__rate_interval"}
    used = {name for each in EXPRESSIONS for name in re.findall(r"\$\{?(\w+)", each)}
    assert used - own <= set(VARIABLES)
    assert {"namespace", "model", "operator_namespace"} <= used


def test_panels_are_named_explained_and_do_not_overlap() -> None:
    titles = [each["title"] for each in DASHBOARD["panels"]]
    assert len(titles) == len(set(titles))
    assert all(each["description"] for each in PANELS)
    taken: set[tuple[int, int]] = set()
    for each in DASHBOARD["panels"]:
        place = each["gridPos"]
        cells = {
            (place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])
        }  # fmt: skip
        assert not cells & taken, each["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
