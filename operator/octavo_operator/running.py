"""What runs already, as far as it bears on a plan, and how one pass tells the next what it planned. Pure.

Each Deployment or LeaderWorkerSet carries a hash of what the user asked for when it was planned, and each ConfigMap the
variant itself. While the hash is the spec's, whatever a new plan would do otherwise comes from the cluster, not from
the user.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

from pydantic import TypeAdapter, ValidationError

from octavo_operator.api import GROUP, InferenceServiceSpec
from octavo_operator.decision import Variant
from octavo_operator.observe import NODE_TYPE_LABEL, Manifest, observe_pod, observe_workload

logger = logging.getLogger(__name__)

SPEC_HASH = f"{GROUP}/spec-hash"
VARIANT = f"{GROUP}/variant"
REPLAN = f"{GROUP}/replan"

_VARIANT_ADAPTER = TypeAdapter(Variant)
# Fields of a spec that start, stop and replace engines, but say nothing about what an engine is.
_NOT_OF_ENGINES = {"scaling", "suspend", "plan_only", "rollout", "security"}


@dataclass(frozen=True)
class Running:
    """What runs already, as far as it bears on a plan.

    node_types:     node types on which the resource has a Deployment or a LeaderWorkerSet
    serving:        those of them with a ready pod
    stuck:          those of them with a pod that cannot be scheduled
    unfinished:     those of them in the middle of a rollout
    surging:        those of them on which a rollout may start a pod beside the old ones
    num_replicas:   node type -> replicas that are asked for there
    num_in_use:     node type -> devices that the replicas of all resources ask for; on a CPU the replicas
    num_taken:      (node, node type) -> the same of ready engines of other resources; one that waits takes none
    kept:           node type -> variant that serves and was planned for the spec as it is
    """

    node_types: frozenset[str] = frozenset()
    serving: frozenset[str] = frozenset()
    stuck: frozenset[str] = frozenset()
    unfinished: frozenset[str] = frozenset()
    surging: frozenset[str] = frozenset()
    num_replicas: Mapping[str, int] = field(default_factory=dict)
    num_in_use: Mapping[str, int] = field(default_factory=dict)
    num_taken: Mapping[tuple[str, str], int] = field(default_factory=dict)
    kept: Mapping[str, Variant] = field(default_factory=dict)

    def without_memory(self) -> Self:
        """The same for a plan that is made as if nothing served yet."""
        return replace(self, serving=frozenset(), kept={})


def observe_running(
    workloads: Sequence[Manifest],
    config_maps: Sequence[Manifest],
    pods: Sequence[Manifest],
    num_in_use: Mapping[str, int],
    num_taken: Mapping[tuple[str, str], int],
    spec_hash: str,
) -> Running:
    """Read a resource's own children.

    workloads: Deployments and LeaderWorkerSets
    num_in_use, num_taken: as in Running
    spec_hash: of the spec as it is now
    """
    states = [observe_workload(each, pods) for each in workloads]
    stuck = (observe_pod(each) for each in pods)
    serving = frozenset(
        state.node_type
        for state, manifest in zip(states, workloads, strict=True)
        if state.ready and _annotation(manifest, SPEC_HASH) == spec_hash
    )
    return Running(
        node_types=frozenset(each.node_type for each in states),
        serving=serving,
        stuck=frozenset(each.node_type for each in stuck if each.is_unschedulable),
        unfinished=frozenset(each.node_type for each in states if not each.is_complete),
        surging=frozenset(each.node_type for each in states if each.surges),
        num_replicas={each.node_type: each.desired for each in states},
        num_in_use=dict(num_in_use),
        num_taken=dict(num_taken),
        kept=recall(config_maps, serving),
    )


def spec_hash(spec: InferenceServiceSpec, annotations: Mapping[str, str]) -> str:
    """Changes with what the user asks of engines, and with the annotation that asks for a new plan."""
    asked = spec.model_dump(mode="json", exclude_none=True, exclude=_NOT_OF_ENGINES)
    text = json.dumps([asked, annotations.get(REPLAN, "")], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def remember(variant: Variant) -> str:
    """The variant as text, for `recall`; without what changes with every node that comes or goes."""
    node_type = replace(variant.node_type, num_away=0, devices=(), devices_per_node=1)
    lasting = replace(variant, node_type=node_type, replicas=0, is_surge=False, why="")
    # A remembered variant has to give the same text again: sets in one order, and 3350 as the 3350.0 that it reads as.
    as_read = _VARIANT_ADAPTER.validate_python(_VARIANT_ADAPTER.dump_python(lasting))
    return json.dumps(_VARIANT_ADAPTER.dump_python(as_read), default=sorted)


def recall(config_maps: Sequence[Manifest], node_types: frozenset[str]) -> dict[str, Variant]:
    """Node type -> the variant that was planned for it. One that another version wrote, or an editor, is forgotten."""
    found: dict[str, Variant] = {}
    for each in config_maps:
        name = each["metadata"].get("labels", {}).get(NODE_TYPE_LABEL, "")
        if name not in node_types:
            continue
        try:
            found[name] = _VARIANT_ADAPTER.validate_json(_annotation(each, VARIANT))
        except ValidationError as error:
            logger.warning("configMap=%s holds no variant: %s", each["metadata"]["name"], str(error).splitlines()[0])
    return found


def _annotation(manifest: Manifest, name: str) -> str:
    return str((manifest["metadata"].get("annotations") or {}).get(name, ""))
