"""`octavo plan`: what the operator would do with a model.yaml, on the nodes of a file or of a cluster."""

import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import yaml
from pydantic import ValidationError

from octavo_operator.api import API_VERSION, KIND, InferenceService, InferenceServiceSpec
from octavo_operator.children import Owner
from octavo_operator.command import default_engine_image, resolve_geometry
from octavo_operator.decision import Defaults, Plan
from octavo_operator.documents import observed_nodes, profile_manifests, read_documents
from octavo_operator.errors import ManifestError, NothingFitsError, explain_validation
from octavo_operator.fit import model_address
from octavo_operator.modelgeometry import (
    IN_CONTAINER,
    is_in_container,
    read_geometry,
    stated_geometry,
    with_refusal,
)
from octavo_operator.observe import Key, Manifest, ModelGeometry
from octavo_operator.plan import make_plan
from octavo_operator.plan_cluster import Cluster, differences, read_cluster
from octavo_operator.plan_table import print_tables
from octavo_operator.profiles import HardwareTable, read_profiles, rejections
from octavo_operator.render import render
from octavo_operator.report import plan_status
from octavo_operator.running import Running

_FILE = click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path)


@click.command()
@click.option(
    "-f",
    "--file",
    "model_file",
    required=True,
    type=_FILE,
    help="The InferenceService, as for `kubectl apply`; - reads standard input.",
)
@click.option(
    "--nodes",
    "nodes_file",
    type=_FILE,
    help="The Nodes: the output of `kubectl get nodes -o yaml`, or of `kubectl get nodes,resourceslices -o yaml`.  "
    "[default: those of the kubeconfig's cluster]",
)
@click.option(
    "--hardware-profiles",
    "profiles_file",
    type=_FILE,
    help="HardwareProfiles that add to the hardware table.  [default: those of the cluster, none with --nodes]",
)
@click.option(
    "-o",
    "--output",
    default="table",
    show_default=True,
    type=click.Choice(["table", "json", "yaml"]),
    help="A table for people, or for programs what the operator writes as status.plan.",
)
@click.option("--manifests", is_flag=True, help="Print the objects that the operator would create, and nothing else.")
@click.option(
    "--diff",
    is_flag=True,
    help="Print how the cluster's objects would change, and nothing else; exit code 1 if they would.",
)
@click.option(
    "--kubeconfig",
    envvar="KUBECONFIG",
    type=click.Path(path_type=Path),
    help="How to reach the cluster.  [default: ~/.kube/config]",
)
@click.option(
    "--engine-image",
    default=default_engine_image,
    show_default="octavo/engine:VERSION",
    help="Image of the engine where the file names none.",
)
def plan(
    model_file: Path,
    nodes_file: Path | None,
    profiles_file: Path | None,
    output: str,
    manifests: bool,
    diff: bool,
    kubeconfig: Path | None,
    engine_image: str,
) -> None:
    """Show what the operator would do: node types, limits, memory, and why each other node type is not used.

    Ends with exit code 2 if nothing fits.
    """
    if manifests and diff:
        raise click.UsageError("--manifests and --diff exclude each other")
    service = read_service(read_documents(model_file))
    key = Key(service.metadata.namespace, service.metadata.name)
    cluster = _cluster(service.spec, key, nodes_file, profiles_file, kubeconfig, is_compared=diff)
    made = make_plan(
        service.spec,
        cluster.nodes,
        _model(service.spec),
        Defaults(engine_image),
        cluster.running,
        cluster.table,
        has_leader_worker_sets=cluster.has_leader_worker_sets,
    )
    objects = render(Owner(key, cluster.uid, cluster.annotations), service.spec, made)
    changes = ""
    if manifests:
        click.echo(_dump_objects(objects, "json" if output == "json" else "yaml"), nl=False)
    elif diff:
        changes = differences([] if service.spec.plan_only else objects, cluster.children)
        click.echo(changes, nl=False)
    elif output == "table":
        print_tables(service, made, len(cluster.nodes))
    else:
        click.echo(_dump(_as_data(made), output), nl=False)
    if made.problem is not None:
        raise NothingFitsError(made.problem.message)
    sys.exit(1 if changes else 0)


def _cluster(
    spec: InferenceServiceSpec,
    key: Key,
    nodes_file: Path | None,
    profiles_file: Path | None,
    kubeconfig: Path | None,
    *,
    is_compared: bool,
) -> Cluster:
    """The cluster, read where a file does not say how it is. Raises ManifestError and what reading a cluster raises."""
    if nodes_file is None or is_compared:
        cluster = asyncio.run(read_cluster(kubeconfig, key, spec))
    else:
        cluster = Cluster((), HardwareTable(), Running())
    return replace(
        cluster,
        nodes=observed_nodes(read_documents(nodes_file)) if nodes_file else cluster.nodes,
        table=_table(profiles_file) if profiles_file else cluster.table,
    )


def _table(profiles_file: Path) -> HardwareTable:
    """The table with a file's profiles. Raises ManifestError for one that the operator would not use."""
    table, verdicts = read_profiles(profile_manifests(read_documents(profiles_file)))
    for each in rejections(verdicts):
        raise ManifestError(f"HardwareProfile {each.name}: {each.problem}")
    return table


def _model(spec: InferenceServiceSpec) -> ModelGeometry:
    address = model_address(spec)
    model = stated_geometry(spec) or read_geometry(resolve_geometry, address)
    if model.geometry is None and not model.is_unsupported and is_in_container(address):
        return ModelGeometry(problem=IN_CONTAINER)
    return with_refusal(model, spec)


def read_service(documents: Sequence[Any]) -> InferenceService:
    """The one InferenceService among the documents.

    Raises ManifestError that names the field.
    """
    found = [each for each in documents if isinstance(each, Mapping) and each.get("kind") == KIND]
    if len(found) != 1:
        raise ManifestError(f"the file holds {len(found)} objects of kind {KIND}; one is planned at a time")
    try:
        return InferenceService.model_validate(found[0])
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(each) for each in problem["loc"])
        if problem["type"] == "extra_forbidden":
            raise ManifestError(f"{place}: {API_VERSION} has no such field") from None
        raise ManifestError(explain_validation(error)) from None


def _as_data(made: Plan) -> dict[str, Any]:
    return plan_status(made).model_dump(mode="json", by_alias=True, exclude_none=True)


def _dump(data: Any, output: str) -> str:
    if output == "json":
        return json.dumps(data, indent=2) + "\n"
    return str(yaml.safe_dump(data, sort_keys=False, width=110))


def _dump_objects(objects: Sequence[Manifest], output: str) -> str:
    if output == "json":
        return _dump({"apiVersion": "v1", "kind": "List", "items": list(objects)}, "json")
    return str(yaml.safe_dump_all(objects, sort_keys=False, width=110))
