"""The `InferenceService` resource, typed: what a user may write and what the operator reports.

The one source of the CRD (`crd.py` generates it) and of every reader of a spec. It states shapes and rules, never
defaults: what a field's absence means is decided in `plan.py`, so that nothing is ever written back to a spec.
"""

from typing import Annotated, Any, Literal

from octavo_engine.config import DataType, Quantization
from octavo_kernels.hardware import HARDWARE
from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

GROUP = "octavo.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "InferenceService"
PLURAL = "inferenceservices"

# The Service takes the resource's name, and Deployments and pods add a node type to it.
MAX_NAME_LENGTH = 40

HARDWARE_NAMES = [row.name for row in HARDWARE] + ["generic"]

PositiveInt = Annotated[int, Field(ge=1, le=2**31 - 1)]
LabelText = Annotated[str, Field(max_length=63)]
QualifiedName = Annotated[str, Field(min_length=1, max_length=317)]
ObjectName = Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")]
HardwareName = Annotated[str, Field(max_length=40, json_schema_extra={"enum": HARDWARE_NAMES})]


def rules(*pairs: tuple[str, str]) -> dict[str, Any]:
    """CEL rules with the sentence that the API server answers with when one is broken."""
    return {"x-kubernetes-validations": [{"rule": rule, "message": message} for rule, message in pairs]}


PRESERVE_UNKNOWN: dict[str, Any] = {"x-kubernetes-preserve-unknown-fields": True}


class Part(BaseModel):
    """Base of every part of the resource: camelCase in YAML, frozen, and no field that nobody knows."""

    model_config = ConfigDict(
        alias_generator=to_camel, validate_by_name=True, validate_by_alias=True, frozen=True, extra="forbid"
    )


class SecretReference(Part):
    """A Secret in the namespace of the resource."""

    name: ObjectName = Field(description="Name of the Secret.")


class Model(Part):
    """Which model is served."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "!has(self.revision) || (self.uri.startsWith('hf://') && !self.uri.contains('@'))",
                "model.revision belongs to an hf:// address that names no revision of its own",
            ),
        )
    )

    uri: str = Field(
        min_length=1,
        max_length=512,
        description="Where the model is: hf://organisation/name for the Hugging Face hub, "
        "pkg://python-package/file.gguf for a file that a Python package of the engine's image carries, or an "
        "absolute path (or file://) in the engine's container, which podTemplate can mount.",
        json_schema_extra=rules(
            (
                r"self.matches('^(hf://[^/@ ]+(/[^/@ ]+)?(@[^@ ]+)?|pkg://[^/ ]+/[^ ]+[.]gguf|(file://)?/[^ ]+)$')",
                "model.uri must be hf://organisation/name[@revision], pkg://python-package/file.gguf, "
                "or an absolute path",
            ),
        ),
    )
    revision: str | None = Field(
        None, min_length=1, max_length=128, description="Branch, tag or commit on the hub; absent: its default branch."
    )
    served_name: str | None = Field(
        None,
        min_length=1,
        max_length=128,
        description="Model name in the OpenAI API; absent: the last part of the uri.",
    )
    secret_ref: SecretReference | None = Field(
        None,
        description="Secret whose keys become environment variables of the engine, such as HF_TOKEN for a gated model.",
    )


class HardwareChoice(Part):
    """Which devices the model may run on. Absent: Octavo compares all node types of the cluster."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "!has(self.types) || !has(self.exclude) || !self.types.exists(t, t in self.exclude)",
                "hardware.types and hardware.exclude must not name the same type",
            ),
        )
    )

    types: list[HardwareName] | None = Field(
        None,
        min_length=1,
        max_length=16,
        description="Device types that may be used. One: all replicas run there. Several: replicas are spread over "
        "those of them that the cluster has and the model fits, one Deployment each, behind one Service. "
        "cpu is a type like the others.",
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )
    exclude: list[HardwareName] | None = Field(
        None,
        max_length=16,
        description="Device types that must not be used.",
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )


class EnvironmentVariable(Part):
    """One environment variable of the engine."""

    name: str = Field(
        min_length=1, max_length=128, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", description="Name of the variable."
    )
    value: str = Field(max_length=4096, description="Its value. For a secret one, use model.secretRef.")


