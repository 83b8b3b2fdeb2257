"""Capacity: geometry x hardware x dtype -> bytes, KV blocks, batch limits and the predicted roofline.

Pure and torch-free. The operator admits with it, the engine starts with it and reports predicted against actual.
"""

from dataclasses import dataclass

from octavo_kernels.hardware import Hardware

from octavo_engine.errors import CapacityError
from octavo_engine.geometry import DTYPE_BYTES, Geometry

GIB = 1 << 30
# What a process holds beside weights, activations and KV: interpreter, libraries, allocator slack.
RUNTIME_BYTES = {"cpu": 768 << 20, "gpu": 1536 << 20}
# A CPU's memory is everybody's: without an explicit num_kv_blocks the cache takes no more than this, or one context.
CPU_KV_BYTES = 4 * GIB


@dataclass(frozen=True, slots=True)
class Limits:
    """What the user fixed; None leaves the choice to the plan."""

    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    num_kv_blocks: int | None = None
    block_size: int = 16
    quantization: str = "none"


@dataclass(frozen=True, slots=True)
class Capacity:
    """The memory plan of one engine and the limits that follow from it. All sizes in bytes."""

    weight_bytes: int
    activation_bytes: int
    runtime_bytes: int
    kv_block_bytes: int
    num_kv_blocks: int
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    predicted_decode_ms: float
    predicted_prefill_tokens_per_s: float

    @property
    def kv_bytes(self) -> int:
        """The KV cache as a whole."""
        return self.num_kv_blocks * self.kv_block_bytes

    @property
    def total_bytes(self) -> int:
        """Everything that the engine will hold."""
        return self.weight_bytes + self.activation_bytes + self.runtime_bytes + self.kv_bytes

    @property
    def num_kv_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return self.num_kv_blocks * self.block_size


def weight_bytes(geometry: Geometry, hardware: Hardware, dtype: str, quantization: str = "none") -> int:
    """Bytes of the weights as the engine keeps them.

    int8 linear layers have one scale per output channel. A CPU multiplies a packed copy of each weight, so that an
    embedding which is also the output layer is there twice.
    """
    itemsize = DTYPE_BYTES[dtype]
    linear = geometry.num_linear_parameters * itemsize
    if quantization == "int8":
        outputs = geometry.num_qkv_features + geometry.num_up_features + 2 * geometry.hidden_size
        channels = geometry.num_layers * outputs
        linear = geometry.num_linear_parameters + channels * itemsize
    packed = 0 if hardware.is_gpu or not geometry.tie_word_embeddings else geometry.num_embedding_parameters
    rest = geometry.num_embedding_parameters + packed + geometry.num_other_parameters
    return linear + rest * itemsize


def activation_dtype(dtype: str, hardware: Hardware) -> str:
    """The type of activations and, by default, of the KV cache: a CPU computes with float16 weights in float32."""
    return "float32" if dtype == "float16" and not hardware.is_gpu else dtype


def step_limit_s(
    geometry: Geometry, hardware: Hardware, *, weight_bytes: int, kv_bytes: int, num_tokens: int, num_logits: int
) -> float:
    """The roofline of one step: bytes over bandwidth or arithmetic over rate, whichever takes longer.

    weight_bytes: all weights; of these the embedding's table is looked up, not read, unless it is the output layer, too
    kv_bytes:     keys and values that the step reads
    """
    table = geometry.vocab_size * geometry.hidden_size
    is_shared = geometry.tie_word_embeddings and hardware.is_gpu
    num_stored = geometry.num_parameters + (table if geometry.tie_word_embeddings and not is_shared else 0)
    read_share = 1 if is_shared else 1 - table / num_stored
    read_s = (weight_bytes * read_share + kv_bytes) / (hardware.memory_bandwidth_gbps * 1e9)
    linear = 2 * geometry.num_linear_parameters * num_tokens
    output = 2 * geometry.vocab_size * geometry.hidden_size * num_logits
    return max(read_s, (linear + output) / (hardware.bf16_tflops * 1e12))


