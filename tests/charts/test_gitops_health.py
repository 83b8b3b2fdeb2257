"""The health checks of examples/gitops, Lua and CEL, over a recorded life and over what is rare."""

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import yaml
from gitops_health import ArgoCd, Flux

LIFE: list[dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("recorded_life.yaml").read_text())


def changes(values: list[str]) -> list[str]:
    return [each for each, _ in groupby(values)]


def test_argo_cd_follows_the_recorded_life() -> None:
    argo = ArgoCd()
    assert changes([argo.health(state)[0] for state in LIFE]) == [
        "Progressing", "Healthy", "Progressing", "Degraded", "Progressing", "Healthy", "Progressing", "Suspended",
        "Progressing", "Healthy", "Progressing",
    ]  # fmt: skip


def test_flux_follows_the_recorded_life() -> None:
    flux = Flux()
    assert changes([flux.status(state) for state in LIFE]) == [
        "Unknown", "InProgress", "Current", "InProgress", "Failed", "InProgress", "Current", "InProgress", "Current",
        "InProgress", "Current", "InProgress",
    ]  # fmt: skip


def resource(*true: str, reason: str = "Some", observed: int | None = 2, **metadata: Any) -> dict[str, Any]:
    """A resource of generation 2 whose conditions `true` are True and whose others are False."""
    conditions = [
        {"type": name, "status": str(name in true), "reason": reason, "message": f"{name} says why"}
        for name in ("Ready", "Reconciling", "Stalled")
    ]
    status: Mapping[str, Any] = {"conditions": conditions}
    if observed is not None:
        status = {**status, "observedGeneration": observed}
    return {"metadata": {"name": "one", "generation": 2, **metadata}, "spec": {}, "status": status}


STATES = {
    "serving": (resource("Ready", reason="Serving"), "Healthy", "Ready says why", "Current"),
    "planned only": (resource("Ready", reason="PlanOnly"), "Healthy", "Ready says why", "Current"),
    "scaled to zero": (resource("Ready", reason="ScaledToZero"), "Healthy", "Ready says why", "Current"),
    "suspended": (resource("Ready", reason="Suspended"), "Suspended", "Ready says why", "Current"),
    "rolling out": (resource("Reconciling"), "Progressing", "Ready says why", "InProgress"),
    "stalled": (resource("Stalled"), "Degraded", "Stalled says why", "Failed"),
    "stalled, and edited since": (
        resource("Stalled", observed=1), "Progressing", "waiting for the operator to see the latest spec", "InProgress",
    ),
    "serving, and edited since": (
        resource("Ready", observed=1), "Progressing", "waiting for the operator to see the latest spec", "InProgress",
    ),
    "nothing is true": (resource(), "Progressing", "Ready says why", "InProgress"),
    "never looked at": (
        {"metadata": {"name": "one", "generation": 1}, "spec": {}},
        "Progressing", "waiting for the operator", "Unknown",
    ),
    "a status without conditions": (
        {"metadata": {"name": "one", "generation": 1}, "spec": {}, "status": {}},
        "Progressing", "waiting for the operator", "Unknown",
    ),
    "being deleted while it serves": (
        resource("Ready", deletionTimestamp="2026-01-01T00:00:00Z"), "Progressing", "being deleted", "InProgress",
    ),
    "being deleted while stalled": (
        resource("Stalled", deletionTimestamp="2026-01-01T00:00:00Z"), "Progressing", "being deleted", "InProgress",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", STATES)
def test_a_state_reads_as_meant(case: str) -> None:
    state, health, message, status = STATES[case]
    assert ArgoCd().health(state) == (health, message)
    assert Flux().status(state) == status


@pytest.mark.parametrize(
    ("state", "health", "status"),
    [(resource("Ready"), "Healthy", "Current"), (resource("Stalled"), "Degraded", "Failed")],
    ids=["used", "contradicts"],
)
def test_a_hardware_profile_reads_by_the_same_conditions(state: dict[str, Any], health: str, status: str) -> None:
    assert ArgoCd("HardwareProfile").health(state)[0] == health
    assert Flux("HardwareProfile").status(state) == status
