"""The process node does what a kubelet would: each feature with a small real process."""

import contextlib
import os
import sys
import textwrap
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from addresses import reachable_address
from api_objects import ApiObjects, eventually
from control_plane import ControlPlane
from kubectl import Kubectl
from plugin import PROCESS_NODE, Forwarding, HollowNodes

Manifest = dict[str, Any]

# Answers with the status that the file `answer` in its folder says, 200 without one.
SERVER = """
import http.server, os, pathlib, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        answer = pathlib.Path("answer")
        self.send_response(int(answer.read_text()) if answer.exists() else 200)
        self.end_headers()
        self.wfile.write(os.environ["HOSTNAME"].encode())
    def log_message(self, *_): pass
http.server.ThreadingHTTPServer((os.environ["OCTAVO_HOST"], 8000), Handler).serve_forever()
"""


@pytest.fixture
def node_objects(cluster: ControlPlane, objects: ApiObjects) -> ApiObjects:
    """The API, once there is a process node behind it."""
    assert cluster.server
    return objects


@pytest.fixture
def pods(node_objects: ApiObjects, namespace: str, cluster: ControlPlane) -> "Pods":
    return Pods(node_objects, namespace, cluster.state / "pods")


class Pods:
    """Pods of one test, all on the process node."""

    def __init__(self, objects: ApiObjects, namespace: str, folder: Path) -> None:
        self.objects = objects
        self.namespace = namespace
        self._folder = folder

    def start(self, name: str, container: Manifest, metadata: Manifest | None = None, **spec: Any) -> None:
        main = {"name": "main", "image": "none"} | container
        self.objects.apply({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": self.namespace} | (metadata or {}),
            "spec": {
                "containers": [main],
                "nodeSelector": {"kubernetes.io/hostname": PROCESS_NODE},
                "terminationGracePeriodSeconds": 5,
            } | spec,
        })  # fmt: skip

    def delete(self, name: str, grace_s: int | None = None) -> None:
        self.objects.delete("Pod", name, self.namespace, grace_s)

    def get(self, name: str) -> Manifest | None:
        return self.objects.get("Pod", name, self.namespace)

    def folder(self, name: str) -> Path:
        return self._folder / f"{self.namespace}_{name}"

    def log(self, name: str, container: str = "main") -> str:
        path = self.folder(name) / f"{container}.log"
        return path.read_text() if path.exists() else ""

    def wait(self, name: str, is_so: Callable[[Manifest], object], what: str, timeout_s: float = 20) -> Manifest:
        def probe() -> Manifest | None:
            pod = self.get(name)
            return pod if pod is not None and pod.get("status") and is_so(pod) else None

        try:
            return eventually(probe, what, timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.get(name)}\n{self.log(name)}") from None

    def wait_gone(self, name: str, timeout_s: float = 20) -> None:
        eventually(lambda: self.get(name) is None, f"pod {name} is gone", timeout_s)

    def answer(self, name: str, status: int) -> None:
        """What the SERVER of this pod says from now on."""
        (self.folder(name) / "main" / "answer").write_text(str(status))


def python(code: str, *arguments: str) -> Manifest:
    return {"command": ["python", "-u", "-c", textwrap.dedent(code), *arguments]}


def main_status(pod: Manifest) -> Manifest:
    statuses = pod["status"].get("containerStatuses") or [{}]
    found: Manifest = statuses[0]
    return found


def is_ready(pod: Manifest) -> bool:
    return any(one["type"] == "Ready" and one["status"] == "True" for one in pod["status"].get("conditions", ()))


def is_running(pod: Manifest) -> bool:
    return "running" in main_status(pod).get("state", {})


def is_done(pod: Manifest) -> bool:
    return pod["status"].get("phase") in {"Succeeded", "Failed"}


def process_id(pod: Manifest) -> int:
    return int(main_status(pod)["containerID"].removeprefix("process://"))


def is_alive(process: int) -> bool:
    return Path(f"/proc/{process}").exists()


def test_registers_a_ready_node_with_the_capacity_of_the_machine(node_objects: ApiObjects) -> None:
    node = node_objects.get("Node", PROCESS_NODE)
    assert node is not None
    assert node["metadata"]["labels"]["kubernetes.io/hostname"] == PROCESS_NODE
    assert node["status"]["capacity"]["cpu"] == str(os.cpu_count())
    assert node_objects.get("Lease", PROCESS_NODE, "kube-node-lease", api="coordination.k8s.io/v1")


