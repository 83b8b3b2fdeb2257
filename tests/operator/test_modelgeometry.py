"""How the operator learns a model's geometry: read once, kept, asked for again ever more rarely; stated; refused."""

import asyncio
import time
from dataclasses import replace

import pytest
from octavo_engine.errors import ModelSourceError, UnsupportedModelError
from octavo_engine.geometry import geometry_to_data
from octavo_operator.conditions import make_conditions
from octavo_operator.modelgeometry import (
    IN_CONTAINER,
    WITH_ENGINES_KEYS,
    GeometryReader,
    read_geometry,
    stated_geometry,
    with_refusal,
)
from octavo_operator.observe import ModelGeometry
from octavo_operator.plan import make_plan
from operator_samples import DEFAULTS, LLAMA_8B, h100_node, llama, spec

ADDRESS = "hf://org/name"


class Hub:
    """A resolver that answers what it is told to, and counts."""

    def __init__(self, *answers, takes_s=0.0):
        self.answers, self.num_asked, self.takes_s = list(answers), 0, takes_s

    def __call__(self, address):
        time.sleep(self.takes_s)
        self.num_asked += 1
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


UNAVAILABLE = ModelSourceError("answered 500", reason="HubUnavailable")


async def test_asks_once_for_many_and_keeps_the_answer():
    hub = Hub(llama(), takes_s=0.05)
    reader = GeometryReader(hub)
    found = await asyncio.gather(*(reader.read(ADDRESS) for _ in range(5)))
    assert {each.geometry for each in found} == {llama()}
    await reader.read(ADDRESS)
    assert hub.num_asked == 1


async def test_waits_twice_as_long_after_each_failure_until_it_succeeds():
    hub = Hub(*[UNAVAILABLE] * 4, llama())
    reader = GeometryReader(hub, retry_s=0.02, longest_retry_s=0.08)
    waits, deadline = [], time.monotonic() + 20
    while (await reader.read(ADDRESS)).geometry is None and time.monotonic() < deadline:
        if len(waits) < hub.num_asked:
            waits.append(reader._entries[ADDRESS].expires - asyncio.get_running_loop().time())
        await asyncio.sleep(0.002)
    assert hub.num_asked == 5
    assert waits == pytest.approx([0.02, 0.04, 0.08, 0.08], abs=0.015)


async def test_never_asks_the_pass_to_come_back_at_once():
    reader = GeometryReader(Hub(UNAVAILABLE), retry_s=0.0)
    await reader.read(ADDRESS)
    assert reader.retry_after_s(ADDRESS) == 1.0
    assert GeometryReader(Hub(UNAVAILABLE)).retry_after_s(ADDRESS) == 30.0


async def test_a_hub_that_does_not_answer_is_given_up():
    reader = GeometryReader(Hub(llama(), takes_s=0.3), timeout_s=0.05)
    model = await reader.read(ADDRESS)
    assert (model.reason, model.problem) == ("HubUnavailable", f"{ADDRESS} did not answer within 0 s")


async def test_a_path_in_the_container_is_not_looked_for_here(tmp_path):
    reader = GeometryReader(Hub(llama()))
    for address in (str(tmp_path), f"file://{tmp_path}"):
        assert await reader.read(address) == ModelGeometry(problem=IN_CONTAINER)


@pytest.mark.parametrize("address", ["s3://bucket/llama", "oci://ghcr.io/org/llama:v1"])
async def test_what_is_read_with_the_engines_credentials_is_not_asked_for_with_those_of_the_operator(address):
    hub = Hub(llama())
    assert await GeometryReader(hub).read(address) == ModelGeometry(problem=WITH_ENGINES_KEYS)
    assert hub.num_asked == 0
    # Somebody who plans on another machine may lack them, too: that refusal is not the last word.
    assert not with_refusal(ModelGeometry(reason="ModelAccessDenied"), spec(model={"uri": address})).is_unsupported


def state(fields: dict, model: ModelGeometry) -> tuple[str, str, str]:
    """What Stalled, its reason and ModelFits say with that model."""
    asked = spec(**fields)
    made = make_plan(asked, [h100_node()], with_refusal(model, asked), DEFAULTS)
    conditions = {each.type: each for each in make_conditions(asked, made, [], [], None, 1, [], "2026-01-01T00:00:00Z")}
    return conditions["Stalled"].status, conditions["Ready"].reason, conditions["ModelFits"].reason


REFUSALS = {
    "gone": ("ModelNotFound", ("True", "ModelNotFound", "ModelNotFound")),
    "gated": ("ModelAccessDenied", ("True", "ModelAccessDenied", "ModelAccessDenied")),
    "too many requests": ("HubRateLimited", ("False", "Applying", "HubRateLimited")),
    "out of order": ("HubUnavailable", ("False", "Applying", "HubUnavailable")),
}


@pytest.mark.parametrize(("reason", "expected"), REFUSALS.values(), ids=REFUSALS)
def test_a_refusal_stops_the_plan_and_trouble_of_the_hub_does_not(reason, expected):
    model = read_geometry(Hub(ModelSourceError("no", reason=reason)), ADDRESS)
    assert state({}, model) == expected


@pytest.mark.parametrize(
    "fields",
    [
        {"model": {"uri": ADDRESS, "secretRef": {"name": "token"}}},
        {"engine": {"extraEnv": [{"name": "HF_TOKEN", "value": "x"}]}},
        {"podTemplate": {"spec": {}}},
    ],
)
def test_an_engine_with_a_key_of_its_own_may_look_itself(fields):
    model = ModelGeometry(problem="gated", reason="ModelAccessDenied")
    assert state(fields, model) == ("False", "Applying", "ModelAccessDenied")


def test_a_geometry_may_be_stated():
    asked = spec(model={"uri": "/models/llama", "geometry": geometry_to_data(llama())})
    assert stated_geometry(asked) == LLAMA_8B
    assert stated_geometry(spec()) is None


def test_a_geometry_that_is_stated_wrongly_says_which_field():
    model = stated_geometry(spec(model={"uri": "/m", "geometry": {**geometry_to_data(llama()), "num_layers": "32"}}))
    assert model.is_unsupported
    assert model.problem == "geometry.num_layers must be int, not '32'"


def test_a_model_that_no_engine_runs_keeps_its_geometry():
    moe = replace(llama(), architecture="MixtralForCausalLM")
    model = read_geometry(Hub(moe), ADDRESS)
    assert model.geometry is moe
    assert model.is_unsupported
    assert read_geometry(Hub(UnsupportedModelError("no")), ADDRESS) == ModelGeometry(problem="no", is_unsupported=True)
