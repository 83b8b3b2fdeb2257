"""Every answer of a hub ends in a condition with its reason, and none in an engine that fails again and again."""

import time
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from api_objects import ApiObjects, eventually
from hub_server import serve_hub
from operator_harness import (
    OWN,
    GetService,
    Manifest,
    OperatorProcess,
    condition,
    inference_service,
)

# Repository of the hub -> the reason of ModelFits, what its message says, and whether an engine starts.
ANSWERS = {
    "good": ("Fits", "contexts of 64 tokens", True),
    "absent": ("ModelNotFound", "does not exist, or is private", False),
    "private": ("ModelNotFound", "does not exist, or is private", False),
    "gated": ("ModelAccessDenied", "is gated: accept its terms on its page", False),
    "forbidden": ("ModelAccessDenied", "answered 403", False),
    "busy": ("HubRateLimited", "answered 429: too many requests", True),
    "broken": ("HubUnavailable", "answered 500", True),
    "liar": ("ModelNotSupported", "config.json describes weights of", False),
}


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    with serve_hub() as server:
        yield server


@pytest.fixture
def operator_with_hub(
    crd: str, kubeconfig: Path, tmp_path: Path, namespace: str, hub: ThreadingHTTPServer
) -> Iterator[OperatorProcess]:
    """An operator of this test's namespace, which lists everything every second."""
    process = OperatorProcess(
        kubeconfig, tmp_path / "log", "--no-leader-election", "--resync-seconds", "1", "--namespace", namespace,
        environment={
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
            "HF_HOME": str(tmp_path / "hub"),
            "HF_HUB_DISABLE_XET": "1",
        },
    )  # fmt: skip
    with process:
        yield process
    assert "Traceback" not in process.log.read_text(), process.log.read_text()


def test_each_answer_has_its_reason_and_is_asked_for_once(
    operator_with_hub: OperatorProcess,
    hub: ThreadingHTTPServer,
    objects: ApiObjects,
    namespace: str,
    service_nodes: Callable[..., Manifest],
    get_service: GetService,
) -> None:
    scheduling = service_nodes()
    for name in ANSWERS:
        spec = {"model": {"uri": f"hf://org/{name}"}, "scheduling": scheduling}
        objects.apply({**inference_service(name, namespace), "spec": spec})
    for name, (reason, message, _) in ANSWERS.items():
        found = eventually(lambda name=name: _judged(get_service(name)), f"{name} is judged", 60.0)
        fits = condition(found, "ModelFits")
        assert (fits["reason"], message in fits["message"]) == (reason, True), fits

    def started() -> bool:
        deployments = {each["metadata"]["labels"]["octavo.dev/inference-service"] for each in _owned()}
        return deployments == {name for name, (_, _, starts) in ANSWERS.items() if starts}

    def _owned() -> list[Manifest]:
        return objects.list("Deployment", namespace, OWN)

    eventually(started, "engines of the models that may be there, and no others")
    handler = hub.RequestHandlerClass
    num_before = len(handler.requested)  # type: ignore[attr-defined]
    # Three passes over everything.
    time.sleep(3)
    assert len(handler.requested) == num_before  # type: ignore[attr-defined]


def _judged(found: Manifest | None) -> Manifest | None:
    return found if condition(found, "ModelFits") else None
