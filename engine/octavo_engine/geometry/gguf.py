"""A GGUF header -> the geometry (field names: the GGUF specification)."""

from collections import ChainMap
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any, cast

from octavo_engine.errors import UnsupportedModelError
from octavo_engine.geometry.shapes import Geometry
from octavo_engine.gguf_file import GgufFile

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
    """The geometry that a GGUF header states.

    Raises UnsupportedModelError for an architecture that Octavo does not read from GGUF, and for numbers that make no
    sense.
    """
    name = metadata.get("general.architecture")
    if name not in GGUF_ARCHITECTURES:
        known = ", ".join(sorted(GGUF_ARCHITECTURES))
        raise UnsupportedModelError(f"GGUF architecture {name!r} is not supported; supported: {known}")

    def number(key: str, default: int | None = None) -> int:
        value = metadata.get(f"{name}.{key}", default)
        if value is None:
            raise UnsupportedModelError(f"the GGUF header lacks {name}.{key}")
        if not isinstance(value, int) or value < 1:
            raise UnsupportedModelError(f"the GGUF header's {name}.{key} must be a positive integer, not {value!r}")
        return value

    if metadata.get("split.count", 1) not in (0, 1):
        raise UnsupportedModelError(
            f"the GGUF file is one of {metadata['split.count']} parts of a model: make one file of them with"
            " llama-gguf-split --merge"
        )
    if metadata.get(f"{name}.expert_count"):
        raise UnsupportedModelError(f"GGUF models with experts are not supported: {name}.expert_count is not 0")
    num_heads = number("attention.head_count")
    num_kv_heads = number("attention.head_count_kv", num_heads)
    if num_heads % num_kv_heads:
        raise UnsupportedModelError(f"the GGUF header's {num_heads} heads are no multiple of {num_kv_heads} KV heads")
    hidden_size = number("embedding_length")
    return Geometry(
        architecture=GGUF_ARCHITECTURES[name],
        num_layers=number("block_count"),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=number("attention.key_length", hidden_size // num_heads),
        intermediate_size=number("feed_forward_length"),
        vocab_size=number("vocab_size", len(metadata.get("tokenizer.ggml.tokens", ())) or None),
        max_position_embeddings=number("context_length"),
        tie_word_embeddings="output.weight" not in metadata["octavo.tensor_names"],
        dtype="float32",
        has_attention_bias=name == "qwen2",
        sliding_window=metadata.get(f"{name}.attention.sliding_window"),
        has_qk_norm=name == "qwen3",
    )
