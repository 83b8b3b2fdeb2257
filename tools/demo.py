"""The demo: deploy a real model to a real Kubernetes API with `kubectl apply`, chat with it, and clean up.

Without options everything runs here: a control plane on loopback whose pods are local processes (tests/cluster), and
the operator as a process. With --current-cluster the Helm chart is installed into the cluster of your kubeconfig.
"""

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Protocol

ROOT = Path(__file__).resolve().parents[1]
STATE = ROOT / ".demo"
EXAMPLE = ROOT / "examples" / "smollm2.yaml"
SERVICE = "smollm2"
SERVICE_PORT = 8000
NAMESPACE = "default"
QUESTION = "What is the capital of France?"
CHART_NAMESPACE = "octavo-system"
CRD = "inferenceservices.octavo.dev"
OWNED = "deployments,replicasets,pods,services,configmaps,serviceaccounts"

sys.path.insert(0, str(ROOT / "tests" / "cluster"))


class DemoError(Exception):
    """The demo cannot go on; the message says why, in a sentence."""


class Cluster(Protocol):
    """A cluster with the operator in it."""

    kubeconfig: Path | None
    kubectl: str

    @contextmanager
    def reach(self, service: str) -> Iterator[str]:
        """The URL under which a Service answers on this machine, while the context is open."""


def main() -> int:
    options = _options()
    signal.signal(signal.SIGTERM, _interrupt)
    started = time.monotonic()
    try:
        with ExitStack() as stack:
            cluster = _current_cluster() if options.current_cluster else _local_cluster(stack)
            kubectl = Kubectl(cluster.kubectl, cluster.kubeconfig)
            _deploy(kubectl)
            with cluster.reach(SERVICE) as url:
                _chat(url)
                if options.keep:
                    _stay(kubectl, url)
            _clean_up(kubectl)
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: stopped", file=sys.stderr)
        return 130
    print(f"\nDone in {time.monotonic() - started:.0f} s.")
    return 0


class Kubectl:
    """Runs kubectl commands, shown as a user would type them."""

    def __init__(self, program: str, kubeconfig: Path | None) -> None:
        self.program = program
        self.environment = {**os.environ, **({"KUBECONFIG": str(kubeconfig)} if kubeconfig else {})}

    def show(self, *arguments: str) -> None:
        """Run a command with its output on the terminal. Raises DemoError if it fails."""
        print(f"\n$ kubectl {shlex.join(arguments)}", flush=True)
        if subprocess.run([self.program, *arguments], env=self.environment, cwd=ROOT, check=False).returncode:
            raise DemoError(f"kubectl {arguments[0]} failed")

    def read(self, *arguments: str) -> str:
        """A command's output. Raises DemoError if it fails."""
        command = [self.program, *arguments]
        result = subprocess.run(command, env=self.environment, cwd=ROOT, capture_output=True, text=True, check=False)
        if result.returncode:
            raise DemoError(f"kubectl {shlex.join(arguments)}: {result.stderr.strip()}")
        return result.stdout.strip()


class LocalCluster:
    """The test cluster, with the operator as a process beside it."""

    def __init__(self, kubeconfig: Path, kubectl: Path) -> None:
        self.kubeconfig = kubeconfig
        self.kubectl = str(kubectl)

    @contextmanager
    def reach(self, service: str) -> Iterator[str]:
        """Through tests/cluster/forward.py, this cluster's stand-in for `kubectl port-forward`."""
        from forward import Forward

        with Forward(service, NAMESPACE, self.kubeconfig) as forward:
            yield forward.url