class Engine(Part):
    """How the engine runs. Absent fields are derived from model and hardware, and shown in status.plan."""

    image: str | None = Field(
        None, min_length=1, max_length=512, description="Image of the engine; absent: the operator's own version."
    )
    dtype: DataType | None = Field(
        None, description="Data type of weights and activations; absent: the model's on a GPU, float32 on a CPU."
    )
    kv_cache_dtype: DataType | None = Field(None, description="Data type of the KV cache; absent: that of the weights.")
    quantization: Quantization | None = Field(
        None, description="int8 stores linear layers in one byte per weight; absent or none: as dtype says."
    )
    max_model_len: PositiveInt | None = Field(
        None,
        description="Longest context in tokens, prompt and answer together; absent: the model's own, or what fits.",
    )
    max_num_seqs: PositiveInt | None = Field(
        None, description="Most requests that run at once in one replica; absent: by hardware and memory."
    )
    max_num_batched_tokens: PositiveInt | None = Field(
        None, description="Token budget of one engine step; absent: by hardware."
    )
    extra_env: list[EnvironmentVariable] | None = Field(
        None,
        max_length=64,
        description="Environment variables of the engine; an OCTAVO_* one overrides the plan.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
    )


class Scaling(Part):
    """How many replicas there are."""

    replicas: int | None = Field(
        None,
        ge=0,
        le=1000,
        description="Engine replicas over all node types; absent: 1. `kubectl scale` writes this field.",
    )


class Rollout(Part):
    """How a change reaches running pods."""

    strategy: Literal["Auto", "Surge", "Recreate"] | None = Field(
        None,
        description="Surge starts a new pod before it stops an old one and needs a free device; Recreate stops first, "
        "one pod at a time. Auto, or absent: Surge where a device of that node type is free, else Recreate.",
    )
    progress_deadline_seconds: int | None = Field(
        None,
        ge=10,
        le=86400,
        description="Seconds without progress after which a rollout counts as Stalled; absent: by the model's size.",
    )


class Toleration(Part):
    """A taint that engine pods accept, as in a pod's spec."""

    key: str | None = Field(None, max_length=317, description="Key of the taint; absent with Exists: every key.")
    operator: Literal["Exists", "Equal"] | None = Field(None, description="Exists, or Equal (absent: Equal).")
    value: LabelText | None = Field(None, description="Value of the taint, for Equal.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        None, description="Effect of the taint; absent: every effect."
    )
    toleration_seconds: int | None = Field(
        None, description="For NoExecute: seconds that a pod stays after the taint appears."
    )


class TopologySpread(Part):
    """Spread of the replicas over zones, racks or nodes; the label selector is the resource's own."""

    topology_key: QualifiedName = Field(description="Node label that names the domain: topology.kubernetes.io/zone.")
    max_skew: PositiveInt = Field(description="Largest difference in replicas between two domains.")
    when_unsatisfiable: Literal["DoNotSchedule", "ScheduleAnyway"] = Field(
        description="Whether a pod waits (DoNotSchedule) or is placed all the same (ScheduleAnyway)."
    )


