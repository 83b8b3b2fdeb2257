"""The controller of LeaderWorkerSets on a test's control plane: the real one, with its CRD and its webhooks."""

import base64
import contextlib
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import binaries
import yaml
from api_objects import ApiObjects, eventually
from certificates import CertificateAuthority, write_private
from control_plane import ControlPlane
from guard import Guard
from kubectl import Kubectl, KubectlError

CRD_NAME = "leaderworkersets.leaderworkerset.x-k8s.io"
_START_S = 30.0


class LeaderWorkerSets:
    """`install` and `uninstall` them, each once. Pods of other owners do not pass their webhook."""

    def __init__(self, plane: ControlPlane, objects: ApiObjects) -> None:
        self._plane = plane
        self._objects = objects
        self._kubectl = Kubectl(plane.kubectl, plane.kubeconfig)
        self._folder = plane.state / "lws"
        self._port = _free_port()
        self._webhooks: list[dict[str, Any]] = []
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        return self._folder / "log"

    def install(self) -> None:
        """Return once what is applied is taken."""
        built = binaries.lws_folder()
        self._folder.mkdir(exist_ok=True)
        authority = CertificateAuthority(self._plane.state / "certificates")
        pair = authority.server(dns_names=["localhost"], addresses=["127.0.0.1"])
        (self._folder / "tls.crt").write_bytes(pair.certificate)
        write_private(self._folder / "tls.key", pair.key)
        self._kubectl("apply", "--server-side", "-f", str(built / "leaderworkerset.x-k8s.io_leaderworkersets.yaml"))
        eventually(lambda: self._objects.is_established(CRD_NAME), "the CRD is established")
        self._start(built / "lws")
        self._webhooks = [
            self._on_loopback(each, base64.b64encode(authority.certificate).decode())
            for each in yaml.safe_load_all((built / "manifests.yaml").read_text())
        ]
        for each in self._webhooks:
            self._objects.apply(each)

    def uninstall(self) -> None:
        """Take everything away that is there; once more does nothing."""
        if self._process is None:
            return
        for each in self._webhooks:
            self._objects.delete(each["kind"], each["metadata"]["name"])
        with contextlib.suppress(KubectlError):
            self._kubectl("delete", f"crd/{CRD_NAME}", "--timeout=30s")
        self._process.kill()
        self._process.wait()
        self._guard.close()
        self._process = None

    def _start(self, program: Path) -> None:
        configuration = {
            "apiVersion": "config.lws.x-k8s.io/v1alpha1",
            "kind": "Configuration",
            "internalCertManagement": {"enable": False},
            "leaderElection": {"leaderElect": False},
            "webhook": {"host": "127.0.0.1", "port": self._port, "certDir": str(self._folder)},
            "metrics": {"bindAddress": "0"},
            "health": {"healthProbeBindAddress": "0"},
        }
        file = self._folder / "configuration.yaml"
        file.write_text(yaml.safe_dump(configuration))
        command = [str(program), f"--config={file}", f"--kubeconfig={self._plane.kubeconfig}"]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        self._guard = Guard()
        self._guard.watch(self._process.pid)
        deadline = time.monotonic() + _START_S
        while not _is_open(self._port):
            assert self._process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def _on_loopback(self, configuration: dict[str, Any], authority: str) -> dict[str, Any]:
        """The webhooks as the controller's own manifests have them, but reached by address: there is no DNS."""
        for each in configuration["webhooks"]:
            path = each["clientConfig"]["service"]["path"]
            each["clientConfig"] = {"url": f"https://127.0.0.1:{self._port}{path}", "caBundle": authority}
            if "pods" in each["rules"][0]["resources"]:
                in_sets = {"key": "leaderworkerset.sigs.k8s.io/name", "operator": "Exists"}
                each["objectSelector"] = {"matchExpressions": [in_sets]}
        configuration["metadata"]["name"] = f"lws-{configuration['kind'].lower()}"
        return configuration


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _is_open(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False
