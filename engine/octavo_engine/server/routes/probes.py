"""Probes: whether to restart this server, whether to send it requests, and how far its start has come."""

from http import HTTPStatus
from typing import Literal

import msgspec
from fastapi import APIRouter, Response
from typing_extensions import TypedDict

from octavo_engine import __version__
from octavo_engine.server.serving import Serving, ServingOfApp

router = APIRouter(tags=["probes"])


class Health(TypedDict):
    """A probe's answer; `reason` says why it is not ok."""

    status: Literal["ok", "unavailable"]
    reason: str | None


class Startup(TypedDict):
    """How far the start has come; `fraction` is of this phase, and `remaining_s` an estimate, or null.

    `phases_s`: how long each phase took, the present one so far: starting (imports, device, the model's address),
    downloading (from an object store or a registry), loading (weights), warming_up (CUDA graphs and kernels).
    """

    status: Literal["ok", "unavailable"]
    phase: str
    message: str
    fraction: float
    elapsed_s: float
    remaining_s: float | None
    phases_s: dict[str, float]


class Version(TypedDict):
    """Which Octavo this is."""

    version: str


@router.get("/livez", response_model=Health, responses={503: {"model": Health}})
async def livez(serving: ServingOfApp) -> Response:
    """Fails when a restart would help: the engine is dead, or work is queued and no step has finished for long."""
    engine = serving.engine
    reason = None
    if engine.is_dead:
        reason = "the engine process has ended"
    elif engine.is_stalled():
        reason = f"no step finished in {serving.config.stall_timeout_s:g} s while requests wait"
    return _health(reason)


@router.get("/readyz", response_model=Health, responses={503: {"model": Health}})
async def readyz(serving: ServingOfApp) -> Response:
    """Fails while the model loads, and from the beginning of the shutdown on."""
    return _health(_why_not_ready(serving))


@router.get("/health", response_model=Health, responses={503: {"model": Health}})
async def health(serving: ServingOfApp) -> Response:
    """The same as `/readyz`, under the name that other engines use."""
    return _health(_why_not_ready(serving))


@router.get("/startupz", response_model=Startup, responses={503: {"model": Startup}})
async def startupz(serving: ServingOfApp) -> Response:
    """Fails until the model is loaded, and tells how far that is."""
    engine = serving.engine
    is_started = serving.is_loaded
    phase = engine.phase
    reply: Startup = {
        "status": "ok" if is_started else "unavailable",
        "phase": phase.phase,
        "message": phase.message,
        "fraction": phase.fraction,
        "elapsed_s": round(engine.startup_elapsed_s(), 3),
        "remaining_s": engine.estimate_remaining_s(),
        "phases_s": {name: round(seconds, 3) for name, seconds in engine.phase_seconds().items()},
    }
    return _probe_response(reply, is_ok=is_started)


@router.get("/version", response_model=Version)
async def version() -> Version:
    """Which Octavo this is."""
    return {"version": __version__}


def _why_not_ready(serving: Serving) -> str | None:
    if serving.is_ready:
        return None
    if serving.is_draining:
        return "shutting down"
    if serving.engine.is_dead:
        return "the engine process has ended"
    return f"the model is loading ({serving.engine.phase.phase})"


def _health(reason: str | None) -> Response:
    reply: Health = {"status": "ok" if reason is None else "unavailable", "reason": reason}
    return _probe_response(reply, is_ok=reason is None)


def _probe_response(reply: Health | Startup, *, is_ok: bool) -> Response:
    status = HTTPStatus.OK if is_ok else HTTPStatus.SERVICE_UNAVAILABLE
    return Response(msgspec.json.encode(reply), status, media_type="application/json")
