"""Sentences for people: why a node type was chosen, why another was not, and what would do where none is left. Pure."""

from collections.abc import Sequence

from octavo_engine.geometry import Geometry

from octavo_operator.api import InferenceServiceSpec
from octavo_operator.decision import Plan, Problem
from octavo_operator.fit import Candidate, smallest_fitting_hardware
from octavo_operator.nodes import NodeType, NodeTypes
from octavo_operator.parallelism import asked_split
from octavo_operator.placement import named_types, num_free, preference, price_per_hour
from octavo_operator.profiles import HardwareTable
from octavo_operator.quantities import MIB, format_gib
from octavo_operator.running import Running


def why_away(node_type: NodeType) -> str:
    """Why pods of a node type would wait."""
    if node_type.num_away == 0:
        return "no node is of this type any more"
    return f"none of its {node_type.num_away} nodes is ready and takes pods"


def why_unknown(name: str, table: HardwareTable) -> str:
    """Why a name in hardware.types means nothing."""
    return (
        f"hardware.types names it, but it is no node type here, no HardwareProfile and no row of the hardware table: "
        f"{', '.join(table.names)}"
    )


def why_not(candidate: Candidate, best: Candidate, spec: InferenceServiceSpec, table: HardwareTable) -> str:
    """Why a node type that the model fits is not used."""
    if candidate.node_type.num_nodes == 0:
        return why_away(candidate.node_type)
    if num_free(candidate) == 0 and num_free(best):
        return "fits, but other models serve on all of its devices"
    wanted = preference(spec)
    if wanted == "Even":
        return "fits, but there are fewer replicas than node types"
    if wanted in ("Listed", "Cheapest"):
        place = "earlier in hardware.types" if wanted == "Listed" else _price(best, table)
        return f"fits, but hardware.preference {wanted} puts {best.node_type.name} first ({place}), which has room"
    if candidate.tokens_per_s > best.tokens_per_s:
        ratio = candidate.tokens_per_s / best.tokens_per_s
        name = candidate.node_type.name if candidate.node_type.is_part else candidate.node_type.hardware_name
        return (
            f"fits and is predicted to be {ratio:.1f}x as fast, but the model serves on {best.node_type.name} already, "
            f"and moving it would restart it: hardware.types: [{name}] moves it"
        )
    ratio = best.tokens_per_s / candidate.tokens_per_s
    return f"fits, but {best.node_type.name} is predicted to be {ratio:.1f}x as fast"


def why_chosen(
    spec: InferenceServiceSpec,
    candidate: Candidate,
    ranked: Sequence[Candidate],
    running: Running,
    table: HardwareTable,
) -> str:
    """Why replicas run on a node type."""
    node_type = candidate.node_type
    recognised = f" ({node_type.recognised_by})" if not node_type.is_exact else ""
    return _why_chosen(spec, candidate, ranked, running, table) + recognised + _why_split(spec, candidate)


def _why_chosen(
    spec: InferenceServiceSpec,
    candidate: Candidate,
    ranked: Sequence[Candidate],
    running: Running,
    table: HardwareTable,
) -> str:
    node_type = candidate.node_type
    wanted = preference(spec)
    if node_type.num_nodes == 0 and node_type.name not in running.kept:
        return f"it runs here; {why_away(node_type)}, and no other node type fits"
    if wanted == "Even":
        return f"hardware.types names it: one of {len(ranked)} that fit"
    if len(ranked) == 1:
        return "the only node type that fits"
    if wanted == "Listed":
        return f"number {1 + _place(candidate, spec)} in hardware.types"
    if node_type.name in running.serving:
        return "it serves here already"
    best = "next" if candidate is not ranked[0] else "cheapest" if wanted == "Cheapest" else "fastest"
    if wanted == "Cheapest":
        return f"the {best} of {len(ranked)} that fit: {_price(candidate, table)}, {_speed(candidate)}"
    return f"the {best} of {len(ranked)} that fit: {_speed(candidate)}"


