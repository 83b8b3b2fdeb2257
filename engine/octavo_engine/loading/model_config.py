"""A model's configuration under the names of config.json, wherever it is kept."""

from collections.abc import Mapping
from typing import Any

from octavo_engine.errors import UnsupportedModelError
from octavo_engine.geometry.fields import part
from octavo_engine.gguf_file import GgufFile
from octavo_engine.loading.gguf_weights import FREQUENCY_FACTORS, read_tensor
from octavo_engine.model_source import ModelFiles


def read_model_config(files: ModelFiles) -> Mapping[str, object]:
    """The fields of a folder's config.json, with those of a model's part for text as if they stood outside.

    Raises ModelSourceError if it cannot be read, UnsupportedModelError if the weights are quantised.
    """
    config = files.read_json("config.json")
    quantization = config.get("quantization_config")
    if isinstance(quantization, dict):
        method = quantization.get("quant_method", "unknown")
        raise UnsupportedModelError(f"{files.address} holds weights quantised with {method}, which is not supported")
    return {**config, **part(config, "text_config")}


def config_from_gguf(file: GgufFile) -> Mapping[str, object]:
    """The keys of a GGUF header that a model reads beyond its geometry, as config.json would state them.

    Raises UnsupportedModelError for a rope scaling that config.json has no word for.
    """

    def value(key: str, default: Any = None) -> Any:
        return file.metadata.get(f"{file.architecture}.{key}", default)

    head_dim = value("attention.key_length") or value("embedding_length") // value("attention.head_count")
    return {
        "rms_norm_eps": value("attention.layer_norm_rms_epsilon", 1e-5),
        "rope_theta": value("rope.freq_base", 10_000.0),
        "max_position_embeddings": value("context_length"),
        "partial_rotary_factor": value("rope.dimension_count", head_dim) / head_dim,
        "rope_scaling": _rope_scaling(file),
    }


def _rope_scaling(file: GgufFile) -> Mapping[str, object] | None:
    prefix = f"{file.architecture}.rope."
    if FREQUENCY_FACTORS in file.tensors:
        factors = read_tensor(file, file.tensors[FREQUENCY_FACTORS])
        return {"rope_type": "factors", "frequency_factors": tuple(factors.tolist())}
    # Files older than rope.scaling.type say only by how much positions are divided.
    legacy_factor = file.metadata.get(f"{prefix}scale_linear")
    rope_type = file.metadata.get(f"{prefix}scaling.type", "linear" if legacy_factor else "none")
    if rope_type == "none":
        return None
    if rope_type not in ("linear", "yarn"):
        raise UnsupportedModelError(f"{file.path}: the rope scaling {rope_type!r} is not supported")
    return {
        "rope_type": rope_type,
        "factor": file.metadata.get(f"{prefix}scaling.factor", legacy_factor or 1.0),
        "original_max_position_embeddings": file.metadata.get(f"{prefix}scaling.original_context_length"),
    }
