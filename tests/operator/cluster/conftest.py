"""The CRD on the real API server, and a running operator."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from api_objects import ApiObjects, eventually
from kubectl import Kubectl
from operator_harness import Manifest, OperatorProcess, Recorder
from plugin import HollowNodes

ROOT = Path(__file__).parents[3]
CRD_NAME = "inferenceservices.octavo.dev"
CRD_NAMES = (CRD_NAME, "hardwareprofiles.octavo.dev")


@pytest.fixture(scope="session")
def crd(kubectl: Kubectl, objects: ApiObjects) -> str:
    """The CRDs as they are checked in, established; the name of the first."""
    kubectl("apply", "--server-side", "-f", str(ROOT / "crds"))
    eventually(lambda: all(map(objects.is_established, CRD_NAMES)), "the CRDs are established")
    return CRD_NAME


@pytest.fixture
def service_nodes(hollow_nodes: HollowNodes, namespace: str) -> Callable[..., Manifest]:
    """Makes hollow nodes that only this test's resources use; returns the `scheduling` that leads there."""

    def make(count: int = 1, **node: object) -> Manifest:
        labels = {"test": namespace, **node.pop("labels", {})}  # type: ignore[dict-item]
        hollow_nodes(count, labels=labels, **node)  # type: ignore[arg-type]
        return {"nodeSelector": {"test": namespace}}

    return make


@pytest.fixture
def get_service(objects: ApiObjects, namespace: str) -> Callable[[str], Manifest | None]:
    """The InferenceService of this name as it is now."""
    return lambda name: objects.get("InferenceService", name, namespace, api="octavo.dev/v1alpha1")


@pytest.fixture
def record(kubectl: Kubectl, namespace: str, tmp_path: Path) -> Iterator[Callable[[str], Recorder]]:
    """Starts to record the states of an InferenceService."""
    recorders: list[Recorder] = []

    def start(name: str) -> Recorder:
        recorders.append(Recorder(kubectl, namespace, name, tmp_path / name))
        return recorders[-1]

    yield start
    for each in recorders:
        each.stop()


@pytest.fixture(scope="module")
def operator_process(crd: str, kubeconfig: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OperatorProcess]:
    """One operator for the tests of a module, in all namespaces, that resyncs often."""
    log = tmp_path_factory.mktemp("operator") / "log"
    process = OperatorProcess(kubeconfig, log, "--no-leader-election", "--resync-seconds", "4")
    with process:
        yield process
    assert "Traceback" not in log.read_text(), log.read_text()
