"""Rotary settings out of configurations of all generations: those of transformers, or a sentence."""

import copy
from typing import Any

import pytest
import torch
from octavo_engine.errors import UnsupportedModelError
from octavo_engine.layers.rope_config import read_rope_config
from octavo_kernels.ops.rotary import rotary_frequencies

HEAD_DIM, MAX_POSITION = 16, 128
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"type": "yarn", "factor": 4.0}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "older": {"rope_theta": 500.0, "rope_scaling": None},
    "newer": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "both": {
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 777.0},
        "rope_theta": 500.0,
    },
    "linear": {"rope_scaling": {"type": "linear", "factor": 2}},
    "llama3": {"rope_theta": 500.0, "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 32}},
    "llama3 with the length beside it": {"rope_scaling": LLAMA3, "original_max_position_embeddings": 32},
    "yarn": {"rope_scaling": {**YARN, "original_max_position_embeddings": 32}},
    "yarn without the length": {"rope_scaling": YARN},
    "yarn with the length beside it": {"rope_scaling": YARN, "original_max_position_embeddings": 32},
    "yarn with nulls": {
        "rope_scaling": {**YARN, "original_max_position_embeddings": 32, "attention_factor": None, "beta_fast": None}
    },
    "yarn with factors": {
        "rope_scaling": {
            **YARN, "original_max_position_embeddings": 32, "mscale": 0.7, "mscale_all_dim": 1.0, "beta_slow": 2.0,
            "truncate": False,
        },
    },
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 3.0, "original_max_position_embeddings": 32}},
}  # fmt: skip


@pytest.mark.parametrize("fields", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_frequencies_are_those_of_transformers(fields: dict[str, Any]) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    sizes = {"hidden_size": 4 * HEAD_DIM, "num_attention_heads": 4, "max_position_embeddings": MAX_POSITION}
    reference = LlamaRotaryEmbedding(LlamaConfig(**sizes, **copy.deepcopy(fields)))
    rope = read_rope_config({**sizes, **fields}, HEAD_DIM)
    frequencies, factor = rotary_frequencies(rope.rotary_dim, rope.theta, rope.scaling, MAX_POSITION)
    torch.testing.assert_close(frequencies, reference.inv_freq)
    assert factor == pytest.approx(reference.attention_scaling)


def test_settings_for_kinds_of_layers_count_where_they_agree() -> None:
    one = {"rope_type": "default", "rope_theta": 500.0}
    fields = {"rope_parameters": {"full_attention": one, "sliding_attention": dict(one)}}
    assert read_rope_config(fields, HEAD_DIM).theta == 500.0
    fields["rope_parameters"]["sliding_attention"]["rope_theta"] = 600.0
    with pytest.raises(UnsupportedModelError, match="rope_parameters that differ from layer to layer"):
        read_rope_config(fields, HEAD_DIM)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"rope_scaling": "linear"}, "rope_scaling must be an object"),
        ({"rope_scaling": {"type": "spiral"}}, "rope type 'spiral' is not supported; supported: default, linear"),
        ({"rope_scaling": {"type": ["yarn"]}}, "rope type"),
        ({"rope_scaling": {"type": "linear"}}, "the rope type linear needs a factor"),
        ({"rope_scaling": {"type": "yarn", "factor": None}}, "the rope type yarn needs a factor"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor must be a positive number, not '2'"),
        ({"rope_scaling": {"type": "linear", "factor": -2}}, "factor must be a positive number, not -2"),
        ({"rope_scaling": YARN, "max_position_embeddings": None}, "yarn needs max_position_embeddings"),
        ({"rope_scaling": {**YARN, "truncate": 1}}, "truncate must be true or false"),
        ({"rope_theta": float("nan")}, "rope_theta must be a positive number"),
        ({"rope_theta": True}, "rope_theta must be a positive number"),
        ({"partial_rotary_factor": 1.5}, "24 of 16 dimensions of a head cannot be rotated"),
    ],
)
def test_what_makes_no_sense_is_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UnsupportedModelError, match=sentence):
        read_rope_config({"max_position_embeddings": MAX_POSITION, **fields}, HEAD_DIM)
