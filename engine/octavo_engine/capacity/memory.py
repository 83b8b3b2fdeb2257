"""Bytes of an engine by use: weights, activations, CUDA graphs, the process itself."""

from octavo_kernels.hardware import Hardware

from octavo_engine.errors import CapacityError
from octavo_engine.geometry import DTYPE_BYTES, Geometry

GIB = 1 << 30
FLOAT8 = "float8_e4m3fn"
# What a process holds beside all that is counted: interpreter and libraries; on a GPU its context and loaded kernels
# (measured on an H100: 0.8 GiB, whatever the model).
RUNTIME_BYTES = {"cpu": 768 << 20, "gpu": 896 << 20}
# What torch's allocator loses on a GPU to rounding and to holes between what a step takes and frees.
FRAGMENTATION = 0.15


def weight_bytes(geometry: Geometry, hardware: Hardware, dtype: str, quantization: str = "none") -> int:
    """Bytes of the weights as the engine keeps them.

    A quantised checkpoint's linear layers stay as they are stored; int8 linear layers have one scale per output
    channel. A CPU multiplies a packed copy of each weight, so that an embedding which is also the output layer is there
    twice.
    """
    itemsize = DTYPE_BYTES[dtype]
    packed = 0 if hardware.is_gpu or not geometry.tie_word_embeddings else geometry.num_embedding_parameters
    rest = geometry.num_embedding_parameters + packed + geometry.num_other_parameters
    return _linear_bytes(geometry, itemsize, quantization) + rest * itemsize


def _linear_bytes(geometry: Geometry, itemsize: int, quantization: str) -> int:
    if quantization == "int8":
        num_channels = sum(each.out_features * each.count for each in geometry.matrices())
        return geometry.num_linear_parameters + num_channels * itemsize
    if geometry.weight_format is not None:
        return sum(geometry.weight_format.matrix_bytes(each) for each in geometry.matrices())
    return geometry.num_linear_parameters * itemsize


def activation_dtype(dtype: str, hardware: Hardware) -> str:
    """The type of activations and, by default, of the KV cache: a CPU computes with float16 weights in float32."""
    return "float32" if dtype == "float16" and not hardware.is_gpu else dtype


def resolve_weight_dtype(asked: str, geometry: Geometry, hardware: Hardware) -> str:
    """The weights' type: what was asked for; else float32 on a CPU, and on a GPU the checkpoint's if it has 16 bits."""
    if asked != "auto":
        return asked
    if not hardware.is_gpu:
        return "float32"
    is_served = geometry.dtype in ("bfloat16", "float16") and geometry.dtype in hardware.dtypes
    return geometry.dtype if is_served else "bfloat16"


def resolve_kv_cache_dtype(asked: str, dtype: str, hardware: Hardware) -> str:
    """The type of the cache's keys and values, as torch names it.

    asked: `EngineConfig.kv_cache_dtype`; dtype: the weights'
    Raises CapacityError for fp8 where the hardware does not compute with it.
    """
    if asked == "fp8":
        check_kv_cache_dtype(asked, hardware)
        return FLOAT8
    return activation_dtype(dtype, hardware) if asked == "auto" else asked


def check_kv_cache_dtype(asked: str, hardware: Hardware) -> None:
    """Raise CapacityError for fp8 on hardware without it: known before the model is."""
    if asked == "fp8" and FLOAT8 not in hardware.dtypes:
        raise CapacityError(
            f"kv_cache_dtype fp8 needs a GPU with 8-bit floats, such as an L4, an H100 or newer; {hardware.title} has "
            "none: use kv_cache_dtype auto"
        )


def activation_bytes(geometry: Geometry, dtype: str, num_tokens: int, num_seqs: int) -> int:
    """What sampling keeps of each sequence beside the widest moment of a step: its layers or, later, its logits."""
    layers = num_tokens * token_activation_bytes(geometry, dtype)
    return num_seqs * _counted_bytes(geometry) + max(layers, num_seqs * _logits_bytes(geometry, dtype))


def _counted_bytes(geometry: Geometry) -> int:
    """How often a sequence has seen each token, for its penalties."""
    return geometry.num_logits * 4


def _logits_bytes(geometry: Geometry, dtype: str) -> int:
    """A sequence's, as they are computed and in fp32."""
    return geometry.num_logits * (DTYPE_BYTES[dtype] + 4)


def seq_bytes(geometry: Geometry, dtype: str) -> int:
    """What a sequence of a step takes at most: what is counted of it, and its logits."""
    return _counted_bytes(geometry) + _logits_bytes(geometry, dtype)


def token_activation_bytes(geometry: Geometry, dtype: str) -> int:
    """Bytes that one token of a step takes in the widest layer."""
    features = 3 * geometry.hidden_size + _attention_features(geometry) + _mlp_features(geometry)
    return features * DTYPE_BYTES[dtype]


def _attention_features(geometry: Geometry) -> int:
    if geometry.latent is None:
        return geometry.num_qkv_features
    latent = geometry.latent
    head = 2 * latent.plain_dim + latent.rotary_dim + latent.value_dim
    return geometry.num_heads * head + latent.kv_rank + latent.rotary_dim


def _mlp_features(geometry: Geometry) -> int:
    dense = geometry.num_up_features + geometry.intermediate_size if geometry.num_dense_layers else 0
    if geometry.experts is None:
        return dense
    routed = geometry.experts.num_experts_per_token * geometry.experts.intermediate_size
    return max(dense, 3 * (routed + geometry.experts.shared_intermediate_size))


def runtime_bytes(hardware: Hardware, passing: int) -> int:
    """The process itself, and what the allocator loses of the `passing` bytes that steps take and free."""
    if not hardware.is_gpu:
        return RUNTIME_BYTES["cpu"]
    return RUNTIME_BYTES["gpu"] + int(passing * FRAGMENTATION)


def decode_graph_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes of the decode steps that become CUDA graphs: close enough that padding costs little, few enough that
    start-up is short."""
    steps = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_num_seqs + 32, 32)]
    return [*(size for size in steps if size < max_num_seqs), max_num_seqs]


def graph_bytes(geometry: Geometry, dtype: str, num_graph_tokens: int, num_seqs: int) -> int:
    """The memory that all graphs share: what the widest of them takes, one of prompts or one of decodes."""
    of_token = token_activation_bytes(geometry, dtype)
    decodes = num_seqs * (of_token + geometry.num_logits * DTYPE_BYTES[dtype])
    return max(num_graph_tokens * of_token, decodes)
