"""The chart, rendered by the real Helm without a cluster."""

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts/octavo"

Manifest = dict[str, Any]
Render = Callable[..., list[Manifest]]


class HelmError(AssertionError):
    """Helm refused; the message is what it said."""


@pytest.fixture(scope="session")
def call_helm(helm: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Runs helm away from the user's settings and returns stdout; raises HelmError."""
    home = str(tmp_path_factory.mktemp("helm"))

    def call(*arguments: str) -> str:
        run = subprocess.run(
            [str(helm), *arguments], capture_output=True, text=True, timeout=60, check=False, env={"HOME": home}
        )
        if run.returncode:
            raise HelmError(run.stderr)
        return run.stdout

    return call


@pytest.fixture(scope="session")
def render(call_helm: Callable[..., str]) -> Render:
    """The chart's objects: `render("key=value", ..., values=FILE)`, in the namespace octavo-system."""

    def call(*settings: str, values: Sequence[Path] = (), release: str = "octavo") -> list[Manifest]:
        arguments = [f"--set={each}" for each in settings] + [f"--values={file}" for file in values]
        text = call_helm(
            "template", release, str(CHART), "--namespace=octavo-system", "--kube-version=1.34", *arguments
        )
        return [each for each in yaml.safe_load_all(text) if each]

    return call