def plan_capacity(
    geometry: Geometry,
    hardware: Hardware,
    memory_bytes: int,
    *,
    dtype: str,
    kv_cache_dtype: str,
    limits: Limits,
    memory_utilization: float = 0.9,
) -> Capacity:
    """Share `memory_bytes` of one device between weights, activations and KV blocks, and derive the limits.

    Raises CapacityError that says what does not fit and the smallest memory that would do.
    """
    kind = "gpu" if hardware.is_gpu else "cpu"
    usable = int(memory_bytes * memory_utilization)
    weights = weight_bytes(geometry, hardware, dtype, limits.quantization)
    block_bytes = geometry.kv_bytes_per_token(kv_cache_dtype) * limits.block_size
    batched_tokens = limits.max_num_batched_tokens or _default_batched_tokens(hardware)
    seqs_cap = limits.max_num_seqs or _default_seqs(hardware)
    activations = _activation_bytes(geometry, activation_dtype(dtype, hardware), batched_tokens, seqs_cap)
    fixed = weights + activations + RUNTIME_BYTES[kind]
    fitting_blocks = max(0, usable - fixed) // block_bytes

    max_model_len = limits.max_model_len or geometry.max_position_embeddings
    one_request = _ceil_div(max_model_len, limits.block_size)
    if limits.max_model_len is None and 0 < fitting_blocks < one_request:
        max_model_len, one_request = fitting_blocks * limits.block_size, fitting_blocks
    wanted_blocks = one_request * seqs_cap
    if not hardware.is_gpu:
        wanted_blocks = min(wanted_blocks, max(one_request, CPU_KV_BYTES // block_bytes))
    num_blocks = limits.num_kv_blocks or min(fitting_blocks, wanted_blocks)
    if num_blocks > fitting_blocks or fitting_blocks == 0 or one_request > num_blocks:
        needed = fixed + max(num_blocks, one_request) * block_bytes
        raise CapacityError(
            f"{geometry.architecture} in {dtype} needs {needed / memory_utilization / GIB:.1f} GiB for a context of "
            f"{max_model_len} tokens ({weights / GIB:.1f} GiB of weights); {hardware.title} offers "
            f"{memory_bytes / GIB:.1f} GiB: lower max_model_len or num_kv_blocks, or take larger hardware"
        )
    max_num_seqs = min(seqs_cap, num_blocks)
    context = min(max_model_len, 1024)
    kv_read = geometry.kv_bytes_per_token(kv_cache_dtype) * context * max_num_seqs
    decode_s = step_limit_s(
        geometry, hardware, weight_bytes=weights, kv_bytes=kv_read, num_tokens=max_num_seqs, num_logits=max_num_seqs
    )
    prefill_s = step_limit_s(
        geometry, hardware, weight_bytes=weights, kv_bytes=0, num_tokens=batched_tokens, num_logits=1
    )
    return Capacity(
        weight_bytes=weights,
        activation_bytes=activations,
        runtime_bytes=RUNTIME_BYTES[kind],
        kv_block_bytes=block_bytes,
        num_kv_blocks=num_blocks,
        block_size=limits.block_size,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max(batched_tokens, max_num_seqs),
        predicted_decode_ms=decode_s * 1e3,
        predicted_prefill_tokens_per_s=batched_tokens / prefill_s,
    )


def _default_batched_tokens(hardware: Hardware) -> int:
    """A step long enough to fill the arithmetic units, short enough that running requests do not wait for it."""
    return 8192 if hardware.is_gpu else 256


def _default_seqs(hardware: Hardware) -> int:
    return 512 if hardware.is_gpu else 64


def _activation_bytes(geometry: Geometry, dtype: str, num_tokens: int, num_seqs: int) -> int:
    """The widest moment of a step: the MLP's projections beside the residual, or the logits in fp32."""
    itemsize = DTYPE_BYTES[dtype]
    mlp = geometry.num_up_features + geometry.intermediate_size
    layer = num_tokens * itemsize * (3 * geometry.hidden_size + geometry.num_qkv_features + mlp)
    logits = 3 * num_seqs * geometry.vocab_size * 4
    return layer + logits


def _ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)
