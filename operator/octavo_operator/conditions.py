"""A plan and the observed children -> conditions, as kstatus defines them. Pure.

Ready says that what was asked for is true. Reconciling says that it is being made true, Stalled that it will not become
true without somebody's help; at most one of the two is True, and neither is while Ready is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from octavo_operator.api import InferenceServiceSpec
from octavo_operator.decision import Plan, workload_kind
from octavo_operator.observe import PodState, WorkloadState
from octavo_operator.plan import wanted_replicas
from octavo_operator.status_api import Condition

Status = Literal["True", "False", "Unknown"]

_MAX_MESSAGE = 2000


@dataclass(frozen=True, slots=True)
class Failure:
    """What stopped this pass before its end; `is_final`: it would happen again until somebody changes something."""

    reason: str
    message: str
    is_final: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """The state as a whole: exactly one of ready, reconciling and stalled."""

    state: Literal["ready", "reconciling", "stalled"]
    reason: str
    message: str


def invalid_spec_conditions(message: str, generation: int, previous: Sequence[Condition], now: str) -> list[Condition]:
    """For a stored spec that does not validate: nothing is planned, and what runs is left as it is."""
    verdict = Verdict("stalled", "InvalidSpec", message)
    facts = {"Accepted": ("False", "InvalidSpec", message)}
    return _conditions(verdict, facts, generation, previous, now)


def make_conditions(
    spec: InferenceServiceSpec,
    plan: Plan,
    workloads: Sequence[WorkloadState],
    pods: Sequence[PodState],
    failure: Failure | None,
    generation: int,
    previous: Sequence[Condition],
    now: str,
) -> list[Condition]:
    """All conditions, in a fixed order; lastTransitionTime is `now` only where the status changed."""
    verdict = judge(spec, plan, workloads, pods, failure, now)
    facts = {
        "Accepted": ("True", "Valid", "the spec is valid"),
        "HardwareMatched": _hardware_matched(plan),
        "ModelFits": _model_fits(plan),
        "Available": _available(plan, workloads),
        "PlanOutdated": _plan_outdated(plan),
    }
    return _conditions(verdict, facts, generation, previous, now)


def judge(
    spec: InferenceServiceSpec,
    plan: Plan,
    workloads: Sequence[WorkloadState],
    pods: Sequence[PodState],
    failure: Failure | None,
    now: str,
) -> Verdict:
    """Ready, reconciling or stalled, and why."""
    if failure is not None:
        return Verdict("stalled" if failure.is_final else "reconciling", failure.reason, failure.message)
    if plan.problem is not None:
        return Verdict("stalled", plan.problem.reason, plan.problem.message)
    if spec.plan_only:
        return Verdict("ready", "PlanOnly", f"planned for {plan.hardware}; planOnly creates nothing")
    unfinished = _unfinished(plan, workloads, pods, now)
    if unfinished is not None:
        return unfinished
    if spec.suspend:
        return Verdict("ready", "Suspended", "no engine runs, as spec.suspend asks")
    if wanted_replicas(spec) == 0:
        return Verdict("ready", "ScaledToZero", "no engine runs, as scaling.replicas asks")
    return Verdict("ready", "Serving", f"all replicas are ready: {plan.hardware}")


def seconds_to_deadline(plan: Plan, workloads: Sequence[WorkloadState], now: str) -> float | None:
    """Until a step that nobody else watches has taken too long; None if there is no such step."""
    deadlines = {(each.node_type.name, workload_kind(each)): each.deadline_s for each in plan.variants}
    left = [
        deadlines[each.node_type, each.kind] - _age_s(each.progress_since, now)
        for each in workloads
        if each.progress_since and (each.node_type, each.kind) in deadlines
    ]
    return min((each for each in left if each >= 0), default=None)


def _unfinished(plan: Plan, workloads: Sequence[WorkloadState], pods: Sequence[PodState], now: str) -> Verdict | None:
    by_type = {(each.node_type, each.kind): each for each in workloads}
    for variant in plan.variants:
        name, kind = variant.node_type.name, workload_kind(variant)
        state = by_type.get((name, kind))
        if state is None or not state.is_current:
            return Verdict("reconciling", "Applying", f"the {kind} for {name} is being updated")
        trouble = _trouble(state, [pod for pod in pods if pod.node_type == name])
        if state.is_complete and state.desired == variant.replicas:
            continue
        progress = f"{state.available} of {variant.replicas} replicas ready on {name}, {state.updated} up to date"
        if state.is_past_deadline or _age_s(state.progress_since, now) > variant.deadline_s:
            text = f"no progress for {variant.deadline_s} s: {progress}{trouble}"
            return Verdict("stalled", "ProgressDeadlineExceeded", text)
        return Verdict("reconciling", "RollingOut", f"{progress}{trouble}")
    return None


def _age_s(since: str, now: str) -> float:
    """Seconds between two times of the API; 0 without the first."""
    return (datetime.fromisoformat(now) - datetime.fromisoformat(since)).total_seconds() if since else 0.0


def _trouble(state: WorkloadState, pods: Sequence[PodState]) -> str:
    """The first thing that is wrong, to be put behind a sentence."""
    if state.failure:
        return f"; {state.failure}"
    problems = [f"pod {pod.name} {pod.problem}" for pod in pods if pod.problem]
    return f"; {problems[0]}" if problems else ""


def _hardware_matched(plan: Plan) -> tuple[Status, str, str]:
    problem = plan.problem
    if plan.variants:
        return "True", "Matched", f"runs on {plan.hardware}"
    if problem is not None and problem.reason in ("NoNodes", "NoFittingHardware", "HardwareAway"):
        return "False", problem.reason, problem.message
    if problem is not None and problem.reason in ("ModelDoesNotFit", "LeaderWorkerSetMissing"):
        return "True", "Matched", "the cluster has nodes of the types that are allowed"
    return "Unknown", "NotPlanned", "no node type was looked for"


def _model_fits(plan: Plan) -> tuple[Status, str, str]:
    problem = plan.problem
    if problem is not None and problem.reason in ("ModelDoesNotFit", "LeaderWorkerSetMissing", "ModelNotSupported"):
        return "False", problem.reason, problem.message
    if plan.model.geometry is None:
        is_guess = plan.variants and plan.model.reason != "Inspecting"
        then = "; the engine decides its limits itself" if is_guess else ""
        return "Unknown", plan.model.reason, f"{plan.model.problem}{then}"
    if problem is not None:
        return "Unknown", "NotPlanned", "there is no node type to compare the model with"
    smallest = min(plan.variants, key=lambda variant: variant.node_type.memory_bytes)
    limits = f"contexts of {smallest.config.max_model_len} tokens, {smallest.config.max_num_seqs} requests at once"
    return "True", "Fits", f"on {smallest.node_type.name}: {limits}"


def _available(plan: Plan, workloads: Sequence[WorkloadState]) -> tuple[Status, str, str]:
    ready = sum(each.ready for each in workloads)
    if ready:
        return "True", "Serving", f"{ready} of {plan.num_replicas} replicas answer requests"
    return "False", "NoReadyReplica", "no replica answers requests"


def _plan_outdated(plan: Plan) -> tuple[Status, str, str]:
    if plan.outdated:
        taken_up = "rollout.replan: Automatic takes it up, and so does a new value of the annotation octavo.dev/replan"
        return "True", "ClusterChanged", f"{plan.outdated}; what serves is kept as it is: {taken_up}"
    return "False", "UpToDate", "a plan made now would start the same engines"


def _conditions(
    verdict: Verdict,
    facts: dict[str, tuple[Status, str, str]] | dict[str, tuple[str, str, str]],
    generation: int,
    previous: Sequence[Condition],
    now: str,
) -> list[Condition]:
    def flag(state: str) -> Status:
        return "True" if verdict.state == state else "False"

    summary = {
        name: (flag(state), verdict.reason, verdict.message)
        for name, state in (("Ready", "ready"), ("Reconciling", "reconciling"), ("Stalled", "stalled"))
    }
    since = {each.type: (each.status, each.last_transition_time) for each in previous}
    conditions = []
    for name, (status, reason, message) in {**summary, **facts}.items():
        old_status, old_time = since.get(name, ("", now))
        conditions.append(
            Condition.model_validate(
                {
                    "type": name,
                    "status": status,
                    "observed_generation": generation,
                    "last_transition_time": old_time if old_status == status else now,
                    "reason": reason,
                    "message": message[:_MAX_MESSAGE],
                }
            )
        )
    return conditions
