"""Which of the node types that a model fits comes first, and how many replicas each of them gets. Pure."""

from collections.abc import Mapping, Sequence
from math import inf
from typing import Literal

from octavo_operator.api import InferenceServiceSpec
from octavo_operator.fit import Candidate
from octavo_operator.nodes import NodeType
from octavo_operator.parallelism import num_replicas
from octavo_operator.profiles import HardwareTable
from octavo_operator.running import Running

Preference = Literal["Even", "Listed", "Fastest", "Cheapest"]


def named_types(spec: InferenceServiceSpec) -> list[str]:
    """hardware.types; empty where the spec leaves it open."""
    return (spec.hardware.types if spec.hardware else None) or []


def preference(spec: InferenceServiceSpec) -> Preference | None:
    """How replicas are shared; None puts all of them on the best node type."""
    asked = spec.hardware.preference if spec.hardware else None
    return asked or ("Even" if len(named_types(spec)) > 1 else None)


def rank(
    spec: InferenceServiceSpec, candidates: Sequence[Candidate], running: Running, table: HardwareTable
) -> list[Candidate]:
    """Best first: what is kept as it is, then ready nodes, those with room, where it serves, and by preference.

    Without a preference a replica on one node comes before one on several. Names decide ties.
    """
    named = named_types(spec)
    wanted = preference(spec)

    def by_preference(candidate: Candidate) -> float:
        if wanted == "Listed":
            return [candidate.node_type.is_called(name) for name in named].index(True)
        if wanted == "Cheapest":
            return price_per_token(candidate, table)
        return 0.0

    def key(candidate: Candidate) -> tuple[bool, bool, bool, bool, float, bool, bool, float, str]:
        node_type = candidate.node_type
        return (
            node_type.name not in running.kept,
            node_type.num_nodes == 0,
            num_free(candidate) == 0,
            node_type.name not in running.serving,
            by_preference(candidate),
            not node_type.is_gpu,
            candidate.split.num_nodes > 1,
            -candidate.tokens_per_s,
            node_type.name,
        )

    return sorted(candidates, key=key)


def price_per_token(candidate: Candidate, table: HardwareTable) -> float:
    """Price of an hour over predicted tokens per second; infinite where no profile states a price."""
    price = price_per_hour(candidate, table)
    return inf if price is None else price / candidate.tokens_per_s


def price_per_hour(candidate: Candidate, table: HardwareTable) -> float | None:
    """Of what one replica takes."""
    price = device_price(candidate.node_type, table)
    return None if price is None else price * candidate.split.num_gpus


def device_price(node_type: NodeType, table: HardwareTable) -> float | None:
    """Of an hour: of a slice or a share its part of the device's price, by memory bandwidth."""
    price, whole = table.prices.get(node_type.hardware.name), table.row(node_type.hardware.name)
    if price is None or whole is None:
        return None
    return price * node_type.hardware.memory_bandwidth_gbps / whole.memory_bandwidth_gbps


def num_places(candidate: Candidate) -> int:
    """Replicas for which the ready nodes of this type have room, if nothing else ran there."""
    node_type, requests = candidate.node_type, candidate.requests
    if node_type.is_gpu:
        return num_replicas(node_type, candidate.split)
    per_node = min(
        node_type.memory_bytes // max(requests.memory_bytes, 1),
        node_type.cpu_millicores // max(requests.cpu_millicores, 1),
    )
    return node_type.num_devices * per_node


def num_free(candidate: Candidate) -> int:
    """Of these places those that no engine of another resource holds."""
    if candidate.node_type.is_gpu:
        return num_replicas(candidate.node_type, candidate.split, free=True)
    return max(0, num_places(candidate) - candidate.node_type.num_taken)


def share_replicas(
    wanted: Preference | None, ranked: Sequence[Candidate], num_replicas: int, present: Mapping[str, int]
) -> dict[Candidate, int]:
    """Replicas of each chosen candidate; the best is chosen even for none.

    present: node type -> replicas that stay where they are as long as there are not too many
    """
    if wanted is None or num_replicas == 0:
        return {ranked[0]: num_replicas}
    shares = {each: present.get(each.node_type.name, 0) for each in ranked}
    while sum(shares.values()) > num_replicas:
        used = [each for each in ranked if shares[each]]
        shares[max(used, key=lambda each: shares[each]) if wanted == "Even" else used[-1]] -= 1
    while sum(shares.values()) < num_replicas:
        free = [each for each in ranked if shares[each] < num_free(each)]
        emptiest = min(free or ranked, key=lambda each: shares[each])
        shares[emptiest if wanted == "Even" else (free or ranked)[0]] += 1
    return {each: share for each, share in shares.items() if share}
