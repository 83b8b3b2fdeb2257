"""A model's geometry: the numbers that fix its bytes, read from `config.json` or from a GGUF header.

Torch-free, so that the operator plans with the very numbers that the engine starts with. It knows shapes and counts,
not how a layer computes.
"""

import json
from collections import ChainMap
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from octavo_engine.errors import ModelSourceError, UnsupportedModelError
from octavo_engine.gguf_file import GgufFile

DTYPE_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "float8_e4m3fn": 1}


@dataclass(frozen=True, slots=True)
class Geometry:
    """Shapes of a decoder-only transformer. The defaults are LLaMA's.

    architecture:       the class name of `config.json`, such as LlamaForCausalLM
    dtype:              data type of the checkpoint's weights; for quantised GGUF files the type they dequantise to
    has_attention_bias: of the query, key and value projections; has_output_bias: of the one after attention
    sliding_window:     tokens that a layer with a window sees; None: no layer has one
    has_qk_norm:        each query and key head is normalised, with one weight for all heads of a layer
    has_gated_mlp:      two projections up, one of them the gate of the other; else one
    has_norm_bias:      norms have a bias beside their weight
    num_layer_norms:    norms of the residual stream in each layer
    """

    architecture: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    dtype: str
    has_attention_bias: bool = False
    has_mlp_bias: bool = False
    sliding_window: int | None = None
    has_output_bias: bool = False
    has_qk_norm: bool = False
    has_gated_mlp: bool = True
    has_norm_bias: bool = False
    num_layer_norms: int = 2

    @property
    def num_qkv_features(self) -> int:
        """Outputs of a layer's query, key and value projections."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def num_up_features(self) -> int:
        """Outputs of what comes first in a layer's MLP."""
        return self.intermediate_size * (2 if self.has_gated_mlp else 1)

    @property
    def num_linear_parameters(self) -> int:
        """Weights of the attention and MLP projections: what a quantisation of linear layers shrinks."""
        attention = self.hidden_size * (self.num_qkv_features + self.num_heads * self.head_dim)
        mlp = self.hidden_size * (self.num_up_features + self.intermediate_size)
        return self.num_layers * (attention + mlp)

    @property
    def num_embedding_parameters(self) -> int:
        """Input embedding, and output embedding where it is not tied to it."""
        return self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)

    @property
    def num_other_parameters(self) -> int:
        """Norms and biases."""
        norms = (self.num_layers * self.num_layer_norms + 1) * self.hidden_size * (2 if self.has_norm_bias else 1)
        qk_norms = 2 * self.head_dim if self.has_qk_norm else 0
        attention = self.num_qkv_features if self.has_attention_bias else 0
        output = self.hidden_size if self.has_output_bias else 0
        mlp = self.num_up_features + self.hidden_size if self.has_mlp_bias else 0
        return norms + self.num_layers * (qk_norms + attention + output + mlp)

    @property
    def num_parameters(self) -> int:
        """All weights."""
        return self.num_linear_parameters + self.num_embedding_parameters + self.num_other_parameters

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Bytes of keys and values that one token keeps, over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * DTYPE_BYTES[dtype]


def read_geometry(path: Path) -> Geometry:
    """The geometry of a model on disk: a folder with `config.json`, a `config.json`, or a `.gguf` file.

    Raises ModelSourceError where a file is missing or unreadable, UnsupportedModelError where its numbers contradict.
    """
    if path.suffix == ".gguf":
        return geometry_from_gguf(read_gguf_metadata(path))
    config_file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelSourceError(f"{path} has no config.json and is no .gguf file, so it is not a model") from None
    except (OSError, ValueError) as error:
        raise ModelSourceError(f"cannot read {config_file}: {error}") from None
    return geometry_from_config(config)


def geometry_from_config(config: Mapping[str, Any]) -> Geometry:
    """The geometry that a Hugging Face `config.json` states.

    Raises UnsupportedModelError that names the missing or contradictory field.
    """
    config = {**config, **config.get("text_config", {})}
    architectures = config.get("architectures") or [str(config.get("model_type", "unknown"))]
    architecture = str(architectures[0])
    return _READERS.get(architecture, _read_llama)(architecture, config)


