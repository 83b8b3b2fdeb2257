"""Checks everything that Octavo hands to a cluster, as it is rendered: the chart, what the operator makes, the images.

The chart in each set of values of its ci/ folder, and the manifests of the examples, are written to build/chart. Then
they are held against the schemas of four versions of Kubernetes (`validate.py`), and against checkov's rules together
with the Dockerfiles. Findings of checkov that are meant to be are in `exceptions.yaml`, each with its reason.

The tools weigh 300 MB and want other versions than Octavo, so they live in .venvs/chart. `make lock` resolves their
requirements.txt anew.
"""

import fnmatch
import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
CHART = ROOT / "charts" / "octavo"
OUTPUT = ROOT / "build" / "chart"
ENVIRONMENT = ROOT / ".venvs" / "chart"
# Examples that serve on the nodes of examples/nodes.yaml, whatever a team adds to them.
EXAMPLES = ("smollm2", "llama-gpu", "spread", "volume")

sys.path.insert(0, str(ROOT / "tests" / "cluster"))


@dataclass(frozen=True, slots=True)
class Finding:
    """A rule that a resource breaks."""

    check: str
    resource: str
    text: str

    def __str__(self) -> str:
        return f"{self.check} {self.resource}: {self.text}"


def main() -> int:
    ensure_environment()
    render()
    validated = subprocess.run([ENVIRONMENT / "bin/python", HERE / "validate.py", OUTPUT], check=False)
    problems = unexplained(scan())
    print("\n".join(problems) or "each finding is explained in exceptions.yaml")
    return 1 if validated.returncode or problems else 0


def ensure_environment() -> None:
    """Make .venvs/chart on the first call, and after a change of requirements.txt."""
    requirements = HERE / "requirements.txt"
    wanted = hashlib.sha256(requirements.read_bytes()).hexdigest()
    mark = ENVIRONMENT / "installed"
    if mark.exists() and mark.read_text() == wanted:
        return
    print(f"installing checkov and kubernetes-validate into {ENVIRONMENT} ...", flush=True)
    shutil.rmtree(ENVIRONMENT, ignore_errors=True)
    uv = str(Path(sys.executable).with_name("uv"))
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, ENVIRONMENT], check=True)
    python = str(ENVIRONMENT / "bin" / "python")
    subprocess.run([uv, "pip", "install", "--quiet", "--python", python, "--requirement", requirements], check=True)
    mark.write_text(wanted)


def render() -> None:
    """Write build/chart anew: the chart by Helm, the examples by `octavo plan`, copies of what is checked as it is."""
    import binaries

    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir(parents=True)
    for values in sorted((CHART / "ci").glob("*-values.yaml")):
        command = [binaries.helm_binary(), "template", "octavo", CHART, "--namespace=octavo-system"]
        (OUTPUT / f"chart-{values.name}").write_text(_output(*command, "--kube-version=1.34", f"--values={values}"))
    for name in EXAMPLES:
        model = OUTPUT / "model.yml"
        manifest = yaml.safe_load((ROOT / "examples" / f"{name}.yaml").read_text())
        manifest["metadata"]["namespace"] = "models"
        model.write_text(yaml.safe_dump(manifest))
        command = [Path(sys.executable).with_name("octavo"), "plan", "-f", model, "--manifests"]
        (OUTPUT / f"{name}.yaml").write_text(_output(*command, "--nodes", ROOT / "examples/nodes.yaml"))
        model.unlink()
    shutil.copytree(ROOT / "examples" / "gitops" / "flux", OUTPUT / "flux")
    for image in ("operator", "engine"):
        (OUTPUT / image).mkdir()
        shutil.copy(ROOT / image / "Dockerfile", OUTPUT / image)


def _output(*command: Any) -> str:
    run = subprocess.run([str(each) for each in command], capture_output=True, text=True, check=False)
    if run.returncode:
        sys.exit(f"{' '.join(str(each) for each in command)}\n{run.stderr}")
    return run.stdout


def scan() -> list[Finding]:
    """What checkov finds in build/chart."""
    command = [ENVIRONMENT / "bin/checkov", "--directory", OUTPUT, "--framework", "kubernetes", "dockerfile"]
    # Without skip-download it asks its maker's server for descriptions.
    options = ("--output", "json", "--compact", "--skip-download")
    run = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    try:
        reports = json.loads(run.stdout)
    except ValueError:
        sys.exit(f"checkov failed:\n{run.stdout}{run.stderr}")
    found = []
    for report in reports:
        summary = report["summary"]
        print(f"checkov, {report['check_type']}: {summary['passed']} checks passed, {summary['failed']} failed")
        if not summary["passed"] or summary["parsing_errors"]:
            sys.exit("checkov read nothing, or not everything")
        found += [
            Finding(each["check_id"], each["resource"], each["check_name"])
            for each in report["results"]["failed_checks"]
        ]
    return found


def unexplained(findings: list[Finding]) -> list[str]:
    """Findings without an exception, and exceptions without a finding."""
    exceptions = yaml.safe_load((HERE / "exceptions.yaml").read_text())

    def covers(exception: dict[str, str], finding: Finding) -> bool:
        return exception["check"] == finding.check and fnmatch.fnmatch(finding.resource, exception["resource"])

    unmet = {str(each) for each in findings if not any(covers(exception, each) for exception in exceptions)}
    stale = [each for each in exceptions if not any(covers(each, finding) for finding in findings)]
    return [*sorted(unmet), *(f"exceptions.yaml: {each['check']} {each['resource']} matches nothing" for each in stale)]


if __name__ == "__main__":
    sys.exit(main())
