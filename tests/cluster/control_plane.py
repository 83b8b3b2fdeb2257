"""A real Kubernetes control plane on loopback: etcd, kube-apiserver, kube-controller-manager, kube-scheduler.

Each program is a process of its own with a log in the state folder. Ports are free ones, certificates come from
an authority of its own, authorisation is Node and RBAC as on any cluster. There are no nodes until somebody
registers one (see process_node.py), and no kube-proxy or DNS at all.
"""

import contextlib
import http.client
import json
import logging
import os
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

import binaries
from certificates import CertificateAuthority, new_private_key, write_private
from guard import Guard

logger = logging.getLogger(__name__)

_PORTS = ("apiserver", "etcd", "etcd-peer")
_SERVICE_RANGE = "10.96.0.0/16"
# Every Service network's first address belongs to the API server itself.
_SERVICE_ADDRESS = "10.96.0.1"
_SERVER_NAMES = ["localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"]
# A single-user API server on loopback: the default throttles of its own controllers only cost time.
_CLIENT_RATE = ("--kube-api-qps=500", "--kube-api-burst=1000")


_AUDIT_POLICY = """
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
- {level: Metadata, verbs: [create, update, patch, delete, deletecollection]}
- {level: None}
"""


class ControlPlaneError(RuntimeError):
    """The control plane did not start, or one of its programs ended; the message has the end of its log."""


