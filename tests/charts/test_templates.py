"""What the chart renders, by the real Helm and without a cluster."""

import http.server
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts/octavo"
VALUE_SETS = sorted((CHART / "ci").glob("*-values.yaml"))
CLUSTER_SCOPED = {"ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition"}

Manifest = dict[str, Any]
Render = Callable[..., list[Manifest]]


def of_kind(manifests: list[Manifest], kind: str) -> list[Manifest]:
    return [each for each in manifests if each["kind"] == kind]


def the(manifests: list[Manifest], kind: str) -> Manifest:
    (found,) = of_kind(manifests, kind)
    return found


def operator_pod(manifests: list[Manifest]) -> Manifest:
    spec: Manifest = the(manifests, "Deployment")["spec"]["template"]["spec"]
    return spec


def matches(selector: Manifest, labels: Manifest) -> bool:
    return all(labels.get(name) == value for name, value in selector.items())


@pytest.mark.parametrize("file", VALUE_SETS, ids=lambda file: file.stem)
def test_lint_finds_nothing(call_helm: Callable[..., str], file: Path) -> None:
    assert "0 chart(s) failed" in call_helm("lint", "--strict", str(CHART), f"--values={file}")


@pytest.mark.parametrize("file", VALUE_SETS, ids=lambda file: file.stem)
def test_every_object_is_labelled_and_in_its_namespace(render: Render, file: Path) -> None:
    manifests = render(values=[file])
    names = [(each["kind"], each["metadata"].get("namespace"), each["metadata"]["name"]) for each in manifests]
    assert len(names) == len(set(names))
    for kind, namespace, name in names:
        assert (namespace is None) == (kind in CLUSTER_SCOPED), name
    for each in manifests:
        if each["kind"] != "CustomResourceDefinition":
            assert each["metadata"]["labels"]["app.kubernetes.io/instance"] == "octavo"


def test_brings_every_crd_and_keeps_it_when_the_release_goes(render: Render) -> None:
    found = {each["metadata"]["name"]: each for each in of_kind(render(), "CustomResourceDefinition")}
    files = [yaml.safe_load(file.read_text()) for file in (ROOT / "crds").glob("*.yaml")]
    assert files
    assert set(found) == {each["metadata"]["name"] for each in files}
    for each in files:
        rendered = found[each["metadata"]["name"]]
        assert rendered["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
        assert rendered["spec"] == each["spec"]


def test_leaves_the_crds_out_on_demand(render: Render) -> None:
    assert not of_kind(render("crds.install=false"), "CustomResourceDefinition")


IMAGES = {
    "the chart's version": ((), "octavo/operator:0.1.0"),
    "a tag": (("image.tag=1.2.3",), "octavo/operator:1.2.3"),
    "a digest before a tag": (
        ("image.tag=1.2.3", f"image.digest=sha256:{'a' * 64}"), f"octavo/operator@sha256:{'a' * 64}"
    ),
    "a registry": (("image.repository=registry.example.com:5000/octavo",), "registry.example.com:5000/octavo:0.1.0"),
}  # fmt: skip


@pytest.mark.parametrize("case", IMAGES)
def test_operator_and_test_pod_run_the_same_image(render: Render, case: str) -> None:
    settings, image = IMAGES[case]
    manifests = render(*settings)
    pods = [operator_pod(manifests), the(manifests, "Pod")["spec"]]
    assert [each["containers"][0]["image"] for each in pods] == [image, image]


def test_a_namespaced_release_makes_nothing_outside_of_namespaces(render: Render) -> None:
    manifests = render(values=[CHART / "ci/namespaced-values.yaml"])
    assert not {each["kind"] for each in manifests} & CLUSTER_SCOPED
    roles = {(each["metadata"]["namespace"], each["metadata"]["name"]) for each in of_kind(manifests, "Role")}
    assert roles == {("team-a", "octavo-operator"), ("octavo-system", "octavo-operator-lease")}
    assert "--namespace=team-a" in operator_pod(manifests)["containers"][0]["args"]


def test_without_a_watched_namespace_only_nodes_aggregates_and_the_operator_have_cluster_roles(render: Render) -> None:
    names = {each["metadata"]["name"].removeprefix("octavo-system-") for each in of_kind(render(), "ClusterRole")}
    assert names == {"octavo-operator", "octavo-operator-nodes", "octavo-operator-view", "octavo-operator-edit"}
    assert not of_kind(render("rbac.create=false", "rbac.aggregate=false"), "ClusterRole")


def test_two_releases_of_one_name_share_no_object_of_the_cluster(call_helm: Callable[..., str]) -> None:
    def names(namespace: str) -> set[str]:
        text = call_helm(
            "template",
            "octavo",
            str(CHART),
            "--kube-version=1.34",
            f"--namespace={namespace}",
            "--set=crds.install=false",
        )
        found = [each for each in yaml.safe_load_all(text) if each]
        return {each["metadata"]["name"] for each in found if each["kind"] in CLUSTER_SCOPED}

    assert names("a")
    assert not names("a") & names("b")


@pytest.mark.parametrize("file", VALUE_SETS, ids=lambda file: file.stem)
def test_selectors_find_the_operators_pods_and_no_other(render: Render, file: Path) -> None:
    manifests = render(values=[file])
    pod = the(manifests, "Deployment")["spec"]["template"]["metadata"]["labels"]
    test_pod = the(manifests, "Pod")["metadata"]["labels"]
    selectors = [the(manifests, "Service")["spec"]["selector"]]
    selectors += [each["spec"]["selector"]["matchLabels"] for each in of_kind(manifests, "PodDisruptionBudget")]
    selectors += [each["spec"]["podSelector"]["matchLabels"] for each in of_kind(manifests, "NetworkPolicy")]
    selectors += [each["spec"]["selector"]["matchLabels"] for each in of_kind(manifests, "Deployment")]
    for selector in selectors:
        assert matches(selector, pod)
        assert not matches(selector, test_pod)
    for monitor in of_kind(manifests, "ServiceMonitor"):
        assert matches(monitor["spec"]["selector"]["matchLabels"], the(manifests, "Service")["metadata"]["labels"])


def test_users_labels_cannot_take_the_selectors_place(render: Render) -> None:
    manifests = render("podLabels.app\\.kubernetes\\.io/name=mine")
    deployment = the(manifests, "Deployment")["spec"]
    assert matches(deployment["selector"]["matchLabels"], deployment["template"]["metadata"]["labels"])


def test_a_network_policy_that_names_its_clients_lets_the_test_pod_in(render: Render) -> None:
    manifests = render(values=[CHART / "ci/everything-values.yaml"])
    (rule,) = the(manifests, "NetworkPolicy")["spec"]["ingress"]
    peers = [each["podSelector"]["matchLabels"] for each in rule["from"] if "podSelector" in each]
    assert any(matches(each, the(manifests, "Pod")["metadata"]["labels"]) for each in peers)
    assert len(rule["from"]) == 2


def test_a_pod_is_scraped_in_one_way_only(render: Render) -> None:
    def annotations(*settings: str) -> Manifest:
        found: Manifest = the(render(*settings), "Deployment")["spec"]["template"]["metadata"]["annotations"]
        return found

    assert annotations()["prometheus.io/scrape"] == "true"
    assert "prometheus.io/scrape" not in annotations("monitoring.serviceMonitor.enabled=true")


def test_the_engines_monitor_finds_what_the_operator_renders(render: Render) -> None:
    from octavo_operator.children import selector_labels
    from octavo_operator.observe import NODE_TYPE_LABEL, Key

    monitor = the(render("monitoring.podMonitor.enabled=true"), "PodMonitor")["spec"]
    labels = selector_labels(Key("default", "llama"))
    assert matches(monitor["selector"]["matchLabels"], labels)
    assert [each["key"] for each in monitor["selector"]["matchExpressions"]] == ["octavo.dev/inference-service"]
    assert (
        set(monitor["podTargetLabels"])
        == {"octavo.dev/inference-service", NODE_TYPE_LABEL}
        <= {*labels, NODE_TYPE_LABEL}
    )


@pytest.fixture
def server() -> Iterator[tuple[str, Callable[[int], None]]]:
    """An HTTP server: its address, and a way to say which status it answers with."""
    status = [200]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status[0])
            self.end_headers()
            self.wfile.write(b"the first lists are not complete\n")

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", lambda code: status.__setitem__(0, code)
        running.shutdown()


