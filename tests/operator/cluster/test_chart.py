"""The Helm chart on the real API server: the operator runs as the pod, and under exactly the rights, that it makes."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from api_objects import ApiObjects, eventually
from control_plane import ControlPlane
from kubectl import Kubectl, KubectlError
from operator_harness import (
    CHILD_KINDS,
    OWN,
    TINY_CONFIG,
    GetService,
    Manifest,
    ServiceNodes,
    condition,
    has_reached,
    inference_service,
    on_a_volume,
)
from plugin import PROCESS_NODE, Forwarding, HollowNodes

ROOT = Path(__file__).parents[3]
CHART = ROOT / "charts/octavo"
RELEASE = "octavo"
OPERATOR = "octavo-operator"
# On the node whose pods are processes; both replicas share its network, so each listens on its own address.
ON_PROCESSES = {
    "nodeSelector": {"kubernetes.io/hostname": PROCESS_NODE},
    "resyncSeconds": 2,
    "extraEnv": [{"name": "OCTAVO_OPERATOR_HOST", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}],
}

Helm = Callable[..., str]


@pytest.fixture
def run_helm(helm: Path, kubeconfig: Path, tmp_path: Path, namespace: str) -> Helm:
    """Runs helm in the test's namespace; `values` go in as a file."""

    def call(*arguments: str, values: Manifest | None = None) -> str:
        home = {f"HELM_{name}_HOME": str(tmp_path / name) for name in ("CACHE", "CONFIG", "DATA")}
        file = tmp_path / "values.yaml"
        file.write_text(yaml.safe_dump(values or {}))
        given = [f"--values={file}"] if values is not None else []
        run = subprocess.run(
            [str(helm), *arguments, *given, f"--namespace={namespace}"],
            capture_output=True, text=True, timeout=180, check=False,
            env={"KUBECONFIG": str(kubeconfig), "HOME": str(tmp_path), **home},
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        return run.stdout

    return call


@pytest.fixture
def uninstall(run_helm: Helm, control_plane: ControlPlane, namespace: str) -> Iterator[None]:
    """Takes the release away when the test is over, whatever it found; of a failed one pytest shows what was said."""
    yield
    print(logs(control_plane, namespace))
    run_helm("uninstall", RELEASE, "--ignore-not-found", "--wait")


def logs(cluster: ControlPlane, namespace: str) -> str:
    files = (cluster.state / "pods").glob(f"{namespace}_{OPERATOR}-*/operator.log")
    return "\n".join(file.read_text() for file in files)


@pytest.mark.parametrize("scope", ["all namespaces", "one namespace", "one namespace and nothing of the cluster"])
def test_the_operator_lives_on_the_rights_of_the_chart(
    crd: str,
    cluster: ControlPlane,
    run_helm: Helm,
    uninstall: None,
    objects: ApiObjects,
    kubectl: Kubectl,
    namespace: str,
    service_nodes: ServiceNodes,
    get_service: GetService,
    forwarding: Forwarding,
    scope: str,
    tmp_path: Path,
) -> None:
    scheduling = service_nodes()
    values = {**ON_PROCESSES, "watchNamespace": "" if scope == "all namespaces" else namespace}
    if scope == "one namespace and nothing of the cluster":
        nodes = kubectl("get", "nodes", f"--selector=test={namespace}", "-o", "yaml")
        values |= {"nodes": nodes, "rbac": {"nodes": False, "aggregate": False}, "crds": {"install": False}}
    run_helm("install", RELEASE, str(CHART), "--take-ownership", "--wait", "--timeout=120s", values=values)

    objects.apply(inference_service("rights", namespace, scheduling=scheduling))
    eventually(lambda: has_reached(get_service("rights"), "True", "Serving"), "it serves", 40)
    objects.merge("InferenceService", "rights", {"spec": {"planOnly": True}}, namespace)
    eventually(lambda: has_reached(get_service("rights"), "True", "PlanOnly"), "its children go", 40)
    eventually(lambda: not any(objects.list(kind, namespace, OWN) for kind in CHILD_KINDS), "they are gone", 20)

    if scope != "one namespace and nothing of the cluster":
        # A model that only a pod sees, on a volume: the Job that looks at it is made and read under these rights.
        (tmp_path / "tiny").mkdir()
        (tmp_path / "tiny" / "config.json").write_text(json.dumps(TINY_CONFIG))
        on_processes = {"scheduling": {"nodeSelector": {"kubernetes.io/hostname": PROCESS_NODE}}}
        objects.apply(inference_service("inspected", namespace, **on_a_volume(tmp_path, **on_processes)))
        eventually(lambda: has_reached(get_service("inspected"), "True", "ScaledToZero"), "it is inspected", 60)
        inspected = get_service("inspected")
        assert condition(inspected, "ModelFits")["reason"] == "Fits"
        assert objects.list("Job", namespace, api="batch/v1")
        objects.delete("InferenceService", "inspected", namespace)
        eventually(lambda: not any(objects.list(kind, namespace, OWN) for kind in CHILD_KINDS), "it goes", 20)

    assert says_ready(run_helm, forwarding(OPERATOR, namespace).url) == "ok"
    lease = objects.get("Lease", OPERATOR, namespace)
    assert lease is not None
    assert lease["spec"]["holderIdentity"]
    assert len(objects.list("Pod", namespace, f"app.kubernetes.io/instance={RELEASE}")) == 2
    said = logs(cluster, namespace)
    assert "event=PlanChosen" in said
    assert "Traceback" not in said, said
    refused = [line for line in said.splitlines() if "forbidden" in line.lower()]
    if scope == "one namespace and nothing of the cluster":
        # It says once what it goes without, and asks no more.
        refused = [line for line in refused if "objects are not read" not in line]
    assert not refused

    run_helm("uninstall", RELEASE, "--wait")
    assert not objects.list("Deployment", namespace)
    assert objects.get("CustomResourceDefinition", crd) is not None
    assert get_service("rights") is not None


def says_ready(run_helm: Helm, url: str) -> str:
    """What the pod of `helm test` would print; the test cluster has no DNS, so its Service is reached through `url`."""
    hooks = [each for each in yaml.safe_load_all(run_helm("get", "hooks", RELEASE)) if each]
    (container,) = hooks[0]["spec"]["containers"]
    *arguments, address = container["command"][1:]
    path = address.rpartition(":8080")[2]
    run = subprocess.run([sys.executable, *arguments, f"{url}{path}"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_an_upgrade_brings_the_new_crd_and_keeps_what_runs(
    crd: str,
    cluster: ControlPlane,
    run_helm: Helm,
    uninstall: None,
    objects: ApiObjects,
    kubectl: Kubectl,
    namespace: str,
    service_nodes: ServiceNodes,
    get_service: GetService,
    tmp_path: Path,
) -> None:
    old = older_chart(tmp_path, without="planOnly")
    wait = ("--wait", "--timeout=120s")
    run_helm("install", RELEASE, str(old), "--take-ownership", *wait, values=ON_PROCESSES)
    manifest = inference_service("kept", namespace, scheduling=service_nodes())
    objects.apply(manifest)
    before = eventually(lambda: serving(get_service("kept")), "it serves", 40)
    deployments = {each["metadata"]["uid"] for each in objects.list("Deployment", namespace, OWN)}
    with pytest.raises(KubectlError, match="unknown field"):
        apply(kubectl, with_plan_only(manifest))

    run_helm("upgrade", RELEASE, str(CHART), *wait, values={**ON_PROCESSES, "replicas": 1, "workers": 2})
    apply(kubectl, manifest)
    after = get_service("kept")
    assert after is not None
    assert after["metadata"]["uid"] == before["metadata"]["uid"]
    assert after["status"]["plan"]["hash"] == before["status"]["plan"]["hash"]
    assert {each["metadata"]["uid"] for each in objects.list("Deployment", namespace, OWN)} == deployments
    eventually(
        lambda: len(objects.list("Pod", namespace, f"app.kubernetes.io/instance={RELEASE}")) == 1, "one operator"
    )

    # The upgraded operator acts on the field that the upgraded CRD knows.
    apply(kubectl, with_plan_only(manifest))
    eventually(lambda: has_reached(get_service("kept"), "True", "PlanOnly"), "the new field is obeyed", 40)

    without_crds = {**ON_PROCESSES, "replicas": 1, "crds": {"install": False}}
    run_helm("upgrade", RELEASE, str(CHART), *wait, values=without_crds)
    run_helm("uninstall", RELEASE, "--wait")
    assert objects.get("CustomResourceDefinition", crd) is not None
    assert get_service("kept") is not None


def serving(manifest: Manifest | None) -> Manifest | None:
    return manifest if has_reached(manifest, "True", "Serving") else None


def apply(kubectl: Kubectl, manifest: Manifest) -> None:
    kubectl("apply", "--server-side", "--force-conflicts", "--validate=strict", "-f", "-", manifests=[manifest])


def with_plan_only(manifest: Manifest) -> Manifest:
    return {**manifest, "spec": {**manifest["spec"], "planOnly": True}}


def older_chart(folder: Path, without: str) -> Path:
    """The chart as if it were of a version whose spec had no such field yet."""
    chart = folder / "older" / "octavo"
    shutil.copytree(CHART, chart)
    file = chart / "files/crds/octavo.dev_inferenceservices.yaml"
    manifest = yaml.safe_load(file.read_text())
    (version,) = manifest["spec"]["versions"]
    del version["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"][without]
    file.write_text(yaml.safe_dump(manifest))
    return chart


def monitoring_crd(kind: str) -> Manifest:
    """A stand-in for the Prometheus operator's CRD, which takes everything."""
    plural = f"{kind.lower()}s"
    schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.monitoring.coreos.com"},
        "spec": {
            "group": "monitoring.coreos.com",
            "scope": "Namespaced",
            "names": {"kind": kind, "plural": plural},
            "versions": [{"name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}],
        },
    }


@pytest.fixture(scope="module")
def monitoring(objects: ApiObjects) -> Iterator[None]:
    """The kinds of the Prometheus operator."""
    crds = [monitoring_crd(kind) for kind in ("ServiceMonitor", "PodMonitor")]
    for each in crds:
        objects.apply(each)
    eventually(lambda: all(objects.is_established(each["metadata"]["name"]) for each in crds), "the kinds are there")
    yield
    for each in crds:
        objects.delete("CustomResourceDefinition", each["metadata"]["name"])


@pytest.mark.parametrize("values", ["default", "everything"])
def test_is_admitted_under_the_restricted_standard(
    crd: str,
    monitoring: None,
    run_helm: Helm,
    uninstall: None,
    objects: ApiObjects,
    kubectl: Kubectl,
    namespace: str,
    hollow_nodes: HollowNodes,
    values: str,
) -> None:
    hollow_nodes(3, labels={"kubernetes.io/os": "linux"})
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    objects.merge("Namespace", namespace, {"metadata": {"labels": labels}})
    chosen = yaml.safe_load((CHART / f"ci/{values}-values.yaml").read_text())
    # On hollow nodes, whatever else runs.
    chosen = {**chosen, "tolerations": [], "nodeSelector": {"kubernetes.io/os": "linux"}}
    run_helm("install", RELEASE, str(CHART), "--take-ownership", "--wait", "--timeout=60s", values=chosen)
    assert len(objects.list("Pod", namespace, f"app.kubernetes.io/name={OPERATOR}")) == chosen.get("replicas", 2)
    assert "octavo plan" in run_helm("status", RELEASE)
    test_pods = [each for each in yaml.safe_load_all(run_helm("get", "hooks", RELEASE)) if each]
    assert "created" in kubectl("create", "--dry-run=server", "-f", "-", manifests=test_pods)
    assert len(test_pods) == 1


ACCESS = [
    ("view", "get", "inferenceservices", True),
    ("view", "create", "inferenceservices", False),
    ("edit", "create", "inferenceservices", True),
    ("edit", "patch", "inferenceservices/scale", True),
    ("edit", "patch", "inferenceservices/status", False),
    ("admin", "delete", "inferenceservices", True),
]


def test_teams_rights_take_the_resource_in(
    crd: str,
    run_helm: Helm,
    uninstall: None,
    control_plane: ControlPlane,
    objects: ApiObjects,
    kubectl: Kubectl,
    namespace: str,
) -> None:
    run_helm("install", RELEASE, str(CHART), "--take-ownership", values={"replicas": 0})
    for role in ("view", "edit", "admin"):
        user = f"{namespace}-{role}"
        kubectl("create", "rolebinding", user, f"--clusterrole={role}", f"--user={user}", f"--namespace={namespace}")

    def may(role: str, verb: str, resource: str) -> bool:
        review = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SubjectAccessReview",
            "spec": {"user": f"{namespace}-{role}", "resourceAttributes": attributes(namespace, verb, resource)},
        }
        answer = json.loads(kubectl("create", "-o", "json", "-f", "-", manifests=[review]))
        return bool(answer["status"]["allowed"])

    for role, verb, resource, is_allowed in ACCESS:
        if is_allowed:
            # The controller that aggregates roles needs a moment.
            eventually(lambda case=(role, verb, resource): may(*case), f"{role} may {verb} {resource}")
    for role, verb, resource, is_allowed in ACCESS:
        assert may(role, verb, resource) == is_allowed, (role, verb, resource)


def attributes(namespace: str, verb: str, resource: str) -> Manifest:
    name, _, subresource = resource.partition("/")
    return {
        "namespace": namespace, "verb": verb, "group": "octavo.dev", "resource": name, "subresource": subresource,
    }  # fmt: skip
