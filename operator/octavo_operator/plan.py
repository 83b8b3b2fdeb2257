"""The decision: a spec, the cluster's node types and the model's geometry -> which engines run where. Pure.

All defaults live here, in `fit.py` and in `placement.py`. The same function serves the operator and `octavo plan`.

What serves is left alone where only the cluster changed: a plan is made anew and compared, and `Plan.outdated` says
what it would do otherwise. `rollout.replan: Automatic` takes the new plan.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from octavo_engine.errors import CapacityError
from octavo_engine.geometry import DTYPE_BYTES, Geometry

from octavo_operator.api import Engine, InferenceServiceSpec
from octavo_operator.decision import Defaults, Plan, Problem, ProblemReason, Rejected, Variant
from octavo_operator.errors import NoLeaderWorkerSetsError
from octavo_operator.explain import explain_nothing, why_away, why_chosen, why_not, why_outdated, why_unknown
from octavo_operator.fit import Candidate, fit
from octavo_operator.needs import on_more_nodes, what_it_needs
from octavo_operator.nodes import MIN_DRIVER_MAJOR, NodeType, NodeTypes, find_node_types
from octavo_operator.observe import ModelGeometry, ObservedNode
from octavo_operator.parallelism import asked_split
from octavo_operator.placement import named_types, num_places, preference, rank, share_replicas
from octavo_operator.profiles import HardwareTable
from octavo_operator.running import Running

# Seconds to get the weights, by where they come from: over the network at 50 MB/s, a local disk at 200 MB/s.
_BYTES_PER_SECOND = {"remote": 50e6, "local": 200e6}
_STARTUP_BASE_S = 180
_STARTUP_UNKNOWN_S = 3600


def make_plan(
    spec: InferenceServiceSpec,
    nodes: Sequence[ObservedNode],
    model: ModelGeometry,
    defaults: Defaults,
    running: Running | None = None,
    table: HardwareTable | None = None,
    *,
    has_leader_worker_sets: bool = True,
) -> Plan:
    """Choose node types, limits and replicas.

    has_leader_worker_sets: whether the cluster has LeaderWorkerSets
    A variant that serves is not moved because a faster node type appeared: that would restart it. One whose nodes are
    all away moves if another type fits, and else waits for them.
    """
    running = running or Running()
    planner = _Planner(
        spec, nodes, model, defaults, table or HardwareTable(), running, has_leader_worker_sets=has_leader_worker_sets
    )
    if not running.serving:
        return planner.plan(running)
    fresh = planner.plan(running.without_memory())
    if spec.rollout is not None and spec.rollout.replan == "Automatic" and fresh.problem is None:
        return _one_after_the_other(fresh, running)
    current = planner.plan(running)
    return replace(current, outdated=why_outdated(current, fresh))


def _one_after_the_other(fresh: Plan, running: Running) -> Plan:
    """The fresh plan, with other engines on one node type at a time: the others serve on until that one is done."""
    changed = [
        each.node_type.name
        for each in fresh.variants
        if each.node_type.name in running.kept and each.identity != running.kept[each.node_type.name].identity
    ]
    turn = sorted(set(changed) - running.unfinished)[:1] if not running.unfinished else []
    waiting = set(changed) - running.unfinished - set(turn)
    variants = tuple(
        replace(running.kept[each.node_type.name], replicas=each.replicas, is_surge=each.is_surge, why=each.why)
        if each.node_type.name in waiting
        else each
        for each in fresh.variants
    )
    outdated = f"engines on {', '.join(sorted(waiting))} follow when {turn[0] if turn else 'others'} are done"
    return replace(fresh, variants=variants, outdated=outdated if waiting else "")


def _why_not_served(model: ModelGeometry) -> ProblemReason:
    if model.reason == "ModelNotFound" or model.reason == "ModelAccessDenied" or model.reason == "ModelUnreadable":
        return model.reason
    return "ModelNotSupported"


def wanted_replicas(spec: InferenceServiceSpec) -> int:
    """Replicas that should run; none while suspended."""
    if spec.suspend:
        return 0
    return 1 if spec.scaling is None or spec.scaling.replicas is None else spec.scaling.replicas


class _Planner:
    """What every plan of one pass shares."""

    def __init__(
        self,
        spec: InferenceServiceSpec,
        nodes: Sequence[ObservedNode],
        model: ModelGeometry,
        defaults: Defaults,
        table: HardwareTable,
        observed: Running,
        *,
        has_leader_worker_sets: bool,
    ) -> None:
        self._spec = spec
        self._has_nodes = bool(nodes)
        self._model = model
        self._defaults = defaults
        self._table = table
        self._observed = observed
        self._has_leader_worker_sets = has_leader_worker_sets
        # Which CUDA somebody else's image brings, nobody says.
        driver = 0 if spec.engine and spec.engine.image else MIN_DRIVER_MAJOR
        self._found = find_node_types(nodes, spec.scheduling, table, driver, observed.num_taken)
        self._unusable = [Rejected(each.title, each.why) for each in self._found.unusable]

    def plan(self, running: Running) -> Plan:
        """The plan, given what runs and is to stay."""
        spec, model = self._spec, self._model
        if model.is_unsupported:
            needs = (*self._unusable, *self._needs())
            return Plan((), needs, Problem(_why_not_served(model), model.problem), model)
        if not self._has_nodes:
            return Plan((), (), Problem("NoNodes", "the cluster has no nodes"), model)
        allowed, refused = _allowed_types(spec, self._found, running, self._table)
        candidates, misfits, problem = self._fit(allowed, running)
        rejected = [*self._unusable, *refused, *misfits]
        if not candidates:
            problem = problem or explain_nothing(spec, self._found, allowed, model.geometry)
            return Plan((), tuple(rejected), problem, model)
        ranked = rank(spec, candidates, running, self._table)
        present = {name: num for name, num in running.num_replicas.items() if name in running.kept}
        chosen = share_replicas(preference(spec), ranked, wanted_replicas(spec), present)
        rejected += [
            Rejected(each.node_type.name, why_not(each, ranked[0], spec, self._table))
            for each in ranked
            if each not in chosen
        ]
        variants = tuple(self._variant(each, chosen[each], ranked, running) for each in ranked if each in chosen)
        return Plan(variants, tuple(rejected), None, model)

    def _fit(
        self, allowed: Sequence[NodeType], running: Running
    ) -> tuple[list[Candidate], list[Rejected], Problem | None]:
        """An engine for each node type, the one that is kept or one worked out; and what the user can do about one."""
        by_name = {each.name: each for each in self._found.types}
        candidates = [_kept_candidate(each, by_name.get(name)) for name, each in running.kept.items()]
        misfits: list[Rejected] = []
        problem: Problem | None = None
        for node_type in allowed:
            if node_type.name in running.kept:
                continue
            try:
                candidates.append(
                    fit(
                        self._spec, node_type, self._model.geometry, has_leader_worker_sets=self._has_leader_worker_sets
                    )
                )
            except NoLeaderWorkerSetsError as error:
                misfits.append(Rejected(node_type.name, str(error)))
                problem = problem or Problem("LeaderWorkerSetMissing", f"on {node_type.name} {error}")
            except CapacityError as error:
                misfits.append(Rejected(node_type.name, f"{error}{self._on_more_nodes(node_type)}"))
                if not asked_split(self._spec).is_open:
                    problem = problem or Problem("ModelDoesNotFit", f"on {node_type.name}: {error}")
        return candidates, misfits, problem

    def _needs(self) -> Iterator[Rejected]:
        """What a model that no engine serves would need, for people who choose hardware."""
        geometry = self._model.geometry
        if geometry is not None:
            for node_type in self._found.types:
                yield Rejected(node_type.name, what_it_needs(self._spec, node_type, geometry))

    def _on_more_nodes(self, node_type: NodeType) -> str:
        geometry = self._model.geometry
        return on_more_nodes(self._spec, node_type, geometry) if geometry else ""

    def _variant(self, candidate: Candidate, replicas: int, ranked: Sequence[Candidate], running: Running) -> Variant:
        spec = self._spec
        engine = spec.engine or Engine()
        kept = running.kept.get(candidate.node_type.name)
        startup_s = kept.startup_s if kept else _startup_s(spec, self._model.geometry)
        deadline_s = spec.rollout.progress_deadline_seconds if spec.rollout else None
        variant = Variant(
            node_type=candidate.node_type,
            replicas=replicas,
            image=kept.image if kept else engine.image or self._defaults.engine_image,
            config=candidate.config,
            capacity=candidate.capacity,
            requests=candidate.requests,
            startup_s=startup_s,
            # Past the last moment at which the startup probe would still let the engine load.
            deadline_s=deadline_s or startup_s + 60,
            is_surge=False,
            why=why_chosen(spec, candidate, ranked, running, self._table),
        )
        return replace(variant, is_surge=_is_surge(spec, candidate, variant, self._observed))


def _kept_candidate(kept: Variant, found: NodeType | None) -> Candidate:
    """What runs, as it was planned, with the nodes as they are now."""
    node_type = kept.node_type
    if found is not None:
        node_type = replace(
            node_type,
            num_away=found.num_away,
            devices=found.devices,
            devices_per_node=found.devices_per_node,
        )
    return Candidate(node_type, kept.config, kept.capacity, kept.requests)


def _allowed_types(
    spec: InferenceServiceSpec, found: NodeTypes, running: Running, table: HardwareTable
) -> tuple[list[NodeType], list[Rejected]]:
    """The node types that the spec lets in, and the others with the reason."""
    named = named_types(spec)
    excluded = (spec.hardware.exclude if spec.hardware else None) or []
    wanted: list[NodeType] = []
    present = {name for each in found.types for name in (each.name, each.hardware_name)}
    rejected = [Rejected(name, why_unknown(name, table)) for name in named if name not in {*present, *table.names}]
    for node_type in found.types:
        if any(map(node_type.belongs_to, excluded)):
            rejected.append(Rejected(node_type.name, "hardware.exclude names it"))
        elif named and not any(map(node_type.is_called, named)):
            rejected.append(Rejected(node_type.name, f"hardware.types asks for {', '.join(named)}"))
        else:
            wanted.append(node_type)
    has_gpus = any(node_type.is_gpu for node_type in wanted)
    allowed: list[NodeType] = []
    for node_type in wanted:
        if has_gpus and not node_type.is_gpu and not named:
            rejected.append(
                Rejected(node_type.name, "there are GPU nodes; hardware.types: [cpu] would choose it all the same")
            )
        elif node_type.num_nodes == 0 and node_type.name not in running.node_types:
            rejected.append(Rejected(node_type.name, why_away(node_type)))
        else:
            allowed.append(node_type)
    return allowed, rejected


def _is_surge(spec: InferenceServiceSpec, candidate: Candidate, variant: Variant, running: Running) -> bool:
    """Whether a rollout may start a pod beside the old ones: asked for, or a place for it is free.

    While nothing is rolled out it does not matter, and stays as it is: nodes that come and go cost no write.
    """
    strategy = (spec.rollout.strategy if spec.rollout else None) or "Auto"
    if strategy != "Auto":
        return strategy == "Surge"
    name, split = candidate.node_type.name, candidate.split
    kept = running.kept.get(name)
    if kept is not None and kept.identity == variant.identity and name not in running.unfinished:
        return name in running.surging
    # With its own replicas as they will be: what it decides now must not be another thing once they are there.
    num_new = variant.replicas - running.num_replicas.get(name, 0)
    num_in_use = running.num_in_use.get(name, 0) + num_new * split.num_gpus
    num_free = num_places(candidate) * split.num_gpus - num_in_use
    return name not in running.stuck and num_free >= split.num_gpus


def _startup_s(spec: InferenceServiceSpec, geometry: Geometry | None) -> int:
    """Seconds that an engine may take from its start until it is ready."""
    if geometry is None:
        return _STARTUP_UNKNOWN_S
    source = "remote" if spec.model.uri.startswith(("hf://", "s3://", "oci://")) else "local"
    num_bytes = geometry.num_parameters * DTYPE_BYTES.get(geometry.dtype, 2)
    return _STARTUP_BASE_S + int(num_bytes / _BYTES_PER_SECOND[source])
