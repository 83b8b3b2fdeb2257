"""`octavo plan`: what the operator would do with a model.yaml on given nodes, without a cluster."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import yaml
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from octavo_operator.api import API_VERSION, KIND, InferenceService, InferenceServiceSpec
from octavo_operator.command import default_engine_image, resolve_geometry
from octavo_operator.errors import ManifestError, NothingFitsError
from octavo_operator.modelgeometry import IN_CONTAINER, read_geometry
from octavo_operator.observe import Key, Manifest, ModelGeometry, ObservedNode, observe_node
from octavo_operator.plan import Defaults, Plan, Variant, make_plan, model_address
from octavo_operator.quantities import format_gib
from octavo_operator.render import Owner, render
from octavo_operator.report import plan_status


@click.command()
@click.option(
    "-f",
    "--file",
    "model_file",
    required=True,
    type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path),
    help="The InferenceService, as for `kubectl apply`; - reads standard input.",
)
@click.option(
    "--nodes",
    "nodes_file",
    required=True,
    type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path),
    help="The cluster's Nodes: the output of `kubectl get nodes -o yaml`.",
)
@click.option(
    "-o",
    "--output",
    default="table",
    show_default=True,
    type=click.Choice(["table", "json", "yaml"]),
    help="A table for people, or status.plan and the problem, if there is one, for programs.",
)
@click.option("--manifests", is_flag=True, help="Print the objects that the operator would create, and nothing else.")
@click.option(
    "--engine-image",
    default=default_engine_image,
    show_default="octavo/engine:VERSION",
    help="Image of the engine where the file names none.",
)
def plan(model_file: Path, nodes_file: Path, output: str, manifests: bool, engine_image: str) -> None:
    """Show what the operator would do: node types, limits, memory, and why each other node type is not used.

    Ends with exit code 2 if nothing fits.
    """
    service = read_service(_read_documents(model_file))
    nodes = read_nodes(_read_documents(nodes_file))
    model = read_geometry(resolve_geometry, model_address(service.spec))
    if model.geometry is None and service.spec.model.uri.startswith(("/", "file://")):
        model = ModelGeometry(problem=IN_CONTAINER)
    made = make_plan(service.spec, nodes, model, Defaults(engine_image))
    if manifests:
        objects = render(Owner(Key(service.metadata.namespace, service.metadata.name)), service.spec, made)
        click.echo(_dump_objects(objects, "json" if output == "json" else "yaml"), nl=False)
    elif output == "table":
        _print_tables(service, made, len(nodes))
    else:
        click.echo(_dump(_as_data(made), output), nl=False)
    if made.problem is not None:
        raise NothingFitsError(made.problem.message)


def _read_documents(path: Path) -> list[Any]:
    """All YAML (or JSON) documents of a file.

    Raises ManifestError.
    """
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
        return [each for each in yaml.safe_load_all(text) if each is not None]
    except OSError as error:
        raise ManifestError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ManifestError(f"{path} is not YAML: {str(error).splitlines()[0]}") from None


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
        raise ManifestError(f"{place}: {problem['msg'][0].lower()}{problem['msg'][1:]}") from None


def read_nodes(documents: Sequence[Any]) -> list[ObservedNode]:
    """The Nodes of a List, or of several documents.

    Raises ManifestError if there is something else, or a Node cannot be read.
    """
    try:
        return [observe_node(each) for each in _items(documents)]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ManifestError(
            f"the nodes cannot be read ({error}): give the output of `kubectl get nodes -o yaml`"
        ) from None


def _items(documents: Sequence[Any]) -> Iterator[Manifest]:
    for document in documents:
        kind = document.get("kind", "") if isinstance(document, Mapping) else type(document).__name__
        if kind.endswith("List"):
            yield from _items([{"kind": "Node", **each} for each in document.get("items") or []])
        elif kind == "Node":
            yield dict(document)
        else:
            raise ManifestError(f"a {kind or 'document without a kind'} is no Node")


def _as_data(made: Plan) -> dict[str, Any]:
    data: dict[str, Any] = plan_status(made).model_dump(mode="json", by_alias=True, exclude_none=True)
    if made.problem is not None:
        data["problem"] = {"reason": made.problem.reason, "message": made.problem.message}
    if made.model.geometry is None:
        data["geometryUnknown"] = made.model.problem
    return data


def _dump(data: Any, output: str) -> str:
    if output == "json":
        return json.dumps(data, indent=2) + "\n"
    return str(yaml.safe_dump(data, sort_keys=False, width=110))


def _dump_objects(objects: Sequence[Manifest], output: str) -> str:
    if output == "json":
        return _dump({"apiVersion": "v1", "kind": "List", "items": list(objects)}, "json")
    return str(yaml.safe_dump_all(objects, sort_keys=False, width=110))


def _print_tables(service: InferenceService, made: Plan, num_nodes: int) -> None:
    console = Console(highlight=False)
    geometry = made.model.geometry
    size = f"{geometry.num_parameters / 1e9:.2f} B parameters, {geometry.architecture}" if geometry else "size unknown"
    address = escape(model_address(service.spec))
    console.print(f"[bold]{service.metadata.name}[/]  {address}  ({size}) on {num_nodes} nodes")
    if geometry is None:
        problem = escape(made.model.problem)
        console.print(f"[yellow]geometry unknown:[/] {problem}; the engine decides its limits itself")
    if made.variants:
        console.print(_variants_table(made.variants, service.spec))
        console.print(f"plan {made.hash}")
    if made.rejected:
        console.print(_rejected_table(made))
    if made.problem is not None:
        console.print(f"[red]{made.problem.reason}[/]")


def _variants_table(variants: Sequence[Variant], spec: InferenceServiceSpec) -> Table:
    """One column per variant, since there are many facts and few variants."""
    table = Table(title="Runs on", title_justify="left", show_lines=False)
    table.add_column("")
    for variant in variants:
        table.add_column(f"{variant.node_type.name} x{variant.replicas}", overflow="fold")
    facts = [_facts(variant) for variant in variants]
    for name in facts[0]:
        table.add_row(name, *(escape(each.get(name, "")) for each in facts))
    if spec.suspend:
        table.caption = "suspended: no engine runs"
    return table


def _facts(variant: Variant) -> dict[str, str]:
    config, capacity, node_type = variant.config, variant.capacity, variant.node_type
    facts = {
        "device": f"{node_type.hardware.title}, {format_gib(node_type.memory_bytes)}",
        "nodes": f"{node_type.num_nodes} ready, {node_type.num_devices} devices, {node_type.arch}",
        "image": variant.image,
        "kernels": node_type.hardware.kernel_variant,
        "dtype": f"{config.dtype}, KV cache {config.kv_cache_dtype}",
        "max model len": _number(config.max_model_len),
        "max num seqs": _number(config.max_num_seqs),
        "max batched tokens": _number(config.max_num_batched_tokens),
        "rollout": "surge" if variant.is_surge else "recreate, one at a time",
    }
    if capacity is not None:
        facts |= {
            "memory: weights": format_gib(capacity.weight_bytes),
            "memory: KV cache": f"{format_gib(capacity.kv_bytes)} ({capacity.num_kv_tokens:,} tokens)",
            "memory: activations": format_gib(capacity.activation_bytes),
            "memory: runtime": format_gib(capacity.runtime_bytes),
            "memory: reserve": format_gib(variant.reserve_bytes),
            "predicted decode": f"{capacity.max_num_seqs / capacity.predicted_decode_ms * 1e3:,.0f} tokens/s",
            "predicted prefill": f"{capacity.predicted_prefill_tokens_per_s:,.0f} tokens/s",
        }
    return {**facts, "why": variant.why}


def _number(value: int | None) -> str:
    return f"{value:,}" if value is not None else "the engine decides"


def _rejected_table(made: Plan) -> Table:
    table = Table(title="Not used", title_justify="left")
    table.add_column("node type or nodes")
    table.add_column("why", overflow="fold")
    for each in made.rejected:
        table.add_row(escape(each.node_type), escape(each.why))
    return table
