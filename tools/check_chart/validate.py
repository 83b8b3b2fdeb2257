"""Every manifest of a folder against the schemas of its kind; runs in the environment that `run.py` makes.

    python validate.py FOLDER

Prints one line per problem. Kinds of Kubernetes are held against each of VERSIONS, strictly: a field that the version
does not know is a problem. InferenceServices and the like are the API server's to validate, in tests/operator/cluster.
"""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from cloudcoil.models.fluxcd.helm.v2 import HelmRelease
from cloudcoil.models.fluxcd.kustomize.v1 import Kustomization
from cloudcoil.models.fluxcd.source.v1 import GitRepository
from cloudcoil.models.prometheus_operator.v1 import PodMonitor, ServiceMonitor
from pydantic import BaseModel, ValidationError

VERSIONS = ("1.31", "1.32", "1.33", "1.34")
MODELS: Mapping[str, type[BaseModel]] = {
    "monitoring.coreos.com/v1/ServiceMonitor": ServiceMonitor,
    "monitoring.coreos.com/v1/PodMonitor": PodMonitor,
    "helm.toolkit.fluxcd.io/v2/HelmRelease": HelmRelease,
    "kustomize.toolkit.fluxcd.io/v1/Kustomization": Kustomization,
    "source.toolkit.fluxcd.io/v1/GitRepository": GitRepository,
}
OWN_GROUP = "octavo.dev/"


def problems(manifest: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with one manifest."""
    kind = f"{manifest['apiVersion']}/{manifest['kind']}"
    if kind in MODELS:
        yield from _model_problems(MODELS[kind], manifest)
    elif not kind.startswith(OWN_GROUP):
        yield from _kubernetes_problems(manifest)


def _kubernetes_problems(manifest: Mapping[str, Any]) -> Iterator[str]:
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(manifest, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            yield f"Kubernetes {version}: {error.message}"
        except kubernetes_validate.SchemaNotFoundError:
            yield f"Kubernetes {version} has no such kind"


def _model_problems(model: type[BaseModel], manifest: Mapping[str, Any]) -> Iterator[str]:
    try:
        read = model.model_validate(manifest).model_dump(mode="json", by_alias=True, exclude_unset=True)
    except ValidationError as error:
        yield str(error)
        return
    # These models pass over what they do not know.
    if read != manifest:
        yield f"has fields that its kind has not: {_difference(manifest, read)}"


def _difference(manifest: Any, read: Any, path: str = "") -> str:
    if isinstance(manifest, dict) and isinstance(read, dict):
        found = [_difference(each, read.get(name), f"{path}.{name}") for name, each in manifest.items()]
        return ", ".join(filter(None, found))
    return "" if manifest == read else path


def main(folder: Path) -> int:
    """The number of problems, at most 1."""
    count, found = 0, []
    for file in sorted(folder.rglob("*.yaml")):
        for manifest in filter(None, yaml.safe_load_all(file.read_text())):
            count += 1
            name = f"{file.relative_to(folder)}: {manifest['kind']} {manifest['metadata']['name']}"
            found += [f"{name}: {problem}" for problem in problems(manifest)]
    print("\n".join([*found, f"{count} manifests against Kubernetes {', '.join(VERSIONS)}: {len(found)} problems"]))
    return min(1, len(found)) if count else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
