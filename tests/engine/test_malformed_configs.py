"""Whatever stands in a field of config.json: a model that can be built, or a typed error that says what is wrong."""

from typing import Any

import pytest
import torch
from octavo_engine.errors import OctavoError
from octavo_engine.geometry import geometry_from_config
from octavo_engine.models import find_model_class

SIZES = {
    "num_hidden_layers": 2, "hidden_size": 48, "num_attention_heads": 6, "vocab_size": 100,
    "max_position_embeddings": 64,
}  # fmt: skip
# Beside those that transformers writes: older names, and what only some files have.
OTHER_FIELDS = (
    "rope_scaling", "rope_theta", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types",
    "partial_rotary_factor", "rotary_pct", "rotary_emb_base", "text_config", "original_max_position_embeddings",
    "torch_dtype", "quantization_config", "attention_bias", "mlp_bias", "ffn_hidden_size", "intermediate_size",
)  # fmt: skip
VALUES = (None, "text", [], [1], {}, -1, 0, 1.5, True, float("nan"), 2**70, {"a": 1})


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3", "GPTNeoX", "Falcon"])
def test_a_field_with_anything_in_it_is_no_traceback(family: str) -> None:
    import transformers

    config: dict[str, Any] = getattr(transformers, f"{family}Config")(**SIZES).to_dict()
    config["architectures"] = [f"{family}ForCausalLM"]
    if "num_key_value_heads" in config:
        config["num_key_value_heads"] = 2
    num_built = 0
    for field in {*config, *OTHER_FIELDS}:
        for value in VALUES:
            changed = {**config, field: value}
            try:
                geometry = geometry_from_config(changed)
                with torch.device("meta"):
                    find_model_class(geometry.architecture).from_config(geometry, changed, 64)
            except OctavoError:
                continue
            num_built += 1
    assert num_built > 50, "most fields mean nothing to a model"
