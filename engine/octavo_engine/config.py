"""The engine's whole configuration: one frozen object, checked at start, shared by engine and operator.

The operator builds an `EngineConfig` and writes it as YAML into a ConfigMap; `octavo serve` reads that file. Each field
is also a flag (`--max-model-len`) and a variable (`OCTAVO_MAX_MODEL_LEN`). A flag wins over a variable, a variable over
the file, the file over the default. This module knows neither torch nor where a value is used.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import yaml
from octavo_kernels.hardware import CPU, KERNEL_VARIANTS
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from octavo_engine.errors import ConfigError

ENVIRONMENT_PREFIX = "OCTAVO_"

DataType = Literal["auto", "float32", "bfloat16", "float16"]
KvCacheDtype = Literal["auto", "float32", "bfloat16", "float16", "fp8"]
Quantization = Literal["none", "int8"]
Device = Literal["auto", "cpu", "cuda"]
LoadFormat = Literal["auto", "dummy"]
LogLevel = Literal["debug", "info", "warning", "error"]

PositiveInt = Annotated[int, Field(ge=1)]

# What a LeaderWorkerSet tells each of its pods, and the fields that take it where nothing else says them.
LEADER_WORKER_SET: Mapping[str, str] = {"node_rank": "LWS_WORKER_INDEX", "leader_address": "LWS_LEADER_ADDRESS"}
LEADER_WORKER_SET_SIZE = "LWS_GROUP_SIZE"
LEADER_PORT = 29400


class EngineConfig(BaseModel):
    """Everything that one engine replica is told. `None` means that Octavo decides from model and hardware."""

    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True)

    model: str = Field(
        min_length=1,
        description="Model to serve: a folder, a .gguf file, hf://organisation/name[@revision], s3://bucket/prefix, "
        "oci://registry/repository:tag, or pkg://python-package/file.gguf for a file that an installed Python package "
        "carries.",
    )
    served_model_name: str | None = Field(
        None, min_length=1, description="Name in the API; default: the last part of the model's address."
    )
    host: str = Field("0.0.0.0", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    device: Device = Field("auto", description="Where the model runs; auto: the GPU if there is one.")
    dtype: DataType = Field(
        "auto",
        description="Data type of weights and activations; auto: the model's on a GPU, float32 on a CPU. "
        "float16 on a CPU: weights only, activations in float32.",
    )
    load_format: LoadFormat = Field(
        "auto",
        description="Where weights come from: auto reads the model's files; dummy draws random ones, for measurements "
        "without a checkpoint, so that the model's folder needs nothing but config.json.",
    )
    quantization: Quantization = Field(
        "none",
        description="Weights of linear layers: none keeps the dtype; int8, with one scale per output "
        "channel, saves memory and costs some accuracy.",
    )
    kv_cache_dtype: KvCacheDtype = Field(
        "auto",
        description="Data type of the KV cache; auto: the activations'; fp8: 8-bit floats (e4m3), on GPUs that have "
        "them, for twice the tokens.",
    )
    kernel_variant: str | None = Field(
        None, description="Set of tuned kernels that a GPU runs, such as hopper; default: by the hardware table."
    )
    max_model_len: PositiveInt | None = Field(
        None,
        description="Longest context in tokens, prompt and answer together; default: the model's, if it fits.",
    )
    max_num_seqs: PositiveInt | None = Field(None, description="Most requests that run at once.")
    max_num_batched_tokens: PositiveInt | None = Field(None, description="Token budget of one step.")
    block_size: Literal[8, 16, 32, 64, 128] = Field(16, description="Tokens in one block of the KV cache.")
    num_kv_blocks: PositiveInt | None = Field(None, description="Blocks in the KV cache; default: what fits.")
    memory_utilization: float = Field(
        0.9, gt=0, le=1, description="Share of the device's memory that the engine may use."
    )
    memory_gib: float | None = Field(
        None,
        gt=0,
        description="Memory that the engine may use in GiB; default: the device's, or the container's.",
    )
    tensor_parallel_size: PositiveInt = Field(
        1, description="GPUs that each layer is spread over; on a CPU, processes that share its cores."
    )
    pipeline_parallel_size: PositiveInt = Field(
        1,
        description="Stages of consecutive layers, each on GPUs of its own: room for a larger model, at no more speed.",
    )
    num_nodes: PositiveInt = Field(1, description="Nodes, such as pods, that the engine is spread over equally.")
    node_rank: int = Field(
        0, ge=0, description="Which of the nodes this is; node 0 serves HTTP, others only answer probes."
    )
    leader_address: str | None = Field(
        None,
        min_length=1,
        description=f"HOST or HOST:PORT of node 0, where the other nodes join it; without a port {LEADER_PORT}.",
    )
    enable_prefix_caching: bool = Field(True, description="Share KV blocks between requests with equal prefixes.")
    enable_cuda_graphs: bool = Field(
        True, description="Capture decode steps as CUDA graphs; without them each kernel is launched by the host."
    )
    kernel_cache_dir: str | None = Field(
        None,
        min_length=1,
        description="Folder where compiled GPU kernels are kept for later starts, such as a pod's volume; default: "
        "octavo/kernels in the user's cache folder.",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Seeds requests that bring no seed of their own.")
    num_threads: PositiveInt | None = Field(
        None, description="CPU threads of the engine, or of each of its ranks; default: all it may use."
    )
    chat_template: str | None = Field(None, description="File with a Jinja chat template; default: the model's own.")
    drain_timeout_s: float = Field(30.0, ge=0, description="Seconds that running requests get to finish after SIGTERM.")
    stall_timeout_s: float = Field(
        60.0, gt=0, description="Seconds without a finished step, while work waits, after which /livez fails."
    )
    log_level: LogLevel = Field("info", description="How much is logged.")

    @field_validator("block_size", mode="before")
    @classmethod
    def _read_number(cls, value: Any) -> Any:
        """A variable's text as the number that it is: pydantic does so for integers, but not for a choice of them."""
        return int(value) if isinstance(value, str) and value.isdecimal() else value

    @field_validator("kernel_variant")
    @classmethod
    def _check_variant(cls, value: str | None) -> str | None:
        names = [name for name in KERNEL_VARIANTS if name != CPU.kernel_variant]
        if value is not None and value not in names:
            raise ValueError(f"{value} is no set of kernels: there are {', '.join(names)}")
        return value

    @field_validator("leader_address")
    @classmethod
    def _check_address(cls, value: str | None) -> str | None:
        if value is not None:
            _split_address(value)
        return value

    @property
    def leader(self) -> tuple[str, int]:
        """Host and port of node 0; without an address, which node 0 does not need, the host is empty."""
        return _split_address(self.leader_address or "")

    @property
    def model_name(self) -> str:
        """The name under which the API serves the model."""
        if self.served_model_name:
            return self.served_model_name
        name = self.model.rstrip("/").rsplit("/", 1)[-1].split("@", 1)[0]
        if self.model.startswith("oci://"):
            name = name.split(":", 1)[0]
        return name.removesuffix(".gguf") or self.model

    @property
    def num_ranks(self) -> int:
        """Processes that run the model, one for each GPU."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def num_local_ranks(self) -> int:
        """Those on this node."""
        return self.num_ranks // self.num_nodes

    def to_yaml(self) -> str:
        """The configuration file that makes this object again: only what differs from the defaults, plus the model."""
        values = self.model_dump(mode="json", exclude_defaults=True)
        return yaml.safe_dump(values, sort_keys=True)


def load_config(
    flags: Mapping[str, Any], environment: Mapping[str, str], config_file: Path | None = None
) -> EngineConfig:
    """Merge flags over OCTAVO_* variables over the file over the defaults.

    flags: field name -> value, without those that were not given.
    Raises ConfigError that names the flag, the variable or the file's field, and what it should be.
    """
    from_file = _read_file(config_file) if config_file else {}
    from_environment = _read_environment(environment)
    values = {**from_file, **from_environment, **flags}
    if "model" not in values:
        raise ConfigError("no model given: name one as `octavo serve MODEL`, in OCTAVO_MODEL or in the --config file")
    try:
        config = EngineConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error, flags, from_environment, config_file)) from None
    if config.num_nodes > 1:
        config = _complete_from_leader_worker_set(values, environment)
    _check_ranks(config)
    return config


def _read_file(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration file {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"the configuration file {path} is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"the configuration file {path} must hold a mapping of field names to values")
    return values


def _read_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The OCTAVO_* variables that name a field. Others of that prefix belong to other programs and are left alone."""
    names = {f"{ENVIRONMENT_PREFIX}{name.upper()}": name for name in EngineConfig.model_fields}
    return {names[key]: value for key, value in environment.items() if key in names}