def _why_split(spec: InferenceServiceSpec, candidate: Candidate) -> str:
    """Why a replica takes several GPUs; nothing where it takes one."""
    if candidate.split.num_gpus == 1:
        return ""
    reason = "fewer do not hold the model" if asked_split(spec).is_open else f"the spec asks for {asked_split(spec)}"
    return f"; a replica takes {candidate.split}: {reason}"


def _place(candidate: Candidate, spec: InferenceServiceSpec) -> int:
    return [candidate.node_type.is_called(name) for name in named_types(spec)].index(True)


def _speed(candidate: Candidate) -> str:
    unit = "GB/s of memory bandwidth" if candidate.capacity is None else "tokens/s predicted"
    return f"{candidate.tokens_per_s:,.0f} {unit}"


def _price(candidate: Candidate, table: HardwareTable) -> str:
    price = price_per_hour(candidate, table)
    return "no HardwareProfile states its price" if price is None else f"{price:,.2f} an hour"


def why_outdated(current: Plan, fresh: Plan) -> str:
    """What a plan made anew would do otherwise; empty if nothing that would restart an engine."""
    if current.hash == fresh.hash:
        return ""
    if fresh.problem is not None:
        return f"a plan made now would find nothing to run on: {fresh.problem.message}"
    old = {each.node_type.name: each for each in current.variants}
    new = {each.node_type.name: each for each in fresh.variants}
    if old.keys() != new.keys():
        return f"a plan made now would run on {fresh.hardware} instead of {current.hardware}"
    changed = [name for name in sorted(new) if old[name].identity != new[name].identity]
    return f"a plan made now would start other engines on {', '.join(changed)}: {_changes(current, fresh)}"


def _changes(current: Plan, fresh: Plan) -> str:
    """The settings that differ, each from what it is to what it would be."""
    old = {each.node_type.name: each for each in current.variants}
    found: list[str] = []
    for each in fresh.variants:
        before = old[each.node_type.name]
        was, will = before.config.model_dump(mode="json"), each.config.model_dump(mode="json")
        found += [f"{name} {was[name]} -> {will[name]}" for name in will if was.get(name) != will[name]]
        if before.image != each.image:
            found.append(f"image {before.image} -> {each.image}")
        if before.node_type.products != each.node_type.products:
            found.append(f"product {', '.join(before.node_type.products)} -> {', '.join(each.node_type.products)}")
    return "; ".join(dict.fromkeys(found)) or "what it asks of its node"


def explain_nothing(
    spec: InferenceServiceSpec, found: NodeTypes, allowed: Sequence[NodeType], geometry: Geometry | None
) -> Problem:
    """Why no node type is left, and what would do."""
    if allowed and geometry is not None:
        offered = ", ".join(f"{each.name} ({format_gib(each.memory_bytes)})" for each in allowed)
        return Problem(
            "ModelDoesNotFit", f"the model fits none of the node types {offered}: {_what_would_fit(spec, geometry)}"
        )
    named = named_types(spec)
    away = [each for each in found.types if each.num_nodes == 0 and (not named or any(map(each.is_called, named)))]
    if away:
        names = ", ".join(f"{each.name} ({each.num_away} nodes)" for each in away)
        return Problem("HardwareAway", f"no node of a type that would do is ready and takes pods: {names}")
    present = ", ".join(each.name for each in found.types) or "no usable nodes"
    asked = f"hardware.types asks for {', '.join(named)}; " if named else ""
    reasons = "; ".join(f"{each.title} {each.why}" for each in found.unusable[:3])
    return Problem("NoFittingHardware", f"{asked}the cluster has {present}{': ' + reasons if reasons else ''}")


def _what_would_fit(spec: InferenceServiceSpec, geometry: Geometry) -> str:
    smallest = smallest_fitting_hardware(spec, geometry)
    if smallest is None:
        return "no GPU of the hardware table holds it; lower engine.maxModelLen, or set engine.quantization: int8"
    return f"the smallest GPU that would fit is {smallest.title} ({format_gib(smallest.memory_mib * MIB)})"