@pytest.mark.parametrize(("status", "is_fine"), [(200, True), (503, False)])
def test_the_test_pods_command_ends_as_the_readiness_says(
    render: Render, server: tuple[str, Callable[[int], None]], status: int, is_fine: bool
) -> None:
    address, answer_with = server
    answer_with(status)
    command = the(render(), "Pod")["spec"]["containers"][0]["command"]
    program, *arguments = [each.replace("http://octavo-operator.octavo-system.svc:8080", address) for each in command]
    assert program == "python"
    assert arguments[-1] == f"{address}/readyz"
    run = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    assert (run.returncode == 0) == is_fine, run.stderr
    assert ("503" in run.stderr) != is_fine


def test_a_private_authority_reaches_the_operator(render: Render) -> None:
    pod = operator_pod(render(values=[CHART / "ci/everything-values.yaml"]))
    (container,) = pod["containers"]
    mounts = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
    variables = {each["name"]: each.get("value", "") for each in container["env"]}
    assert {each["name"] for each in pod["volumes"]} == set(mounts)
    assert variables["REQUESTS_CA_BUNDLE"].startswith(mounts["authority"])


def test_nodes_from_a_file_are_what_the_operator_reads(
    render: Render, call_helm: Callable[..., str], tmp_path: Path
) -> None:
    from octavo_operator.documents import NodeFile

    text = call_helm(
        "template", "octavo", str(CHART), "--kube-version=1.34", f"--set-file=nodes={ROOT / 'examples/nodes.yaml'}"
    )
    manifests = [each for each in yaml.safe_load_all(text) if each]
    (config_map,) = of_kind(manifests, "ConfigMap")
    (file,) = config_map["data"]
    (tmp_path / file).write_text(config_map["data"][file])
    found, _ = NodeFile(tmp_path / file).list()
    assert [each["metadata"]["name"] for each in found] == ["laptop", "edge", "hopper", "grace"]
    pod = operator_pod(manifests)
    (volume,) = [each for each in pod["volumes"] if "configMap" in each]
    assert volume["configMap"]["name"] == config_map["metadata"]["name"]
    (mount,) = [each for each in pod["containers"][0]["volumeMounts"] if each["name"] == volume["name"]]
    assert f"--nodes={mount['mountPath']}/{file}" in pod["containers"][0]["args"]
    assert not of_kind(render(), "ConfigMap")