class ControlPlane:
    """Starts, restarts and stops the four programs.

    `state` is a folder to keep (and to take up again: same certificates, data and, where still free, ports);
    without one, everything lives in a temporary folder that `stop` removes. With `audits_writes` the API server writes
    a JSON line to `audit_log` for every request that changes something.
    """

    def __init__(
        self, state: Path | None = None, programs: binaries.Binaries | None = None, *, audits_writes: bool = False
    ) -> None:
        self._is_temporary = state is None
        self.state = state.resolve() if state else Path(tempfile.mkdtemp(prefix="octavo-cluster-"))
        self._programs = programs
        self._audits_writes = audits_writes
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._ports: dict[str, int] = {}
        self._guard: Guard | None = None

    @property
    def server(self) -> str:
        return f"https://127.0.0.1:{self._ports['apiserver']}"

    @property
    def kubeconfig(self) -> Path:
        """The administrator's kubeconfig (group system:masters)."""
        return self.state / "kubeconfig"

    @property
    def audit_log(self) -> Path:
        """Of the requests that change something, if they are audited."""
        return self.state / "audit.log"

    @property
    def kubectl(self) -> Path:
        return self.programs.kubectl

    @property
    def programs(self) -> binaries.Binaries:
        if self._programs is None:
            self._programs = binaries.control_plane_binaries()
        return self._programs

    def start(self, timeout_s: float = 60.0) -> None:
        """Build what is missing, start everything, return once the API is ready to take Pods.

        Raises BuildError, or ControlPlaneError if a program ends or is not ready in `timeout_s` seconds.
        """
        started = time.monotonic()
        _ = self.programs
        self.state.mkdir(parents=True, exist_ok=True)
        self._ports = _free_ports(self.state / "ports.json")
        self._authority = CertificateAuthority(self.state / "certificates")
        self._write_identities()
        self._guard = Guard()
        try:
            deadline = time.monotonic() + timeout_s
            self.start_component("etcd")
            self.start_component("kube-apiserver")
            self._wait(lambda: self._get("/readyz") is not None, "the API server is not ready", deadline)
            self.start_component("kube-controller-manager")
            self.start_component("kube-scheduler")
            # Admission refuses Pods until the controller manager has made their service account.
            account = "/api/v1/namespaces/default/serviceaccounts/default"
            self._wait(lambda: self._get(account) is not None, "there is no default service account", deadline)
        except BaseException:
            self.stop()
            raise
        logger.info("control plane ready after %.1f s at %s", time.monotonic() - started, self.server)

    def stop(self) -> None:
        """Stop what runs, the last started first; remove the state folder if it is a temporary one."""
        for name in reversed(list(self._processes)):
            self.stop_component(name)
        if self._guard is not None:
            self._guard.close()
            self._guard = None
        if self._is_temporary:
            shutil.rmtree(self.state, ignore_errors=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start_component(self, name: str) -> None:
        """Start one program by its name, e.g. after `stop_component`; does not wait until it is ready."""
        assert self._guard is not None
        command = [str(self.programs.component(name)), *self._arguments(name)]
        with (self.state / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.state, start_new_session=True
            )
        self._guard.watch(process.pid)
        self._processes[name] = process

    def stop_component(self, name: str, timeout_s: float = 5.0) -> None:
        process = self._processes.pop(name)
        # The API server waits for its open watches before it ends; tests have nobody left to be polite to.
        process.send_signal(signal.SIGKILL if name == "kube-apiserver" else signal.SIGTERM)
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if self._guard is not None:
            self._guard.forget(process.pid)

    def wait_until_ready(self, timeout_s: float = 30.0) -> None:
        """Return once /readyz answers, e.g. after the API server was started again."""
        deadline = time.monotonic() + timeout_s
        self._wait(lambda: self._get("/readyz") is not None, "the API server is not ready", deadline)

    def user_kubeconfig(self, user: str, *groups: str) -> Path:
        """Write (once) and return a kubeconfig for a user that a certificate of our authority names."""
        path = self.state / "users" / f"{user.replace(':', '_')}.kubeconfig"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            write_private(path, self._authority.kubeconfig(self.server, user, *groups))
        return path

    def node_kubeconfig(self, node: str) -> Path:
        """A kubeconfig with exactly the rights that a kubelet has on the node of this name."""
        return self.user_kubeconfig(f"system:node:{node}", "system:nodes")

    def _write_identities(self) -> None:
        """Certificates and kubeconfigs; rewritten at each start because ports may differ from the last one's."""
        folder = self.state / "certificates"
        self._authority.server(
            dns_names=_SERVER_NAMES, addresses=["127.0.0.1", _SERVICE_ADDRESS]
        ).write(folder, "apiserver")  # fmt: skip
        if not (folder / "service-accounts.key").exists():
            write_private(folder / "service-accounts.key", new_private_key())
        shutil.rmtree(self.state / "users", ignore_errors=True)
        write_private(self.kubeconfig, self._authority.kubeconfig(self.server, "admin", "system:masters"))
        self._login = self._authority.client("control-plane-check", "system:masters")
        self._login.write(folder, "check")

    def _audit_arguments(self) -> list[str]:
        if not self._audits_writes:
            return []
        policy = self.state / "audit-policy.yaml"
        policy.write_text(_AUDIT_POLICY)
        return [f"--audit-policy-file={policy}", f"--audit-log-path={self.audit_log}"]

    def _arguments(self, name: str) -> list[str]:
        certificates = self.state / "certificates"
        etcd, peer = (f"http://127.0.0.1:{self._ports[port]}" for port in ("etcd", "etcd-peer"))
        service_accounts = certificates / "service-accounts.key"
        if name == "etcd":
            return [
                f"--data-dir={self.state / 'etcd'}",
                f"--listen-client-urls={etcd}",
                f"--advertise-client-urls={etcd}",
                f"--listen-peer-urls={peer}",
                f"--initial-advertise-peer-urls={peer}",
                f"--initial-cluster=default={peer}",
                # Data need not survive a power cut, and disks of test machines are slow.
                "--unsafe-no-fsync",
                "--log-level=warn",
            ]
        if name == "kube-apiserver":
            return [
                f"--etcd-servers={etcd}",
                f"--secure-port={self._ports['apiserver']}",
                "--bind-address=127.0.0.1",
                "--advertise-address=127.0.0.1",
                # Endpoints must not be loopback addresses, so nobody may publish ours.
                "--endpoint-reconciler-type=none",
                f"--tls-cert-file={certificates / 'apiserver.crt'}",
                f"--tls-private-key-file={certificates / 'apiserver.key'}",
                f"--client-ca-file={certificates / 'ca.crt'}",
                "--authorization-mode=Node,RBAC",
                "--enable-admission-plugins=NodeRestriction",
                "--allow-privileged",
                "--service-account-issuer=https://kubernetes.default.svc",
                f"--service-account-signing-key-file={service_accounts}",
                f"--service-account-key-file={service_accounts}",
                f"--service-cluster-ip-range={_SERVICE_RANGE}",
                "--profiling=false",
                *self._audit_arguments(),
            ]
        if name == "kube-controller-manager":
            return [
                f"--kubeconfig={self.user_kubeconfig('system:kube-controller-manager')}",
                f"--service-account-private-key-file={service_accounts}",
                f"--root-ca-file={certificates / 'ca.crt'}",
                "--use-service-account-credentials",
                "--leader-elect=false",
                "--bind-address=127.0.0.1",
                "--secure-port=0",
                "--profiling=false",
                *_CLIENT_RATE,
            ]
        return [
            f"--kubeconfig={self.user_kubeconfig('system:kube-scheduler')}",
            "--leader-elect=false",
            "--bind-address=127.0.0.1",
            "--secure-port=0",
            "--profiling=false",
            *_CLIENT_RATE,
        ]

    def _wait(self, is_done: Callable[[], bool], what: str, deadline: float) -> None:
        while not is_done():
            for name, process in self._processes.items():
                if process.poll() is not None:
                    raise ControlPlaneError(f"{name} ended with {process.returncode}:\n{self._log_tail(name)}")
            if time.monotonic() > deadline:
                raise ControlPlaneError(f"{what}; its log ends with:\n{self._log_tail(list(self._processes)[-1])}")
            time.sleep(0.05)

    def _get(self, path: str) -> bytes | None:
        """The body of one GET as administrator; None if there is no answer, or another one than 200."""
        folder = self.state / "certificates"
        context = ssl.create_default_context(cafile=self._authority.certificate_path)
        context.load_cert_chain(folder / "check.crt", folder / "check.key")
        with contextlib.closing(
            http.client.HTTPSConnection("127.0.0.1", self._ports["apiserver"], context=context, timeout=5)
        ) as connection:
            try:
                connection.request("GET", path)
                response = connection.getresponse()
                body = response.read()
            except (OSError, http.client.HTTPException):
                return None
        return body if response.status == http.HTTPStatus.OK else None

    def _log_tail(self, name: str) -> str:
        return (self.state / f"{name}.log").read_text(errors="replace")[-3000:]


def _free_ports(path: Path) -> dict[str, int]:
    """Ports nobody listens on. Those that an earlier run wrote to `path` are taken again while they are free."""
    if path.exists():
        ports: dict[str, int] = json.loads(path.read_text())
        if all(_is_free(port) for port in ports.values()):
            return ports
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in _PORTS]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        ports = {name: one.getsockname()[1] for name, one in zip(_PORTS, sockets, strict=True)}
    path.write_text(json.dumps(ports))
    return ports


def _is_free(port: int) -> bool:
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def process_ids_of(state: Path) -> list[int]:
    """Processes whose command line names `state`: what a test asserts to be gone after `stop`."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if str(state).encode() in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return found
