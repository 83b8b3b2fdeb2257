"""The Dockerfiles, read: what they copy exists, what they start exists, and nothing ties them to one architecture."""

import fnmatch
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMAGES = ["operator", "engine"]
# Each names one architecture, or a host that serves files for one.
ARCHITECTURES = re.compile(r"amd64|x86[-_]64|arm64|aarch64|https?://", re.IGNORECASE)


@dataclass
class Stage:
    """One FROM and what follows it: (instruction, its text) in order."""

    base: str
    name: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def of(self, instruction: str) -> list[str]:
        return [text for each, text in self.instructions if each == instruction]


def read(image: str) -> list[Stage]:
    text = (ROOT / image / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    stages: list[Stage] = []
    for line in filter(None, map(str.strip, joined.splitlines())):
        instruction, _, rest = line.partition(" ")
        if instruction == "FROM":
            base, _, name = rest.partition(" AS ")
            stages.append(Stage(base, name))
        else:
            stages[-1].instructions.append((instruction, rest.strip()))
    return stages


def copies(stage: Stage) -> list[tuple[str | None, list[str], str]]:
    """(stage that it copies from, sources, destination)"""
    found = []
    for text in stage.of("COPY"):
        words = shlex.split(text)
        origin = next((each.removeprefix("--from=") for each in words if each.startswith("--from=")), None)
        *sources, destination = [each for each in words if not each.startswith("--")]
        found.append((origin, sources, destination))
    return found


def is_sent(source: str) -> bool:
    """Whether the build's context has this path, by .dockerignore: the last pattern that fits decides."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!").removeprefix("**/")
        if fnmatch.fnmatch(source, pattern) or fnmatch.fnmatch(Path(source).name, pattern):
            sent = line.startswith("!")
    return sent


@pytest.mark.parametrize("image", IMAGES)
def test_everything_that_is_copied_exists_and_is_sent(image: str) -> None:
    stages = read(image)
    sources = [source for each in stages for origin, found, _ in copies(each) if origin is None for source in found]
    assert {"pyproject.toml", "constraints.txt", "operator", "engine", "kernels"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source
        assert is_sent(source), source
    assert not is_sent(".venv")
    assert not is_sent("operator/octavo_operator/__pycache__")


@pytest.mark.parametrize("image", IMAGES)
def test_the_wheel_is_built_from_what_is_copied(image: str) -> None:
    """Each package, and each file that pyproject.toml names, is there when the wheel is built."""
    hatch = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {package.split("/")[0] for package in hatch["packages"]}
    needed |= {PROJECT["readme"], *PROJECT["license-files"]}
    copied = {source for stage in read(image) for origin, found, _ in copies(stage) if not origin for source in found}
    assert needed <= copied


@pytest.mark.parametrize("image", IMAGES)
def test_stages_build_on_known_ones_and_the_last_has_no_package_manager(image: str) -> None:
    *earlier, last = read(image)
    known = {each.name for each in earlier}
    for stage in earlier[1:]:
        assert stage.base in known
    assert last.base == "scratch"
    for origin, _, _ in copies(last):
        assert origin in known
    assert not last.of("RUN")
    (root,) = [each for each in earlier if each.name == "root"]
    removed = root.of("RUN")[-1]
    for each in (
        "/usr/bin/apt*",
        "/usr/bin/dpkg*",
        "/usr/lib/apt",
        "/usr/local/bin/pip*",
        "site-packages/*",
        "ensurepip",
    ):
        assert each in removed
    assert "rm -rf" in removed


@pytest.mark.parametrize("image", IMAGES)
def test_dependencies_are_pinned(image: str) -> None:
    installs = [text for stage in read(image) for text in stage.of("RUN") if "pip install" in text]
    (from_project,) = [text for text in installs if "pyproject.toml" in text]
    assert "--constraint constraints.txt" in from_project
    assert f"--extra {image}" in from_project
    assert image in PROJECT["optional-dependencies"]
    for text in installs:
        assert (
            "--constraint" in text or "--no-deps" in text or re.search(r"pip install --no-cache-dir uv==[\d.]+$", text)
        )
    (uv,) = {each for text in installs for each in re.findall(r"uv==[\d.]+", text)}
    assert f"uv={uv}" in (ROOT / "tools/install.sh").read_text()


@pytest.mark.parametrize("image", IMAGES)
def test_nothing_is_of_one_architecture(image: str) -> None:
    for stage in read(image):
        assert "@sha256" not in stage.base
        for _, text in stage.instructions:
            assert not ARCHITECTURES.search(text), text


@pytest.mark.parametrize("image", IMAGES)
def test_the_entry_point_and_its_command_exist(image: str) -> None:
    last = read(image)[-1]
    (program,) = yaml.safe_load(last.of("ENTRYPOINT")[0])
    assert program in PROJECT["scripts"]
    subcommand = yaml.safe_load(last.of("CMD")[0])[0]
    (found,) = entry_points(group="octavo.commands", name=subcommand)
    assert found.load().name == subcommand


def variables(stage: Stage) -> dict[str, str]:
    return dict(each.split("=", 1) for text in stage.of("ENV") for each in shlex.split(text))


@pytest.mark.parametrize("image", IMAGES)
def test_runs_as_a_number_and_writes_only_to_volumes(image: str) -> None:
    last = read(image)[-1]
    (user,) = last.of("USER")
    assert int(user.split(":")[0]) > 10_000
    folders = yaml.safe_load(last.of("VOLUME")[0])
    written = {name: value for name, value in variables(last).items() if name.endswith(("HOME", "_DIR"))}
    assert {"HOME", "HF_HOME"} <= set(written)
    for name, value in written.items():
        assert any(Path(value).is_relative_to(folder) for folder in folders), name
    (root,) = [each for each in read(image) if each.name == "root"]
    assert "--owner=65532 --group=65532 /cache" in root.of("RUN")[-1]
    assert user == "65532:65532"


def test_the_engines_pods_mount_what_its_image_writes_to() -> None:
    """The same folders in the image and in the pods that the operator renders."""
    arguments = ["plan", "-f", "examples/smollm2.yaml", "--nodes", "examples/nodes.yaml", "--manifests"]
    program = Path(sys.executable).with_name("octavo")
    run = subprocess.run([program, *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    deployment = next(each for each in yaml.safe_load_all(run.stdout) if each["kind"] == "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    last = read("engine")[-1]
    assert set(yaml.safe_load(last.of("VOLUME")[0])) <= {each["mountPath"] for each in container["volumeMounts"]}
    own, given = variables(last), {each["name"]: each["value"] for each in container["env"]}
    assert {name: own[name] for name in ("HOME", "HF_HOME")} == {name: given[name] for name in ("HOME", "HF_HOME")}


@pytest.mark.parametrize("image", IMAGES)
def test_is_labelled_with_the_version(image: str) -> None:
    last = read(image)[-1]
    labels = dict(each.split("=", 1) for text in last.of("LABEL") for each in shlex.split(text))
    assert labels["org.opencontainers.image.title"] == f"octavo-{image}"
    assert labels["org.opencontainers.image.licenses"] == PROJECT["license"]
    assert last.of("ARG") == [f"VERSION={PROJECT['version']}"]