def test_expands_variables_and_reads_fields_and_keys(pods: Pods) -> None:
    keys = {"metadata": {"name": "keys", "namespace": pods.namespace}, "apiVersion": "v1"}
    pods.objects.apply(keys | {"kind": "ConfigMap", "data": {"colour": "blue"}})
    pods.objects.apply(keys | {"kind": "Secret", "stringData": {"token": "hush"}})

    def field(path: str) -> Manifest:
        return {"valueFrom": {"fieldRef": {"fieldPath": path}}}

    environment = [
        {"name": "A", "value": "1"},
        {"name": "B", "value": "$(A)2$(MISSING)$$(A)"},
        {"name": "NAME"} | field("metadata.name"),
        {"name": "LABEL"} | field("metadata.labels['tier']"),
        {"name": "NODE"} | field("spec.nodeName"),
        {"name": "COLOUR", "valueFrom": {"configMapKeyRef": {"name": "keys", "key": "colour"}}},
        {"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "keys", "key": "token"}}},
        {"name": "ABSENT", "valueFrom": {"secretKeyRef": {"name": "keys", "key": "no", "optional": True}}},
        {"name": "MEMORY_MIB", "valueFrom": {"resourceFieldRef": {"resource": "limits.memory", "divisor": "1Mi"}}},
    ]
    code = """
        import os, sys
        names = ["A", "B", "NAME", "LABEL", "NODE", "COLOUR", "TOKEN", "ABSENT", "MEMORY_MIB", "all_colour"]
        print(sys.argv[1:], [os.environ.get(name) for name in names])
    """
    container = python(code) | {
        "args": ["$(B)", "$$(A)"],
        "env": environment,
        "envFrom": [{"configMapRef": {"name": "keys"}, "prefix": "all_"}],
        "resources": {"limits": {"memory": "64Mi"}},
    }
    pods.start("env", container, {"labels": {"tier": "gold"}}, restartPolicy="Never")
    pods.wait("env", is_done, "the container ended")
    values = ["1", "12$(MISSING)$(A)", "env", "gold", PROCESS_NODE, "blue", "hush", None, "64", "blue"]
    assert pods.log("env").strip() == f"{['12$(MISSING)$(A)', '$(A)']} {values}"


def test_mounts_volumes_by_rewriting_paths(pods: Pods, tmp_path: Path) -> None:
    (tmp_path / "host.txt").write_text("from the host")
    keys = {"metadata": {"name": "files", "namespace": pods.namespace}, "apiVersion": "v1"}
    pods.objects.apply(keys | {"kind": "ConfigMap", "data": {"a": "first", "b": "second"}})
    pods.objects.apply(keys | {"kind": "Secret", "stringData": {"key": "hush"}})
    code = """
        import os, sys
        for path in [*sys.argv[1:], os.environ["SECRET_FILE"]]:
            print(open(path.removeprefix("--config=")).read())
        open("/scratch/written", "w").write("x")
        print(os.listdir("/scratch"), os.path.basename(os.getcwd()))
    """
    volumes = [
        {"name": "config", "configMap": {"name": "files", "items": [{"key": "a", "path": "deep/a.yaml"}]}},
        {"name": "secret", "secret": {"secretName": "files", "defaultMode": 0o400}},
        {"name": "scratch", "emptyDir": {}},
        {"name": "host", "hostPath": {"path": str(tmp_path), "type": "Directory"}},
    ]
    mounts = [
        {"name": "config", "mountPath": "/etc/octavo"},
        {"name": "secret", "mountPath": "/etc/octavo-secret"},
        {"name": "scratch", "mountPath": "/scratch"},
        {"name": "host", "mountPath": "/from/host"},
    ]
    container = python(code, "--config=/etc/octavo/deep/a.yaml", "/from/host/host.txt") | {
        "env": [{"name": "SECRET_FILE", "value": "/etc/octavo-secret/key"}],
        "workingDir": "/scratch/work",
        "volumeMounts": mounts,
    }
    pods.start("volumes", container, volumes=volumes, restartPolicy="Never")
    pods.wait("volumes", is_done, "the container ended")
    lines = pods.log("volumes").splitlines()
    assert lines[:3] == ["first", "from the host", "hush"]
    assert "written" in lines[3]
    assert lines[3].endswith("work")


def test_waits_for_what_a_container_refers_to(pods: Pods) -> None:
    variable = {"name": "X", "valueFrom": {"configMapKeyRef": {"name": "late", "key": "x"}}}
    pods.start("waiting", python("print('started')") | {"env": [variable]}, restartPolicy="Never")

    def reason(pod: Manifest) -> bool:
        waiting = main_status(pod).get("state", {}).get("waiting", {})
        return bool(waiting.get("reason") == "CreateContainerConfigError" and "late" in waiting["message"])

    pods.wait("waiting", reason, "the status names what is missing")
    pods.objects.apply({
        "apiVersion": "v1", "kind": "ConfigMap",
        "metadata": {"name": "late", "namespace": pods.namespace}, "data": {"x": "1"},
    })  # fmt: skip
    pods.wait("waiting", lambda pod: pod["status"]["phase"] == "Succeeded", "it runs once that is there")


def test_pod_reaches_the_api_server_with_its_own_service_account(pods: Pods) -> None:
    code = """
        from kubernetes import client, config
        config.load_kube_config()
        print(client.AuthenticationV1Api().create_self_subject_review({}).status.user_info.username)
    """
    pods.start("account", python(code), restartPolicy="Never")
    pods.wait("account", lambda pod: pod["status"]["phase"] == "Succeeded", "it was let in")
    assert pods.log("account").strip() == f"system:serviceaccount:{pods.namespace}:default"


def test_init_containers_run_in_order_before_the_others(pods: Pods) -> None:
    shared = {"volumeMounts": [{"name": "shared", "mountPath": "/shared"}]}
    inits = [
        {"name": name, "image": "none"} | python(f"open('/shared/order', 'a').write('{name} ')") | shared
        for name in ("first", "second")
    ]
    container = python("print(open('/shared/order').read() + 'main')") | shared
    volumes = [{"name": "shared", "emptyDir": {}}]
    pods.start("init", container, initContainers=inits, volumes=volumes, restartPolicy="Never")
    pods.wait("init", is_done, "all containers ended")
    assert pods.log("init").strip() == "first second main"


def test_readiness_gates_the_pod_and_its_endpoints(pods: Pods, forwarding: Forwarding) -> None:
    probe = {"httpGet": {"path": "/", "port": "http"}, "periodSeconds": 1, "failureThreshold": 1}
    ports = [{"name": "http", "containerPort": 8000}]
    for name in ("one", "two"):
        container = python(SERVER) | {"readinessProbe": probe, "ports": ports}
        pods.start(name, container, {"labels": {"app": "web"}})
    pods.objects.apply({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": pods.namespace},
        "spec": {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": "http"}]},
    })  # fmt: skip
    for name in ("one", "two"):
        pods.wait(name, is_ready, "the server answers its probe")

    def endpoints() -> set[str]:
        label = "kubernetes.io/service-name=web"
        slices = pods.objects.list("EndpointSlice", pods.namespace, label, api="discovery.k8s.io/v1")
        found = [one for part in slices for one in part.get("endpoints") or ()]
        return {one["targetRef"]["name"] for one in found if one["conditions"]["ready"]}

    eventually(lambda: endpoints() == {"one", "two"}, "both pods are endpoints")
    forward = forwarding("web", pods.namespace)

    def served_by() -> set[str]:
        answers = set()
        for _ in range(4):
            with contextlib.suppress(urllib.error.URLError), urllib.request.urlopen(forward.url, timeout=5) as answer:
                answers.add(answer.read().decode())
        return answers

    assert served_by() == {"one", "two"}
    pods.answer("one", 503)
    pods.wait("one", lambda pod: not is_ready(pod), "a failing probe takes readiness away")
    eventually(lambda: endpoints() == {"two"}, "only the ready pod is an endpoint")
    eventually(lambda: served_by() == {"two"}, "only the ready pod is served from")
    pods.answer("one", 200)
    pods.wait("one", is_ready, "a passing probe gives it back")


def test_pods_listen_on_addresses_of_their_own(pods: Pods) -> None:
    for name in ("first", "second"):
        pods.start(name, python(SERVER) | {"readinessProbe": {"tcpSocket": {"port": 8000}, "periodSeconds": 1}})
    found = [pods.wait(name, is_ready, "it listens")["status"]["podIP"] for name in ("first", "second")]
    assert len(set(found)) == 2
    for name, address in zip(("first", "second"), found, strict=True):
        with urllib.request.urlopen(f"http://{reachable_address(address)}:8000", timeout=5) as answer:
            assert answer.read().decode() == name


def test_failing_liveness_restarts_the_container(pods: Pods) -> None:
    probe = {"httpGet": {"path": "/", "port": 8000}, "periodSeconds": 1, "failureThreshold": 1}
    # The startup probe holds the liveness probe back until the server is up.
    startup = probe | {"failureThreshold": 30}
    pods.start("liveness", python(SERVER) | {"livenessProbe": probe, "startupProbe": startup})
    first = process_id(pods.wait("liveness", lambda pod: main_status(pod).get("started"), "it has started"))
    pods.answer("liveness", 500)
    killed = pods.wait("liveness", lambda pod: main_status(pod).get("restartCount") == 1, "it is restarted")
    assert main_status(killed)["lastState"]["terminated"]["exitCode"] == 143
    assert not is_alive(first)
    pods.answer("liveness", 200)
    pods.wait("liveness", is_ready, "it is well again")


def test_failing_startup_probe_restarts_the_container(pods: Pods) -> None:
    startup = {"exec": {"command": ["sh", "-c", "exit 3"]}, "periodSeconds": 1, "failureThreshold": 1}
    pods.start("startup", python("import time; time.sleep(60)") | {"startupProbe": startup})
    pod = pods.wait("startup", lambda pod: main_status(pod).get("restartCount", 0) >= 1, "it is restarted")
    assert not is_ready(pod)


def test_crash_loop_backs_off_and_reports_the_last_exit(pods: Pods) -> None:
    code = "import sys; print('out of luck'); sys.exit(7)"
    pods.start("crash", python(code) | {"terminationMessagePolicy": "FallbackToLogsOnError"})

    def backs_off(pod: Manifest) -> bool:
        reason = main_status(pod).get("state", {}).get("waiting", {}).get("reason")
        return bool(reason == "CrashLoopBackOff" and main_status(pod)["restartCount"] >= 2)

    pod = pods.wait("crash", backs_off, "it backs off")
    last = main_status(pod)["lastState"]["terminated"]
    assert (last["exitCode"], last["reason"], last["message"]) == (7, "Error", "out of luck\n")
    assert pod["status"]["phase"] == "Running"


def test_a_command_that_cannot_start_is_reported(pods: Pods) -> None:
    pods.start("absent", {"command": ["/no/such/program"]}, restartPolicy="Never")
    terminated = main_status(pods.wait("absent", is_done, "it failed"))["state"]["terminated"]
    assert (terminated["exitCode"], terminated["reason"]) == (128, "StartError")
    assert "/no/such/program" in terminated["message"]


@pytest.mark.parametrize(
    ("policy", "exit_code", "phase"),
    [("Never", 0, "Succeeded"), ("Never", 3, "Failed"), ("OnFailure", 0, "Succeeded")],
)
def test_restart_policy_decides_the_phase(pods: Pods, policy: str, exit_code: int, phase: str) -> None:
    pods.start("policy", python(f"import sys; sys.exit({exit_code})"), restartPolicy=policy)
    pod = pods.wait("policy", is_done, "it ended")
    assert pod["status"]["phase"] == phase
    assert main_status(pod)["state"]["terminated"]["exitCode"] == exit_code
    assert main_status(pod)["restartCount"] == 0


def test_reports_the_termination_message_file(pods: Pods) -> None:
    code = "import sys; open(sys.argv[1], 'w').write('KV cache too small')"
    pods.start("message", python(code, "/dev/termination-log"), restartPolicy="Never")
    pod = pods.wait("message", is_done, "it ended")
    assert main_status(pod)["state"]["terminated"]["message"] == "KV cache too small"


GRACEFUL = """
import signal, sys, time
def stop(*_):
    print("draining")
    time.sleep(0.3)
    print("drained")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
print("up")
while True: time.sleep(0.1)
"""


def test_deletion_runs_the_hook_and_lets_the_process_drain(pods: Pods) -> None:
    hook = {"preStop": {"exec": {"command": ["sh", "-c", "echo hook > /trace/hook"]}}}
    mounts = [{"name": "trace", "mountPath": "/trace"}]
    trace = pods.folder("graceful").with_name(f"{pods.namespace}_trace")
    volumes = [{"name": "trace", "hostPath": {"path": str(trace), "type": "DirectoryOrCreate"}}]
    pods.start("graceful", python(GRACEFUL) | {"lifecycle": hook, "volumeMounts": mounts}, volumes=volumes)
    pod = pods.wait("graceful", is_running, "it runs")
    eventually(lambda: "up" in pods.log("graceful"), "it listens for SIGTERM")
    pods.delete("graceful")
    pods.wait_gone("graceful")
    assert (trace / "hook").read_text() == "hook\n"
    assert pods.log("graceful").split() == ["up", "draining", "drained"]
    assert not is_alive(process_id(pod))


def test_a_process_that_ignores_sigterm_is_killed_after_its_grace(pods: Pods) -> None:
    # The child outlives its parent unless the whole group is killed.
    code = """
        import signal, subprocess, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print(subprocess.Popen(["sleep", "600"]).pid)
        time.sleep(600)
    """
    pods.start("stubborn", python(code), terminationGracePeriodSeconds=1)
    pod = pods.wait("stubborn", is_running, "it runs")
    child = int(eventually(lambda: pods.log("stubborn").strip(), "it has a child"))
    pods.delete("stubborn")
    assert is_alive(process_id(pod))
    pods.wait_gone("stubborn")
    assert not is_alive(process_id(pod))
    eventually(lambda: not is_alive(child), "the child is gone")


def test_forced_deletion_leaves_no_process(pods: Pods) -> None:
    pods.start("forced", python("import time; time.sleep(600)"))
    pod = pods.wait("forced", is_running, "it runs")
    pods.delete("forced", grace_s=0)
    pods.wait_gone("forced")
    eventually(lambda: not is_alive(process_id(pod)), "its process is gone")


def test_pods_survive_a_restart_of_the_api_server(pods: Pods, cluster: ControlPlane) -> None:
    pods.start("survivor", python("import time; time.sleep(600)"))
    before = process_id(pods.wait("survivor", is_ready, "it runs"))
    cluster.stop_component("kube-apiserver")
    cluster.start_component("kube-apiserver")
    cluster.wait_until_ready()
    assert is_alive(before)
    pods.start("newcomer", python("import time; time.sleep(600)"))
    pods.wait("newcomer", is_ready, "the node takes pods again", 40)
    assert process_id(pods.wait("survivor", is_ready, "it still runs")) == before


def test_hollow_nodes_carry_200_pods_of_made_up_hardware(
    objects: ApiObjects, namespace: str, hollow_nodes: HollowNodes, kubectl: Kubectl
) -> None:
    product = {"nvidia.com/gpu.product": "NVIDIA-H200"}
    names = hollow_nodes(25, labels=product, capacity={"nvidia.com/gpu": "8"})
    labels = {"app": "many"}
    container = {"name": "main", "image": "none", "resources": {"limits": {"nvidia.com/gpu": "1"}}}
    spec = {"containers": [container], "nodeSelector": product}
    objects.apply({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "many", "namespace": namespace},
        "spec": {
            "replicas": 200,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": spec},
        },
    })  # fmt: skip

    def num_ready() -> int:
        found = objects.get("Deployment", "many", namespace) or {}
        return int(found.get("status", {}).get("readyReplicas") or 0)

    eventually(lambda: num_ready() == 200, "200 pods are ready", 60)
    on_nodes = kubectl("get", "pods", "-n", namespace, "-o", "jsonpath={.items[*].spec.nodeName}").split()
    assert {name: on_nodes.count(name) for name in names} == dict.fromkeys(names, 8)
    objects.delete("Deployment", "many", namespace)
    eventually(lambda: not objects.list("Pod", namespace), "all pods are gone", 60)


def test_python_of_the_tests_comes_first_on_the_path_of_a_container(pods: Pods) -> None:
    pods.start("path", python("import sys; print(sys.prefix)"), restartPolicy="Never")
    pods.wait("path", is_done, "it ended")
    assert pods.log("path").strip() == sys.prefix
