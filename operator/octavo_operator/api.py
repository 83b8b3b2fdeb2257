"""The `InferenceService` resource, typed: what a user may write and what the operator reports.

The one source of the CRD (`crd.py` generates it) and of every reader of a spec. It states shapes and rules, never
defaults: what a field's absence means is decided in `plan.py`, so that nothing is ever written back to a spec.
"""

from typing import Annotated, Any, Literal

from octavo_engine.config import DataType, KvCacheDtype, Quantization
from octavo_kernels.hardware import KERNEL_VARIANTS
from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

GROUP = "octavo.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "InferenceService"
PLURAL = "inferenceservices"

# The Service takes the resource's name, and Deployments and pods add a node type to it.
MAX_NAME_LENGTH = 40

PositiveInt = Annotated[int, Field(ge=1, le=2**31 - 1)]
# Sixteen nodes with sixteen GPUs each.
GpuCount = Annotated[int, Field(ge=1, le=256)]
LabelText = Annotated[str, Field(max_length=63)]
QualifiedName = Annotated[str, Field(min_length=1, max_length=317)]
ObjectName = Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")]
# No list of names: HardwareProfiles add to them, and the plan says which there are.
HardwareName = Annotated[str, Field(max_length=63, pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$")]


def rules(*pairs: tuple[str, str]) -> dict[str, Any]:
    """CEL rules with the sentence that the API server answers with when one is broken."""
    return {"x-kubernetes-validations": [{"rule": rule, "message": message} for rule, message in pairs]}


PRESERVE_UNKNOWN: dict[str, Any] = {"x-kubernetes-preserve-unknown-fields": True}
# An object of the Kubernetes API, which the API server itself checks when it is applied.
FreeObject = Annotated[dict[str, Any], Field(json_schema_extra=PRESERVE_UNKNOWN)]


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
        description="Where the model is: hf://organisation/name for the Hugging Face hub, s3://bucket/prefix for a "
        "folder (or s3://bucket/file.gguf) in S3 or what speaks its protocol, oci://registry/repository:tag for an "
        "artifact or image in a container registry, pkg://python-package/file.gguf for a file that a Python package of "
        "the engine's image carries, or an absolute path (or file://) in the engine's container, which podTemplate can "
        "mount.",
        json_schema_extra=rules(
            (
                r"self.matches('^(hf://[^/@ ]+(/[^/@ ]+)?(@[^@ ]+)?|s3://[a-z0-9][a-z0-9.-]+[a-z0-9](/[^ ]*)?|"
                r"oci://(localhost|[^/@ ]*[.:][^/@ ]*)/[a-z0-9][a-z0-9._/-]*(:[a-zA-Z0-9_][a-zA-Z0-9_.-]*)?"
                r"(@sha256:[0-9a-f]{64})?|pkg://[^/ ]+/[^ ]+[.]gguf|(file://)?/[^ ]+)$')",
                "model.uri must be hf://organisation/name[@revision], s3://bucket/prefix, "
                "oci://registry/repository:tag, pkg://python-package/file.gguf, or an absolute path",
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
    geometry: dict[str, Any] | None = Field(
        None,
        description="The model's geometry, as `octavo inspect MODEL` prints it, for a cluster in which nothing but the "
        "engine can read the model; absent: it is read from the model.",
        json_schema_extra=PRESERVE_UNKNOWN,
    )
    secret_ref: SecretReference | None = Field(
        None,
        description="Secret whose keys become environment variables of the engine: HF_TOKEN for a gated model; "
        "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, AWS_REGION and the like for s3://. For oci:// a "
        "Secret of the type kubernetes.io/dockerconfigjson, such as an image pull secret.",
    )


class HardwareChoice(Part):
    """Which devices the model may run on. Absent: Octavo compares all node types of the cluster."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "!has(self.types) || !has(self.exclude) || !self.types.exists(t, t in self.exclude)",
                "hardware.types and hardware.exclude must not name the same type",
            ),
            (
                "!has(self.preference) || !(self.preference in ['Even', 'Listed']) || has(self.types)",
                "hardware.preference Even and Listed are about hardware.types: name the types",
            ),
        )
    )

    types: list[HardwareName] | None = Field(
        None,
        min_length=1,
        max_length=16,
        description="Device types that may be used: rows of the hardware table, HardwareProfiles, or node types as "
        "status.plan names them, which is how MIG slices and time-sliced shares are asked for. "
        "One: all replicas run there. Several: replicas are spread over those of them that the cluster has and the "
        "model fits, one Deployment each, behind one Service. cpu is a type like the others.",
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )
    exclude: list[HardwareName] | None = Field(
        None,
        max_length=16,
        description="Device types that must not be used; a device's name excludes its slices and shares, too.",
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )
    preference: Literal["Even", "Listed", "Fastest", "Cheapest"] | None = Field(
        None,
        description="How replicas are shared between device types. Even: the same number on each of hardware.types. "
        "The others fill one type up to its devices before they take the next: Listed in the order of hardware.types, "
        "Fastest by predicted tokens per second, Cheapest by the pricePerHour of HardwareProfiles per predicted token. "
        "Absent: Even where hardware.types names several, else all replicas on the fastest type.",
    )
    gpus_per_replica: GpuCount | None = Field(
        None,
        description="GPUs of one replica, all of one type; absent: the fewest that hold the model. What one node does "
        "not have is spread over several, which takes LeaderWorkerSets.",
    )


class Parallelism(Part):
    """How a replica is spread over its GPUs. Absent: tensor parallelism over the fewest GPUs that hold the model."""

    tensor: GpuCount | None = Field(
        None,
        description="GPUs that share each layer; it divides the attention heads. Best within one node. Absent: all "
        "GPUs of a replica.",
    )
    pipeline: GpuCount | None = Field(
        None,
        description="Stages, each with its own layers on GPUs of its own; a step passes them in turn. Absent: one in "
        "each node of a replica.",
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
    kv_cache_dtype: KvCacheDtype | None = Field(
        None,
        description="Data type of the KV cache; absent: that of the weights; fp8: 8-bit floats, on GPUs with them.",
    )
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
    kernel_variant: str | None = Field(
        None,
        description="Set of tuned kernels that GPUs run; absent: by the hardware table.",
        json_schema_extra={"enum": [name for name in KERNEL_VARIANTS if name != "cpu"]},
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
    replan: Literal["Automatic", "Manual"] | None = Field(
        None,
        description="What happens when nodes, their labels, HardwareProfiles or the operator's version change so that "
        "a plan made anew would differ. Manual, or absent: what serves stays as it is, and the condition PlanOutdated "
        "says what would change; an edit of the spec, or of the annotation octavo.dev/replan, takes it up. "
        "Automatic: it is taken up at once, one node type after the other.",
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


class NetworkPolicy(Part):
    """Whom the engine pods may talk to; nothing else is let through, where the cluster's network enforces it."""

    ingress_from: list[FreeObject] | None = Field(
        None,
        min_length=1,
        max_length=64,
        description="Who may connect to the API's port, as in ingress.from of a NetworkPolicy; absent: everybody. "
        "A gateway and Prometheus have to be among them.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )
    egress: list[FreeObject] | None = Field(
        None,
        max_length=64,
        description="Where the pods may connect to beside DNS, as in egress of a NetworkPolicy; absent: ports 80 and "
        "443 of every address, where models come from. An empty list: nowhere.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )


class Security(Part):
    """What keeps others away from the engine."""

    network_policy: NetworkPolicy | None = Field(
        None, description="Makes NetworkPolicies for the engine pods; {} is one with all defaults. Absent: none."
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

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "!has(self.hardware) || !has(self.hardware.gpusPerReplica) || !has(self.parallelism) || "
                "(has(self.parallelism.tensor) && has(self.parallelism.pipeline) "
                "? self.parallelism.tensor * self.parallelism.pipeline == self.hardware.gpusPerReplica "
                ": (!has(self.parallelism.tensor) "
                "|| self.hardware.gpusPerReplica % self.parallelism.tensor == 0) && (!has(self.parallelism.pipeline) "
                "|| self.hardware.gpusPerReplica % self.parallelism.pipeline == 0))",
                "hardware.gpusPerReplica must be parallelism.tensor times parallelism.pipeline",
            ),
            (
                "!has(self.hardware) || !has(self.hardware.types) || self.hardware.types != ['cpu'] || "
                "((!has(self.hardware.gpusPerReplica) || self.hardware.gpusPerReplica == 1) && "
                "(!has(self.parallelism) || ((!has(self.parallelism.tensor) || self.parallelism.tensor == 1) && "
                "(!has(self.parallelism.pipeline) || self.parallelism.pipeline == 1))))",
                "an engine on a CPU is not spread: hardware.types: [cpu] goes with no parallelism",
            ),
        )
    )

    model: Model = Field(description="The model to serve.")
    hardware: HardwareChoice | None = Field(None, description="Which devices the model may run on.")
    parallelism: Parallelism | None = Field(None, description="How a replica is spread over its GPUs.")
    engine: Engine | None = Field(None, description="How the engine runs.")
    scaling: Scaling | None = Field(None, description="How many replicas there are.")
    rollout: Rollout | None = Field(None, description="How a change reaches running pods.")
    scheduling: Scheduling | None = Field(None, description="Where engine pods may run.")
    security: Security | None = Field(None, description="What keeps others away from the engine.")
    pod_template: PodTemplate | None = Field(
        None, description="Merged last into the engine pods, for what has no field of its own."
    )
    suspend: bool | None = Field(
        None, description="true stops all replicas and keeps everything else; absent or false: they run."
    )
    plan_only: bool | None = Field(
        None, description="true fills status.plan and creates nothing, to see what would be done."
    )


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
