"""The Helm chart on the real API server; the operator under exactly the rights that the chart gives it."""

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import binaries
import pytest
import yaml
from api_objects import ApiObjects, eventually
from kubectl import Kubectl
from operator_harness import CHILD_KINDS, OWN, Manifest, OperatorProcess, has_reached, inference_service

ROOT = Path(__file__).parents[3]
CHART = ROOT / "charts/octavo"
RELEASE = "octavo"
KUBE_VERSION = "--kube-version=1.34"

Helm = Callable[..., str]


@pytest.fixture(scope="session")
def helm_program() -> Path:
    return binaries.helm_binary()


@pytest.fixture
def helm(helm_program: Path, kubeconfig: Path, tmp_path: Path) -> Helm:
    def call(*arguments: str) -> str:
        home = {f"HELM_{name}_HOME": str(tmp_path / name) for name in ("CACHE", "CONFIG", "DATA")}
        run = subprocess.run(
            [str(helm_program), *arguments], capture_output=True, text=True, timeout=120, check=False,
            env={"KUBECONFIG": str(kubeconfig), "HOME": str(tmp_path), **home},
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        return run.stdout

    return call


@pytest.fixture(params=["", "watched"])
def release(request: pytest.FixtureRequest, crd: str, helm: Helm, objects: ApiObjects, namespace: str) -> Iterator[str]:
    """The chart, installed for all namespaces, or for the test's own. The value is what it watches."""
    watched = namespace if request.param else ""
    settings = ("--take-ownership", f"--set=watchNamespace={watched}")
    helm("install", RELEASE, str(CHART), f"--namespace={namespace}", *settings)
    yield watched
    helm("uninstall", RELEASE, f"--namespace={namespace}")


def test_lint_finds_nothing(helm: Helm) -> None:
    assert "0 chart(s) failed" in helm("lint", "--strict", str(CHART))


def test_the_crd_is_left_out_on_demand(helm: Helm) -> None:
    text = helm("template", RELEASE, str(CHART), KUBE_VERSION, "--set=crds.install=false")
    assert "CustomResourceDefinition" not in {each["kind"] for each in yaml.safe_load_all(text) if each}


def test_images_name_no_registry(helm: Helm) -> None:
    documents = [each for each in yaml.safe_load_all(helm("template", RELEASE, str(CHART), KUBE_VERSION)) if each]
    (deployment,) = [each for each in documents if each["kind"] == "Deployment"]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert container["image"].startswith("octavo/operator:")


def test_the_operator_lives_on_the_rights_of_the_chart(
    release: str,
    objects: ApiObjects,
    kubectl: Kubectl,
    namespace: str,
    service_nodes: Callable[..., Manifest],
    get_service: Callable[[str], Manifest | None],
    tmp_path: Path,
) -> None:
    kubeconfig = kubeconfig_of(f"{RELEASE}-operator", kubectl, namespace, tmp_path)
    scheduling = service_nodes()
    scope = ("--namespace", namespace) if release else ("--all-namespaces",)
    election = ("--lease-namespace", namespace, "--lease-name", f"{RELEASE}-operator")
    process = OperatorProcess(kubeconfig, tmp_path / "log", *scope, *election, "--resync-seconds", "2")
    with process:
        objects.apply(inference_service("rights", namespace, scheduling=scheduling))
        eventually(lambda: has_reached(get_service("rights"), "True", "Serving"), "it serves", 40)
        objects.merge("InferenceService", "rights", {"spec": {"planOnly": True}}, namespace)
        eventually(lambda: has_reached(get_service("rights"), "True", "PlanOnly"), "its children go", 40)
        eventually(lambda: not any(objects.list(kind, namespace, OWN) for kind in CHILD_KINDS), "they are gone", 20)
    log = process.log.read_text()
    assert "forbidden" not in log.lower(), log


def kubeconfig_of(account: str, kubectl: Kubectl, namespace: str, folder: Path) -> Path:
    """A kubeconfig that is the ServiceAccount."""
    config = yaml.safe_load(kubectl.kubeconfig.read_text())
    token = kubectl("create", "token", account, f"--namespace={namespace}").strip()
    config["users"] = [{"name": "account", "user": {"token": token}}]
    for each in config["contexts"]:
        each["context"]["user"] = "account"
    file = folder / "kubeconfig"
    file.write_text(json.dumps(config))
    return file


def test_the_operators_pod_is_admitted_as_restricted(
    helm: Helm, objects: ApiObjects, crd: str, namespace: str, service_nodes: Callable[..., Manifest]
) -> None:
    service_nodes()
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    objects.merge("Namespace", namespace, {"metadata": {"labels": labels}})
    settings = ("--set=crds.install=false", "--wait", "--timeout=60s")
    helm("install", RELEASE, str(CHART), f"--namespace={namespace}", *settings)
    assert len(objects.list("Pod", namespace, f"app.kubernetes.io/instance={RELEASE}")) == 2
    assert "octavo plan" in helm("status", RELEASE, f"--namespace={namespace}")
    helm("uninstall", RELEASE, f"--namespace={namespace}")
    assert objects.get("CustomResourceDefinition", crd) is not None
