"""What the operator reports of an InferenceService, typed: its status, as `api.py` has its spec."""

from typing import Any, Literal

from pydantic import Field

from octavo_operator.api import Part


class MemoryPlan(Part):
    """Bytes of the memory of each of a replica's GPUs, by use; on a CPU of the node's."""

    weights: int = Field(description="Bytes of the weights.")
    kv: int = Field(description="Bytes of the KV cache.")
    activations: int = Field(description="Bytes of the widest step's activations.")
    graphs: int = Field(description="Bytes of the decode steps' CUDA graphs.")
    runtime: int = Field(description="Bytes of interpreter, libraries and what the allocator loses.")
    reserve: int = Field(description="Bytes left free of what the replica may take there.")


class Prediction(Part):
    """The roofline of one replica: a limit by bandwidth and arithmetic, not a measurement.

    Over several GPUs it leaves out what they exchange.
    """

    decode_ms: float = Field(description="Least milliseconds of one decode step with maxNumSeqs requests.")
    decode_tokens_per_second: int = Field(description="Most tokens per second in decode.")
    prefill_tokens_per_second: int = Field(description="Most prompt tokens per second.")
    context: int = Field(description="Tokens of each request's context, and of the prompt, that these times are for.")
    ttft_ms: float = Field(description="Least milliseconds from a prompt to its first token, with nothing else to do.")


class LimitsWhy(Part):
    """Why each limit is what it is."""

    max_model_len: str = Field(description="Of maxModelLen.")
    max_num_seqs: str = Field(description="Of maxNumSeqs.")
    max_num_batched_tokens: str = Field(description="Of maxNumBatchedTokens.")
    kv_blocks: str = Field(description="Of kvBlocks.")


class VariantStatus(Part):
    """One node type that the resource runs on."""

    node_type: str = Field(description="Name of the node type.")
    product: str = Field(description="Product label of the GPU; CPU for a node without one.")
    arch: str = Field(description="CPU architecture of the node type and of the image.")
    replicas: int = Field(description="Replicas that are planned for this node type.")
    image: str = Field(description="Image of the engine.")
    resource: str | None = Field(None, description="What a pod asks for: an extended resource, or a DeviceClass.")
    kernel_variant: str = Field(description="Set of tuned kernels that the engine runs.")
    tensor_parallel: int = Field(description="GPUs that one engine spreads each layer over; 1 on a CPU.")
    pipeline_parallel: int | None = Field(
        None, description="Stages of consecutive layers that one engine runs one after the other; absent: one."
    )
    nodes_per_replica: int | None = Field(
        None, description="Nodes that one engine runs on, as a group of a LeaderWorkerSet; absent: one."
    )
    dtype: str | None = Field(None, description="Data type of weights and activations, where it is known.")
    max_model_len: int | None = Field(None, description="Longest context in tokens.")
    max_num_seqs: int | None = Field(None, description="Most requests that run at once in a replica.")
    max_num_batched_tokens: int | None = Field(None, description="Token budget of one step.")
    kv_blocks: int | None = Field(None, description="Blocks of the KV cache of a replica.")
    memory: MemoryPlan | None = Field(None, description="Memory of each GPU; absent while the geometry is unknown.")
    predicted: Prediction | None = Field(None, description="Predicted limit of a replica's speed.")
    limits_why: LimitsWhy | None = Field(None, description="Why the limits are what they are.")
    why: str = Field(description="Why this node type was chosen.")


class RejectedStatus(Part):
    """A node type, or nodes, that the resource does not run on."""

    node_type: str = Field(description="Name of the node type, or of the nodes.")
    why: str = Field(description="Why it was not chosen.")


class ProblemStatus(Part):
    """Why there is nothing to run."""

    reason: str = Field(description="Why, in one CamelCase word.")
    message: str = Field(description="Why, in a sentence that says what would do.")


class PlanStatus(Part):
    """What the operator decided: the same data as `octavo plan -o json` prints."""

    hash: str = Field(description="Changes when the plan does; pods of one hash are equal.")
    variants: list[VariantStatus] | None = Field(
        None,
        description="Node types that are used; absent if there is none.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["nodeType"]},
    )
    rejected: list[RejectedStatus] | None = Field(
        None,
        description="Node types that are not used, each with the reason.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )
    problem: ProblemStatus | None = Field(None, description="Why there are no variants; absent where there are.")
    geometry_unknown: str | None = Field(
        None, description="Why the model's geometry is not known, so that the engine decides its limits itself."
    )
    outdated: str | None = Field(None, description="What a plan made anew would do otherwise, where it would.")


class Condition(Part):
    """One aspect of the state, as in every Kubernetes API."""

    type: str = Field(max_length=316, description="Name of the condition.")
    status: Literal["True", "False", "Unknown"] = Field(description="True, False or Unknown.")
    observed_generation: int = Field(ge=0, description="Generation of the resource that this is about.")
    last_transition_time: str = Field(
        description="When the status last changed.", json_schema_extra={"format": "date-time"}
    )
    reason: str = Field(max_length=1024, description="Why, in one CamelCase word.")
    message: str = Field(max_length=32768, description="Why, in a sentence that one can act on.")


class InferenceServiceStatus(Part):
    """What the operator observed and decided. Written by the operator alone."""

    observed_generation: int = Field(description="Generation of the spec that this status is about.")
    conditions: list[Condition] = Field(
        description="Ready, Reconciling and Stalled follow kstatus; Accepted, HardwareMatched, ModelFits and Available "
        "say which step is true; PlanOutdated that the cluster has changed since the engines were planned.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    )
    plan: PlanStatus | None = Field(None, description="What was decided, and why.")
    hardware: str | None = Field(None, description="Node types in use with their replicas, in one line.")
    replicas: int = Field(description="Pods that exist.")
    ready_replicas: int = Field(description="Pods that answer requests.")
    selector: str = Field(description="Label selector of the engine pods, for the scale subresource.")
    url: str | None = Field(None, description="Address inside the cluster; the OpenAI API is below /v1.")

    def to_manifest(self) -> dict[str, Any]:
        """The status as the API server keeps it."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)
