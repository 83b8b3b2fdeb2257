"""A plan and the observed children -> the resource's status. Pure."""

from collections.abc import Sequence

from octavo_operator.children import label_selector, service_url
from octavo_operator.decision import Plan, Variant
from octavo_operator.observe import Key, WorkloadState
from octavo_operator.status_api import (
    Condition,
    InferenceServiceStatus,
    LimitsWhy,
    MemoryPlan,
    PlanStatus,
    Prediction,
    ProblemStatus,
    RejectedStatus,
    VariantStatus,
)

# A status is for reading; a cluster with thousands of tainted nodes does not fit into one.
_MAX_REJECTED = 50


def make_status(
    key: Key,
    generation: int,
    plan: Plan | None,
    workloads: Sequence[WorkloadState],
    conditions: list[Condition],
    *,
    has_service: bool,
) -> InferenceServiceStatus:
    """The whole status, made anew."""
    return InferenceServiceStatus(
        observed_generation=generation,
        conditions=conditions,
        plan=plan_status(plan) if plan else None,
        hardware=(plan.hardware if plan else None) or None,
        replicas=sum(each.replicas for each in workloads),
        ready_replicas=sum(each.ready for each in workloads),
        selector=label_selector(key),
        url=service_url(key) if has_service else None,
    )


def plan_status(plan: Plan) -> PlanStatus:
    """The plan as status.plan shows it, and as `octavo plan` prints it."""
    rejected = [RejectedStatus(node_type=each.node_type, why=each.why) for each in plan.rejected[:_MAX_REJECTED]]
    return PlanStatus(
        hash=plan.hash,
        # Absent rather than empty: that is what server-side apply makes of a keyed list that lost its last item.
        variants=[_variant_status(each) for each in plan.variants] or None,
        rejected=rejected or None,
        problem=ProblemStatus(reason=plan.problem.reason, message=plan.problem.message) if plan.problem else None,
        geometry_unknown=None if plan.model.geometry else plan.model.problem,
        outdated=plan.outdated or None,
    )


def _variant_status(variant: Variant) -> VariantStatus:
    config, node_type = variant.config, variant.node_type
    capacity, split = variant.capacity, variant.split
    return VariantStatus(
        node_type=node_type.name,
        product=node_type.product or ("GPU" if node_type.is_gpu else "CPU"),
        arch=node_type.arch,
        replicas=variant.replicas,
        image=variant.image,
        resource=node_type.claim.device_class if node_type.claim else node_type.resource or None,
        kernel_variant=kernel_variant(variant),
        tensor_parallel=split.tensor,
        pipeline_parallel=split.pipeline if split.pipeline > 1 else None,
        nodes_per_replica=split.num_nodes if split.num_nodes > 1 else None,
        dtype=None if config.dtype == "auto" else config.dtype,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        kv_blocks=capacity.num_kv_blocks if capacity else None,
        memory=_memory(variant),
        predicted=_prediction(variant),
        limits_why=_limits_why(variant),
        why=variant.why,
    )


def kernel_variant(variant: Variant) -> str:
    """The set of kernels that the engine is told to run."""
    return variant.config.kernel_variant or variant.node_type.hardware.kernel_variant


def _memory(variant: Variant) -> MemoryPlan | None:
    capacity = variant.capacity
    if capacity is None:
        return None
    return MemoryPlan(
        weights=capacity.weight_bytes,
        kv=capacity.kv_bytes,
        activations=capacity.activation_bytes,
        graphs=capacity.graph_bytes,
        runtime=capacity.runtime_bytes,
        reserve=variant.reserve_bytes,
    )


def _prediction(variant: Variant) -> Prediction | None:
    capacity = variant.capacity
    if capacity is None:
        return None
    return Prediction(
        decode_ms=round(capacity.predicted_decode_ms, 2),
        decode_tokens_per_second=round(capacity.max_num_seqs / capacity.predicted_decode_ms * 1e3),
        prefill_tokens_per_second=round(capacity.predicted_prefill_tokens_per_s),
        context=capacity.predicted_context,
        ttft_ms=round(capacity.predicted_ttft_ms, 2),
    )


def _limits_why(variant: Variant) -> LimitsWhy | None:
    if variant.capacity is None:
        return None
    why = variant.capacity.why
    return LimitsWhy(
        max_model_len=why.max_model_len,
        max_num_seqs=why.max_num_seqs,
        max_num_batched_tokens=why.max_num_batched_tokens,
        kv_blocks=why.num_kv_blocks,
    )