def _read_llama(architecture: str, config: Mapping[str, Any]) -> Geometry:
    """LLaMA's spelling, which most families share; the others translate theirs into it."""
    hidden_size = _count(config, "hidden_size")
    num_heads = _count(config, "num_attention_heads")
    num_kv_heads = int(config.get("num_key_value_heads") or num_heads)
    if num_heads % num_kv_heads:
        raise UnsupportedModelError(
            f"config.json: num_attention_heads={num_heads} is not a multiple of num_key_value_heads={num_kv_heads}"
        )
    has_attention_bias = bool(config.get("attention_bias", False))
    return Geometry(
        architecture=architecture,
        num_layers=_count(config, "num_hidden_layers"),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=int(config.get("head_dim") or hidden_size // num_heads),
        intermediate_size=_count(config, "intermediate_size"),
        vocab_size=_count(config, "vocab_size"),
        max_position_embeddings=_count(config, "max_position_embeddings"),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
        has_attention_bias=has_attention_bias,
        has_mlp_bias=bool(config.get("mlp_bias", False)),
        sliding_window=config.get("sliding_window") if config.get("use_sliding_window", True) else None,
        has_output_bias=has_attention_bias,
    )


def _read_qwen2(architecture: str, config: Mapping[str, Any]) -> Geometry:
    common = _read_llama(architecture, {"use_sliding_window": False, **config})
    return replace(common, has_attention_bias=True, has_output_bias=False)


def _read_qwen3(architecture: str, config: Mapping[str, Any]) -> Geometry:
    common = _read_llama(architecture, {"use_sliding_window": False, "head_dim": 128, **config})
    return replace(common, has_qk_norm=True)


def _read_gpt_neox(architecture: str, config: Mapping[str, Any]) -> Geometry:
    common = _read_llama(architecture, {"attention_bias": True, **config, "mlp_bias": True})
    return replace(common, has_gated_mlp=False, has_norm_bias=True)


def _read_falcon(architecture: str, config: Mapping[str, Any]) -> Geometry:
    """Published files leave much to defaults: the sizes of the MLP and the context, and that embeddings are tied."""
    has_bias = bool(config.get("bias", False))
    common = _read_llama(
        architecture,
        {
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
            **config,
            "num_key_value_heads": _num_falcon_kv_heads(config),
            "intermediate_size": config.get("ffn_hidden_size") or 4 * _count(config, "hidden_size"),
            "attention_bias": has_bias,
            "mlp_bias": has_bias,
        },
    )
    num_norms = _num_falcon_norms(config)
    return replace(common, has_gated_mlp=False, has_norm_bias=True, num_layer_norms=num_norms)


def _num_falcon_kv_heads(config: Mapping[str, Any]) -> int | None:
    """None: as many as query heads."""
    if config.get("new_decoder_architecture"):
        return config.get("num_kv_heads")
    return 1 if config.get("multi_query", True) else None


def _num_falcon_norms(config: Mapping[str, Any]) -> int:
    """Attention and MLP that read the same input share its norm, unless the newer architecture gives each its own."""
    if config.get("new_decoder_architecture"):
        return int(config.get("num_ln_in_parallel_attn") or 2)
    return 1 if config.get("parallel_attn", True) else 2


# Architecture -> how its config.json is read, where that differs from LLaMA's.
_READERS: Mapping[str, Callable[[str, Mapping[str, Any]], Geometry]] = {
    "Qwen2ForCausalLM": _read_qwen2,
    "Qwen3ForCausalLM": _read_qwen3,
    "GPTNeoXForCausalLM": _read_gpt_neox,
    "FalconForCausalLM": _read_falcon,
}


def _count(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or value < 1:
        raise UnsupportedModelError(f"config.json: {name} must be a positive integer, not {value!r}")
    return value


GGUF_ARCHITECTURES: dict[str, str] = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def read_gguf_metadata(path: Path) -> Mapping[str, Any]:
    """The key-value pairs of a GGUF header as Python values, and `octavo.tensor_names`.

    Raises ModelSourceError if the file is missing or is not GGUF.
    """
    return gguf_metadata(GgufFile(path))


def gguf_metadata(file: GgufFile) -> Mapping[str, Any]:
    """The pairs of an open file and `octavo.tensor_names`: what `geometry_from_gguf` reads."""
    return ChainMap({"octavo.tensor_names": frozenset(file.tensors)}, cast("MutableMapping[str, Any]", file.metadata))


def geometry_from_gguf(metadata: Mapping[str, Any]) -> Geometry:
    """The geometry that a GGUF header states (field names: the GGUF specification).

    Raises UnsupportedModelError for an architecture that Octavo does not read from GGUF.
    """
    name = metadata.get("general.architecture")
    if name not in GGUF_ARCHITECTURES:
        known = ", ".join(sorted(GGUF_ARCHITECTURES))
        raise UnsupportedModelError(f"GGUF architecture {name!r} is not supported; supported: {known}")

    def number(key: str, default: int | None = None) -> int:
        value = metadata.get(f"{name}.{key}", default)
        if value is None:
            raise UnsupportedModelError(f"the GGUF header lacks {name}.{key}")
        return int(value)

    num_heads = number("attention.head_count")
    hidden_size = number("embedding_length")
    return Geometry(
        architecture=GGUF_ARCHITECTURES[name],
        num_layers=number("block_count"),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=number("attention.head_count_kv", num_heads),
        head_dim=number("attention.key_length", hidden_size // num_heads),
        intermediate_size=number("feed_forward_length"),
        vocab_size=number("vocab_size", len(metadata["tokenizer.ggml.tokens"])),
        max_position_embeddings=number("context_length"),
        tie_word_embeddings="output.weight" not in metadata["octavo.tensor_names"],
        dtype="float32",
        has_attention_bias=name == "qwen2",
        sliding_window=metadata.get(f"{name}.attention.sliding_window"),
        has_qk_norm=name == "qwen3",
    )
