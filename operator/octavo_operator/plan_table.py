"""A plan as tables, for people."""

from collections.abc import Sequence

from octavo_engine.capacity import Capacity
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from octavo_operator.api import InferenceService, InferenceServiceSpec
from octavo_operator.decision import Plan, Variant
from octavo_operator.fit import model_address
from octavo_operator.quantities import format_gib
from octavo_operator.report import kernel_variant

_BAR_WIDTH = 40
_PARTS = {"weights": "█", "KV cache": "▓", "activations and runtime": "▒", "reserve": "·"}


def print_tables(service: InferenceService, made: Plan, num_nodes: int) -> None:
    """Write the tables to standard output."""
    console = Console(highlight=False)
    geometry = made.model.geometry
    size = f"{geometry.num_parameters / 1e9:.2f} B parameters, {geometry.architecture}" if geometry else "size unknown"
    address = escape(model_address(service.spec))
    console.print(f"[bold]{service.metadata.name}[/]  {address}  ({size}) on {num_nodes} nodes")
    if geometry is None:
        problem = escape(made.model.problem)
        then = "; the engine decides its limits itself" if made.variants else ""
        console.print(f"[yellow]geometry unknown:[/] {problem}{then}")
    if made.variants:
        console.print(_variants_table(made.variants, service.spec))
        legend = ", ".join(f"{sign} {name}" for name, sign in _PARTS.items())
        console.print(f"plan {made.hash}; memory: {legend}")
    if made.outdated:
        console.print(f"[yellow]kept as it runs:[/] {escape(made.outdated)}")
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
        "replica": f"{variant.split}" if node_type.is_gpu else "one node",
        "nodes": f"{node_type.num_nodes} ready, {node_type.num_devices} devices, {node_type.arch}",
        "image": variant.image,
        "kernels": kernel_variant(variant),
        "dtype": f"{config.dtype}, KV cache {config.kv_cache_dtype}",
        "max model len": _number(config.max_model_len),
        "max num seqs": _number(config.max_num_seqs),
        "max batched tokens": _number(config.max_num_batched_tokens),
        "rollout": "surge" if variant.is_surge else "recreate, one at a time",
    }
    if capacity is not None:
        why = capacity.why
        facts["max model len"] += f": {why.max_model_len}"
        facts["max num seqs"] += f": {why.max_num_seqs}"
        facts["max batched tokens"] += f": {why.max_num_batched_tokens}"
        facts |= {
            "KV blocks": f"{capacity.num_kv_blocks:,} of {capacity.block_size} tokens: {why.num_kv_blocks}",
            "memory": memory_bar(variant),
            "memory: weights": format_gib(capacity.weight_bytes),
            "memory: KV cache": f"{format_gib(capacity.kv_bytes)} ({capacity.num_kv_tokens:,} tokens)",
            "memory: activations": format_gib(capacity.activation_bytes),
            "memory: CUDA graphs": format_gib(capacity.graph_bytes),
            "memory: runtime": format_gib(capacity.runtime_bytes),
            "memory: reserve": format_gib(variant.reserve_bytes),
            "predicted decode": _predicted_decode(capacity),
            "predicted prefill": f"{capacity.predicted_prefill_tokens_per_s:,.0f} tokens/s, "
            f"{capacity.predicted_ttft_ms:.1f} ms to the first token of {capacity.predicted_context:,}",
        }
    return {**facts, "why": variant.why}


def memory_bar(variant: Variant) -> str:
    """The memory of one device to scale, as `_PARTS` draws it; empty while the geometry is unknown."""
    capacity = variant.capacity
    if capacity is None:
        return ""
    rest = capacity.total_bytes - capacity.weight_bytes - capacity.kv_bytes
    sizes = (capacity.weight_bytes, capacity.kv_bytes, rest, variant.reserve_bytes)
    total = max(sum(sizes), 1)
    ends = [round(_BAR_WIDTH * sum(sizes[: index + 1]) / total) for index in range(len(sizes))]
    widths = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    bar = "".join(sign * width for sign, width in zip(_PARTS.values(), widths, strict=True))
    return f"{bar} {format_gib(total)}"


def _predicted_decode(capacity: Capacity) -> str:
    tokens_per_s = capacity.max_num_seqs / capacity.predicted_decode_ms * 1e3
    return (
        f"{tokens_per_s:,.0f} tokens/s: steps of {capacity.predicted_decode_ms:.1f} ms "
        f"at contexts of {capacity.predicted_context:,} tokens"
    )


def _number(value: int | None) -> str:
    return f"{value:,}" if value is not None else "the engine decides"


def _rejected_table(made: Plan) -> Table:
    table = Table(title="Not used", title_justify="left")
    table.add_column("node type or nodes")
    table.add_column("why", overflow="fold")
    for each in made.rejected:
        table.add_row(escape(each.node_type), escape(each.why))
    return table
