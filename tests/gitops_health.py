"""What Argo CD and Flux make of a resource, by the checks of examples/gitops, in the languages that they use."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cel
import yaml
from lupa.lua51 import LuaRuntime

GITOPS = Path(__file__).parents[1] / "examples/gitops"

Manifest = Mapping[str, Any]


class ArgoCd:
    """Health by the Lua of argocd-cm.yaml, with `obj` as the only thing that a script is given, as in Argo CD."""

    def __init__(self, kind: str = "InferenceService") -> None:
        settings = yaml.safe_load((GITOPS / "argocd/argocd-cm.yaml").read_text())["data"]
        self._script: str = settings[f"resource.customizations.health.octavo.dev_{kind}"]
        self._lua = LuaRuntime(register_eval=False, register_builtins=False)

    def health(self, manifest: Manifest) -> tuple[str, str]:
        """(status, message)"""
        self._lua.globals().obj = self._table(manifest)
        found = self._lua.execute(self._script)
        assert set(found) <= {"status", "message"}
        return found["status"], found["message"]

    def _table(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return self._lua.table_from({name: self._table(each) for name, each in value.items()})
        if isinstance(value, list):
            return self._lua.table_from([self._table(each) for each in value])
        # Argo CD reads JSON, whose numbers are floats there.
        return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


class Flux:
    """Status by the CEL expressions of flux/models.yaml, asked in the order of Flux's RFC 0009."""

    def __init__(self, kind: str = "InferenceService") -> None:
        documents = yaml.safe_load_all((GITOPS / "flux/models.yaml").read_text())
        (kustomization,) = [each for each in documents if each["kind"] == "Kustomization"]
        (self._expressions,) = [each for each in kustomization["spec"]["healthCheckExprs"] if each["kind"] == kind]

    def status(self, manifest: Manifest) -> str:
        """InProgress, Failed, Current, or Unknown where an expression cannot be evaluated."""
        observed = manifest.get("status", {}).get("observedGeneration")
        if observed is not None and observed != manifest["metadata"]["generation"]:
            return "InProgress"
        for name, status in (("inProgress", "InProgress"), ("failed", "Failed"), ("current", "Current")):
            if name not in self._expressions:
                continue
            try:
                if cel.evaluate(self._expressions[name], dict(manifest)):
                    return status
            except (RuntimeError, KeyError):
                # A field is not there yet: Flux asks again until its timeout.
                return "Unknown"
        return "InProgress"