def _split_address(address: str) -> tuple[str, int]:
    """Host and port. Raises ValueError for what is no HOST, HOST:PORT or [IPV6]:PORT."""
    parts = urlsplit(f"//{address}")
    try:
        port = parts.port
    except ValueError:
        port = 0
    if port == 0 or parts.netloc != address or parts.username is not None:
        raise ValueError("it must be HOST or HOST:PORT")
    return parts.hostname or "", port or LEADER_PORT


def _complete_from_leader_worker_set(values: Mapping[str, Any], environment: Mapping[str, str]) -> EngineConfig:
    """`values`, which are valid, over what the pod's LeaderWorkerSet says."""
    given = {field: environment[name] for field, name in LEADER_WORKER_SET.items() if name in environment}
    try:
        config = EngineConfig.model_validate({**given, **values})
    except ValidationError as error:
        problem = error.errors()[0]
        name = LEADER_WORKER_SET[str(problem["loc"][0])]
        raise ConfigError(f"{name}={problem['input']!r}: {_uncapitalised(problem['msg'])}") from None
    group_size = environment.get(LEADER_WORKER_SET_SIZE)
    if group_size is not None and group_size != str(config.num_nodes):
        raise ConfigError(f"num_nodes={config.num_nodes}, but {LEADER_WORKER_SET_SIZE}={group_size}")
    return config


