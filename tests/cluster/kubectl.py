"""kubectl against the test cluster, as a user would call it."""

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kube_client import Manifest


class KubectlError(RuntimeError):
    """kubectl failed; the message is what it said on stderr."""


@dataclass(frozen=True, slots=True)
class Kubectl:
    program: Path
    kubeconfig: Path

    def __call__(self, *arguments: str, manifests: Sequence[Manifest] = (), timeout_s: float = 60.0) -> str:
        """Run with `arguments` and return stdout; `manifests` go to stdin, for `apply -f -` and the like."""
        text = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(manifests)}) if manifests else None
        run = subprocess.run(
            [str(self.program), f"--kubeconfig={self.kubeconfig}", *arguments],
            input=text, capture_output=True, text=True, timeout=timeout_s, check=False,
        )  # fmt: skip
        if run.returncode != 0:
            raise KubectlError(run.stderr.strip())
        return run.stdout