class CurrentCluster:
    """The cluster of the user's kubeconfig."""

    kubeconfig = None

    def __init__(self, kubectl: str) -> None:
        self.kubectl = kubectl

    @contextmanager
    def reach(self, service: str) -> Iterator[str]:
        """Through `kubectl port-forward`."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = [
            self.kubectl,
            "port-forward",
            f"service/{service}",
            f"{port}:{SERVICE_PORT}",
            "--namespace",
            NAMESPACE,
        ]
        forward = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            _wait_until(lambda: _accepts(port), "kubectl port-forward", timeout_s=20)
            yield f"http://127.0.0.1:{port}"
        finally:
            forward.terminate()
            forward.wait()


def _local_cluster(stack: ExitStack) -> LocalCluster:
    import binaries
    from api_objects import ApiObjects
    from control_plane import ControlPlane, ControlPlaneError
    from process_node import NodeHost, NodeSpec

    print("Starting Kubernetes: etcd, kube-apiserver, kube-controller-manager, kube-scheduler, one node", flush=True)
    started = time.monotonic()
    STATE.mkdir(exist_ok=True)
    try:
        control_plane = stack.enter_context(ControlPlane())
    except (binaries.BuildError, ControlPlaneError) as error:
        raise DemoError(str(error)) from error
    nodes = stack.enter_context(NodeHost(control_plane.node_kubeconfig, control_plane.state))
    nodes.add(NodeSpec("laptop"))
    cluster = LocalCluster(control_plane.kubeconfig, control_plane.kubectl)
    print(f"Kubernetes is up after {time.monotonic() - started:.0f} s")
    kubectl = Kubectl(cluster.kubectl, cluster.kubeconfig)
    kubectl.show("get", "nodes", "--output", "wide")
    kubectl.show("apply", "--server-side", "--filename", "crds/")
    with closing(ApiObjects(cluster.kubeconfig)) as objects:
        _wait_until(lambda: objects.is_established(CRD), "the CustomResourceDefinition", timeout_s=30)
    stack.enter_context(_operator(cluster.kubeconfig))
    return cluster


@contextmanager
def _operator(kubeconfig: Path) -> Iterator[None]:
    log = STATE / "operator.log"
    command = ["octavo", "operator", "--kubeconfig", str(kubeconfig), "--host", "127.0.0.1", "--port", "0"]
    print(f"\n$ {shlex.join(command)} &      # log: {log.relative_to(ROOT)}", flush=True)
    program = Path(sys.executable).with_name("octavo")
    with log.open("w") as output:
        operator = subprocess.Popen([program, *command[1:]], stdout=output, stderr=subprocess.STDOUT)
    try:
        yield
    finally:
        operator.terminate()
        operator.wait(timeout=30)


def _current_cluster() -> CurrentCluster:
    from shutil import which

    from binaries import BuildError, helm_binary

    kubectl = which("kubectl")
    if kubectl is None:
        raise DemoError("there is no kubectl on this machine")
    context = Kubectl(kubectl, None).read("config", "current-context")
    try:
        helm = which("helm") or str(helm_binary())
    except BuildError as error:
        raise DemoError(f"there is no helm on this machine, and it cannot be built: {error}") from error
    command = [helm, "upgrade", "--install", "octavo", "charts/octavo", "--namespace", CHART_NAMESPACE]
    command += ["--create-namespace", "--wait", "--timeout", "5m"]
    print(f"Installing into the cluster {context}\n\n$ helm {shlex.join(command[1:])}", flush=True)
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        raise DemoError("helm could not install the chart")
    return CurrentCluster(kubectl)


def _deploy(kubectl: Kubectl) -> None:
    example = str(EXAMPLE.relative_to(ROOT))
    print(f"\n$ cat {example}\n{EXAMPLE.read_text().rstrip()}")
    kubectl.show("apply", "--namespace", NAMESPACE, "--filename", example)
    kubectl.show(
        "wait", "--namespace", NAMESPACE, "--for=condition=Ready", f"inferenceservice/{SERVICE}", "--timeout=600s"
    )
    kubectl.show("get", "inferenceservices", "--namespace", NAMESPACE)


def _chat(url: str) -> None:
    from openai import OpenAI

    print(f"\n$ python  # OpenAI(base_url='{url}/v1').chat.completions.create(stream=True, ...)")
    print(f"You:     {QUESTION}\nSmolLM2: ", end="", flush=True)
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=5)
    messages = [{"role": "user", "content": QUESTION}]
    answer = ""
    with client.chat.completions.create(
        model=client.models.list().data[0].id, messages=messages, temperature=0, max_tokens=64, stream=True
    ) as stream:
        for chunk in stream:
            text = chunk.choices[0].delta.content or "" if chunk.choices else ""
            print(text, end="", flush=True)
            answer += text
    print()
    if "Paris" not in answer:
        raise DemoError(f"the model's answer makes no sense: {answer!r}")


def _stay(kubectl: Kubectl, url: str) -> None:
    kubeconfig = kubectl.environment.get("KUBECONFIG", "")
    print(
        f"\nIt stays up until Ctrl-C. In another terminal:\n\n"
        f"  export KUBECONFIG={kubeconfig}\n"
        f"  {kubectl.program} get inferenceservices --watch\n"
        f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\\n"
        f'    -d \'{{"model": "{SERVICE}", "messages": [{{"role": "user", "content": "Hello!"}}]}}\'\n'
        f"  curl {url}/metrics\n"
    )
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print()


def _clean_up(kubectl: Kubectl) -> None:
    kubectl.show("delete", "inferenceservice", SERVICE, "--namespace", NAMESPACE)
    selector = ["--namespace", NAMESPACE, "--selector", f"octavo.dev/inference-service={SERVICE}"]
    _wait_until(lambda: not kubectl.read("get", OWNED, *selector, "--output", "name"), "the clean-up", timeout_s=90)
    kubectl.show("get", OWNED, *selector)


def _wait_until(is_done: Callable[[], bool], what: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_done():
        if time.monotonic() > deadline:
            raise DemoError(f"waited {timeout_s:.0f} s for {what} in vain")
        time.sleep(0.5)


def _accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Deploy SmolLM2 to Kubernetes and chat with it.")
    parser.add_argument("--keep", action="store_true", help="stay up until Ctrl-C")
    parser.add_argument("--current-cluster", action="store_true", help="use the cluster of your kubeconfig")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