def _check_ranks(config: EngineConfig) -> None:
    """Raise ConfigError if the engine's processes cannot be laid out as the fields say."""
    if config.num_ranks % config.num_nodes:
        raise ConfigError(
            f"{config.num_ranks} GPUs (tensor_parallel_size x pipeline_parallel_size) cannot be divided among "
            f"num_nodes={config.num_nodes}"
        )
    if config.node_rank >= config.num_nodes:
        raise ConfigError(f"node_rank={config.node_rank} is none of {config.num_nodes} nodes, counted from 0")
    if config.node_rank and not config.leader_address:
        raise ConfigError(f"node_rank={config.node_rank} needs leader_address, the host of node 0")


def _explain(
    error: ValidationError,
    flags: Mapping[str, Any],
    from_environment: Mapping[str, str],
    config_file: Path | None,
) -> str:
    problem = error.errors()[0]
    field = str(problem["loc"][0]) if problem["loc"] else "model"
    if field in flags:
        place = "MODEL" if field == "model" else f"--{field.replace('_', '-')}"
    elif field in from_environment:
        place = f"{ENVIRONMENT_PREFIX}{field.upper()}"
    else:
        place = f"{field} in {config_file}"
    if problem["type"] == "extra_forbidden":
        return f"{place}: there is no such field; `octavo serve --help` lists them"
    return f"{place}={problem['input']!r}: {_uncapitalised(problem['msg'])}"


def _uncapitalised(text: str) -> str:
    return text[0].lower() + text[1:]
