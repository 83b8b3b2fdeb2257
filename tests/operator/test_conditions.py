"""Conditions follow kstatus, and say what to do."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from octavo_operator.conditions import Failure, invalid_spec_conditions, make_conditions, seconds_to_deadline
from octavo_operator.observe import ModelGeometry, PodState, WorkloadState
from octavo_operator.plan import make_plan
from operator_samples import DEFAULTS, LLAMA_8B, LLAMA_70B, UNKNOWN, h100_node, l4_node, spec

THEN, NOW = "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"


def state(**fields):
    values = {
        "node_type": "h100", "is_current": True, "desired": 1, "replicas": 1, "updated": 1, "ready": 1,
        "available": 1, "is_past_deadline": False, "failure": "",
    }  # fmt: skip
    return WorkloadState(**{**values, **fields})


def judged(workloads=(), pods=(), failure=None, model=LLAMA_8B, nodes=None, previous=(), now=NOW, **fields):
    made = make_plan(spec(**fields), nodes or [h100_node()], model, DEFAULTS)
    found = make_conditions(spec(**fields), made, list(workloads), list(pods), failure, 3, list(previous), now)
    return {each.type: each for each in found}


def summary(conditions):
    return {name for name in ("Ready", "Reconciling", "Stalled") if conditions[name].status == "True"}


PENDING = PodState("llama-x", "h100", True, "cannot be scheduled: 0/3 nodes are available")
CASES = {
    "nothing is there yet": ({}, "Reconciling", "Applying"),
    "the controller has not seen the edit": ({"workloads": [state(is_current=False)]}, "Reconciling", "Applying"),
    "old pods still run": ({"workloads": [state(replicas=2)]}, "Reconciling", "RollingOut"),
    "new pods are not ready": ({"workloads": [state(available=0, ready=0)]}, "Reconciling", "RollingOut"),
    "all is there": ({"workloads": [state()]}, "Ready", "Serving"),
    "the deadline passed": (
        {"workloads": [state(available=0, ready=0, is_past_deadline=True)]}, "Stalled", "ProgressDeadlineExceeded",
    ),
    "a complete rollout outlives its deadline": ({"workloads": [state(is_past_deadline=True)]}, "Ready", "Serving"),
    "nothing fits": ({"model": LLAMA_70B, "nodes": [h100_node(gpus=1)]}, "Stalled", "ModelDoesNotFit"),
    "a set whose step takes too long": (
        {"workloads": [state(available=0, ready=0, progress_since=THEN)]}, "Stalled", "ProgressDeadlineExceeded",
    ),
    "a set whose step began a moment ago": (
        {"workloads": [state(available=0, ready=0, progress_since=NOW)]}, "Reconciling", "RollingOut",
    ),
    "the other kind serves": ({"workloads": [state(kind="LeaderWorkerSet")]}, "Reconciling", "Applying"),
    "no such hardware": ({"hardware": {"types": ["b300"]}}, "Stalled", "NoFittingHardware"),
    "not supported": ({"model": ModelGeometry(problem="no", is_unsupported=True)}, "Stalled", "ModelNotSupported"),
    "plan only": ({"planOnly": True}, "Ready", "PlanOnly"),
    "suspended": (
        {"suspend": True, "workloads": [state(desired=0, replicas=0, updated=0, ready=0, available=0)]},
        "Ready", "Suspended",
    ),
    "scaled to zero": (
        {"scaling": {"replicas": 0}, "workloads": [state(desired=0, replicas=0, updated=0, ready=0, available=0)]},
        "Ready", "ScaledToZero",
    ),
    "refused": ({"failure": Failure("RejectedByApiServer", "no", is_final=True)}, "Stalled", "RejectedByApiServer"),
    "to be tried again": ({"failure": Failure("ApplyFailed", "no", is_final=False)}, "Reconciling", "ApplyFailed"),
    "geometry unknown, serving": ({"model": UNKNOWN, "workloads": [state()]}, "Ready", "Serving"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_exactly_one_of_ready_reconciling_stalled_is_true(case):
    fields, expected, reason = CASES[case]
    conditions = judged(**fields)
    assert summary(conditions) == {expected}
    assert conditions["Ready"].reason == reason
    assert all(each.observed_generation == 3 for each in conditions.values())


def test_a_message_says_what_keeps_a_pod_from_running():
    conditions = judged([state(available=0, ready=0)], [PENDING])
    assert "pod llama-x cannot be scheduled: 0/3 nodes are available" in conditions["Reconciling"].message


def test_an_unknown_geometry_is_unknown_and_says_so():
    conditions = judged([state()], model=UNKNOWN)
    assert (conditions["ModelFits"].status, conditions["ModelFits"].reason) == ("Unknown", "GeometryUnknown")
    assert "the hub cannot be reached" in conditions["ModelFits"].message


def test_hardware_and_fit_are_judged_apart():
    unfit = judged(model=LLAMA_70B, nodes=[l4_node()])
    assert (unfit["HardwareMatched"].status, unfit["ModelFits"].status) == ("True", "False")
    missing = judged(hardware={"types": ["b300"]})
    assert (missing["HardwareMatched"].status, missing["ModelFits"].status) == ("False", "Unknown")


def test_available_is_about_pods_that_answer_whatever_the_rollout_does():
    assert judged([state(updated=0, replicas=2)])["Available"].status == "True"
    assert judged([state(ready=0)])["Available"].status == "False"


def test_the_transition_time_changes_with_the_status_only():
    first = judged([state(available=0, ready=0)], now=THEN)
    second = judged([state()], previous=first.values())
    assert second["Ready"].last_transition_time == NOW
    assert second["Accepted"].last_transition_time == THEN
    assert second["Stalled"].last_transition_time == THEN


def test_looks_again_when_a_step_will_have_taken_too_long():
    made = make_plan(spec(rollout={"progressDeadlineSeconds": 86_400}), [h100_node()], LLAMA_8B, DEFAULTS)
    assert seconds_to_deadline(made, [state()], NOW) is None
    assert seconds_to_deadline(made, [state(progress_since=THEN)], "2026-01-01T20:00:00Z") == 86_400 - 72_000
    assert seconds_to_deadline(made, [state(progress_since=THEN)], "2026-01-03T00:00:00Z") is None
    assert seconds_to_deadline(made, [state(progress_since=THEN, node_type="l4")], NOW) is None


def test_an_invalid_stored_spec_stalls():
    conditions = {each.type: each for each in invalid_spec_conditions("spec.x: no", 2, [], NOW)}
    assert summary(conditions) == {"Stalled"}
    assert conditions["Accepted"].status == "False"


counts = st.integers(0, 3)
states = st.builds(
    WorkloadState, st.just("h100"), st.booleans(), counts, counts, counts, counts, counts, st.booleans(), st.just("")
)


@given(st.lists(states, max_size=1), st.booleans(), counts)
def test_ready_means_complete_whatever_is_observed(workloads, suspended, replicas):
    conditions = judged(workloads, suspend=suspended, scaling={"replicas": replicas})
    assert len(summary(conditions)) == 1
    if conditions["Ready"].status == "True":
        (only,) = workloads
        assert only.is_current
        assert only.replicas == only.updated == (0 if suspended else replicas)
        assert only.available >= only.desired