class Scheduling(Part):
    """Where engine pods may run, beside what the plan demands of a node."""

    node_selector: dict[QualifiedName, LabelText] | None = Field(
        None,
        max_length=32,
        description="Labels that a node must have. Nodes without them are not planned with either.",
    )
    tolerations: list[Toleration] | None = Field(
        None,
        max_length=32,
        description="Taints that are accepted. nvidia.com/gpu is tolerated on GPU types without being named.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )
    affinity: dict[str, Any] | None = Field(
        None,
        description="Affinity as in a pod's spec. The plan's own node requirements are added to each of its terms.",
        json_schema_extra=PRESERVE_UNKNOWN,
    )
    topology_spread: list[TopologySpread] | None = Field(
        None,
        max_length=8,
        description="Spread over failure domains.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["topologyKey"]},
    )
    priority_class_name: ObjectName | None = Field(None, description="PriorityClass of the engine pods.")
    runtime_class_name: ObjectName | None = Field(
        None, description="RuntimeClass of the engine pods, such as nvidia where it is not the node's default."
    )


class PodTemplate(Part):
    """What is merged last into the engine pods; lists with names (containers, volumes, env) merge by name."""

    model_config = ConfigDict(extra="allow", json_schema_extra=PRESERVE_UNKNOWN)

    metadata: dict[str, Any] | None = Field(
        None, description="Labels and annotations to add.", json_schema_extra=PRESERVE_UNKNOWN
    )
    spec: dict[str, Any] | None = Field(
        None,
        description="Pod spec to merge; the engine's container is named engine.",
        json_schema_extra=PRESERVE_UNKNOWN,
    )


class InferenceServiceSpec(Part):
    """What to serve, and on what. Only the model is required; each absent field is Octavo's to decide."""

    model: Model = Field(description="The model to serve.")
    hardware: HardwareChoice | None = Field(None, description="Which devices the model may run on.")
    engine: Engine | None = Field(None, description="How the engine runs.")
    scaling: Scaling | None = Field(None, description="How many replicas there are.")
    rollout: Rollout | None = Field(None, description="How a change reaches running pods.")
    scheduling: Scheduling | None = Field(None, description="Where engine pods may run.")
    pod_template: PodTemplate | None = Field(
        None, description="Merged last into the engine pods, for what has no field of its own."
    )
    suspend: bool | None = Field(
        None, description="true stops all replicas and keeps everything else; absent or false: they run."
    )
    plan_only: bool | None = Field(
        None, description="true fills status.plan and creates nothing, to see what would be done."
    )


class MemoryPlan(Part):
    """Bytes of one replica's device memory, by use."""

    weights: int = Field(description="Bytes of the weights.")
    kv: int = Field(description="Bytes of the KV cache.")
    activations: int = Field(description="Bytes of the widest step's activations.")
    runtime: int = Field(description="Bytes of interpreter, libraries and allocator.")
    reserve: int = Field(description="Bytes left free of what the replica may take.")


class Prediction(Part):
    """The roofline of one replica: a limit by bandwidth and arithmetic, not a measurement."""

    decode_ms: float = Field(description="Least milliseconds of one decode step with maxNumSeqs requests.")
    decode_tokens_per_second: int = Field(description="Most tokens per second in decode.")
    prefill_tokens_per_second: int = Field(description="Most prompt tokens per second.")


class VariantStatus(Part):
    """One node type that the resource runs on."""

    node_type: str = Field(description="Name of the node type.")
    product: str = Field(description="Product label of the GPU; CPU for a node without one.")
    arch: str = Field(description="CPU architecture of the node type and of the image.")
    replicas: int = Field(description="Replicas that are planned for this node type.")
    image: str = Field(description="Image of the engine.")
    kernel_variant: str = Field(description="Set of tuned kernels that the engine picks.")
    dtype: str | None = Field(None, description="Data type of weights and activations, where it is known.")
    max_model_len: int | None = Field(None, description="Longest context in tokens.")
    max_num_seqs: int | None = Field(None, description="Most requests that run at once in a replica.")
    max_num_batched_tokens: int | None = Field(None, description="Token budget of one step.")
    kv_blocks: int | None = Field(None, description="Blocks of the KV cache of a replica.")
    memory: MemoryPlan | None = Field(None, description="Memory of a replica; absent while the geometry is unknown.")
    predicted: Prediction | None = Field(None, description="Predicted limit of a replica's speed.")
    why: str = Field(description="Why this node type was chosen.")


class RejectedStatus(Part):
    """A node type, or nodes, that the resource does not run on."""

    node_type: str = Field(description="Name of the node type, or of the nodes.")
    why: str = Field(description="Why it was not chosen.")


class PlanStatus(Part):
    """What the operator decided."""

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
        "say which step is true.",
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


class Metadata(Part):
    """The part of ObjectMeta that planning reads."""

    model_config = ConfigDict(extra="ignore")

    name: str = Field(min_length=1, max_length=MAX_NAME_LENGTH, pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$")
    namespace: str = "default"
    uid: str = ""
    generation: int = 0


class InferenceService(Part):
    """A language model served on the cluster's own hardware; `kubectl explain inferenceservice.spec` shows the rest."""

    model_config = ConfigDict(extra="ignore")

    api_version: Literal["octavo.dev/v1alpha1"]
    kind: Literal["InferenceService"]
    metadata: Metadata
    spec: InferenceServiceSpec
