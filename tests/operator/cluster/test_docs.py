"""The commands of docs/install.md and docs/gitops.md, run in their order on the real API server.

Operator and engine are real processes on the process node; Helm gets the settings that take them there.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from api_objects import ApiObjects, eventually
from control_plane import ControlPlane
from kubectl import Kubectl
from operator_harness import OperatorProcess
from plugin import PROCESS_NODE

ROOT = Path(__file__).parents[3]
NAMESPACE = "octavo-system"
# What this machine has not: a Docker daemon, DNS inside the cluster; and what runs until it is stopped.
NOT_HERE = ("docker ", "helm test ", "octavo operator ")


def commands(page: str) -> list[str]:
    """The lines of a page's console blocks that begin with $, continued ones joined."""
    blocks = re.findall(r"```console\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    joined = "\n".join(blocks).replace("\\\n", "")
    return [line.removeprefix("$ ") for line in joined.splitlines() if line.startswith("$ ")]


def run(command: str, environment: dict[str, str], helm_values: Path | None = None) -> str:
    if helm_values and command.startswith(("helm install", "helm upgrade")):
        command += f" --values {helm_values}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture
def environment(helm: Path, kubectl: Kubectl, kubeconfig: Path, tmp_path: Path) -> dict[str, str]:
    programs = [str(kubectl.program.parent), str(helm.parent), str(Path(sys.executable).parent)]
    path = os.pathsep.join([*programs, os.environ["PATH"]])
    return {"PATH": path, "HOME": str(tmp_path), "KUBECONFIG": str(kubeconfig), "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def on_processes(tmp_path: Path) -> Path:
    """Values for the operator on the process node, where both replicas share one network."""
    host = {"name": "OCTAVO_OPERATOR_HOST", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}
    file = tmp_path / "values.yaml"
    file.write_text(yaml.safe_dump({"nodeSelector": {"kubernetes.io/hostname": PROCESS_NODE}, "extraEnv": [host]}))
    return file


@pytest.fixture
def crds_of_the_release(crd: str, kubectl: Kubectl, objects: ApiObjects) -> Iterator[None]:
    """The session's CRDs as if the release had brought them: put back when it took them away."""
    for each in kubectl("get", "crd", "-o", "name").split():
        if each.endswith(".octavo.dev"):
            kubectl("label", each, "app.kubernetes.io/managed-by=Helm", "--overwrite")
            owner = ("meta.helm.sh/release-name=octavo", f"meta.helm.sh/release-namespace={NAMESPACE}")
            kubectl("annotate", each, *owner, "--overwrite")
    yield
    kubectl("apply", "--server-side", "--force-conflicts", "-f", str(ROOT / "crds"))
    eventually(lambda: objects.is_established(crd), "the CRD is established")


@pytest.mark.model
def test_installing_works_as_the_page_says(
    crds_of_the_release: None,
    cluster: ControlPlane,
    objects: ApiObjects,
    environment: dict[str, str],
    on_processes: Path,
) -> None:
    listed = commands("docs/install.md")
    done = [each for each in listed if not each.startswith(NOT_HERE)]
    assert len(listed) - len(done) == 4
    try:
        said = {each: run(each, environment, on_processes) for each in done}
    finally:
        objects.delete("Namespace", NAMESPACE)
    assert "smollm2   True    Serving   cpu x1" in said["kubectl get inferenceservices"]
    assert "PlanChosen" in said["kubectl describe inferenceservice smollm2"]


@pytest.mark.model
def test_gitops_works_as_the_page_says(
    operator_process: OperatorProcess,
    cluster: ControlPlane,
    objects: ApiObjects,
    environment: dict[str, str],
) -> None:
    objects.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "argocd"}})
    objects.apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "argocd-cm", "namespace": "argocd"}})
    try:
        said = {each: run(each, environment) for each in commands("docs/gitops.md")}
    finally:
        objects.delete("InferenceService", "smollm2", "default")
        objects.delete("Namespace", "argocd")
    assert said["kubectl diff --server-side -f examples/smollm2.yaml"] == ""
    settings = objects.get("ConfigMap", "argocd-cm", "argocd") or {}
    assert "Stalled" in settings["data"]["resource.customizations.health.octavo.dev_HardwareProfile"]
    assert "cpu x1" in said["octavo plan -f examples/smollm2.yaml --nodes build/nodes.yaml"]


def test_every_link_and_every_file_that_the_pages_name_exists() -> None:
    for page in ("docs/install.md", "docs/gitops.md", "charts/octavo/README.md"):
        text = (ROOT / page).read_text()
        for target in re.findall(r"\]\(([^)#]+)", text):
            assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"
        for name in re.findall(r"(?:examples|tests|charts|docs|tools)/[\w./-]+\w", text):
            assert (ROOT / name).exists() or (ROOT / "charts/octavo" / name).exists(), f"{page}: {name}"


def test_commands_are_read_whole() -> None:
    assert "--set engineImage" in commands("docs/install.md")[2]
    assert all(shlex.split(each) for page in ("docs/install.md", "docs/gitops.md") for each in commands(page))
