"""GitOps on the real API server: what Argo CD and Flux see over a resource's life, and that nothing drifts from Git."""

import subprocess
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path

import pytest
import yaml
from api_objects import eventually
from gitops_health import ArgoCd, Flux
from kubectl import Kubectl
from operator_harness import (
    GetService,
    OperatorProcess,
    Recorder,
    ServiceNodes,
    has_reached,
    inference_service,
)

ROOT = Path(__file__).parents[3]


def test_argo_cd_and_flux_follow_the_life_of_a_resource(
    operator_process: OperatorProcess,
    kubectl: Kubectl,
    namespace: str,
    service_nodes: ServiceNodes,
    get_service: GetService,
    record: Callable[[str], Recorder],
) -> None:
    recorder = record("life")
    scheduling = service_nodes()

    def sync(status: str, reason: str, **spec: object) -> None:
        manifest = inference_service("life", namespace, scheduling=scheduling, **spec)
        kubectl("apply", "--server-side", "--field-manager=gitops", "-f", "-", manifests=[manifest])
        eventually(lambda: has_reached(get_service("life"), status, reason), reason, 60)

    sync("True", "Serving")
    sync("False", "ModelDoesNotFit", engine={"maxModelLen": 2**31 - 1})
    sync("True", "Serving", scaling={"replicas": 2})
    sync("True", "Suspended", suspend=True)
    sync("True", "Serving")
    kubectl("delete", "oisvc", "life", f"--namespace={namespace}", "--cascade=foreground", "--timeout=60s")
    states = recorder.stop()

    healths, statuses = changes(ArgoCd().health(state)[0] for state in states), changes(map(Flux().status, states))
    begin = healths.index("Healthy")
    assert set(healths[:begin]) <= {"Progressing"}
    assert healths[begin:] == [
        "Healthy", "Progressing", "Degraded", "Progressing", "Healthy", "Progressing", "Suspended", "Progressing",
        "Healthy", "Progressing",
    ]  # fmt: skip
    begin = statuses.index("Current")
    assert set(statuses[:begin]) <= {"Unknown", "InProgress"}
    assert statuses[begin:] == [
        "Current", "InProgress", "Failed", "InProgress", "Current", "InProgress", "Current", "InProgress", "Current",
        "InProgress",
    ]  # fmt: skip


def changes(values: Iterable[str]) -> list[str]:
    """The values without immediate repetitions."""
    return [each for each, _ in groupby(values)]


@pytest.mark.parametrize("is_server_side", [False, True], ids=["client-side", "server-side"])
def test_nothing_drifts_from_what_git_has(
    operator_process: OperatorProcess,
    kubectl: Kubectl,
    namespace: str,
    service_nodes: ServiceNodes,
    get_service: GetService,
    tmp_path: Path,
    is_server_side: bool,
) -> None:
    """After a sync, and after the operator has written all that it writes, `kubectl diff` finds nothing."""
    scheduling = service_nodes()
    files = []
    for file in ("smollm2", "volume"):
        manifest = yaml.safe_load((ROOT / f"examples/{file}.yaml").read_text())
        manifest["metadata"]["namespace"] = namespace
        manifest["spec"] |= {"scheduling": scheduling, "planOnly": file == "volume"}
        files.append(tmp_path / f"{file}.yaml")
        files[-1].write_text(yaml.safe_dump(manifest))
    how = ("--server-side", "--field-manager=gitops") if is_server_side else ()
    kubectl("apply", *how, "-f", str(tmp_path))
    names = [yaml.safe_load(file.read_text())["metadata"]["name"] for file in files]
    for name in names:
        eventually(lambda name=name: has_reached(get_service(name), "True"), f"{name} is ready", 60)
    assert difference(kubectl, *how, "-f", str(tmp_path)) == ""

    edited = yaml.safe_load(files[0].read_text())
    edited["spec"]["scaling"] = {"replicas": 2}
    files[0].write_text(yaml.safe_dump(edited))
    assert "+  scaling:" in difference(kubectl, *how, "-f", str(tmp_path))


def difference(kubectl: Kubectl, *arguments: str) -> str:
    """What `kubectl diff` prints; empty if there is no difference."""
    command = [str(kubectl.program), f"--kubeconfig={kubectl.kubeconfig}", "diff", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode in (0, 1), run.stderr
    return run.stdout
