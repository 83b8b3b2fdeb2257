"""What `octavo kernels tune --shapes` understands."""

import json
from pathlib import Path

import pytest
from octavo_kernels.linear_choice import LinearShape
from octavo_kernels.tuning.targets import Heads, read_target


def test_a_models_layers_are_those_of_its_weights() -> None:
    target = read_target("llama-8b")
    assert {layer.name: (layer.count, layer.shape) for layer in target.layers} == {
        "qkv": (32, LinearShape(6144, 4096)),
        "o": (32, LinearShape(4096, 4096)),
        "gate_up": (32, LinearShape(28672, 4096)),
        "gate_up gated": (0, LinearShape(28672, 4096, is_gated=True)),
        "down": (32, LinearShape(4096, 14336)),
        "head": (1, LinearShape(128256, 4096)),
    }
    assert target.heads == (Heads(32, 8, 128),)


def test_a_folder_is_read_by_its_configuration(tmp_path: Path) -> None:
    fields = {
        "architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 96, "vocab_size": 100,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(fields))
    for text in (str(tmp_path), str(tmp_path / "config.json")):
        target = read_target(text)
        assert target.name == tmp_path.name
        assert target.layers[0].shape == LinearShape((4 + 2 * 2) * 32, 64)
        assert target.layers[1].shape == LinearShape(64, 4 * 32)
        assert target.heads == (Heads(4, 2, 32),)


def test_single_shapes() -> None:
    assert read_target("6144x4096").layers[0].shape == LinearShape(6144, 4096)
    assert read_target("64x32:gated").layers[0].shape == LinearShape(64, 32, is_gated=True)
    assert read_target("32/8/128").heads == (Heads(32, 8, 128),)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        pytest.param({"architectures": ["FalconForCausalLM"]}, "FalconForCausalLM is not one of", id="family"),
        pytest.param({"architectures": ["LlamaForCausalLM"]}, "hidden_size", id="field"),
        pytest.param(None, "is neither a model", id="nothing"),
    ],
)
def test_what_has_no_shapes_is_refused(tmp_path: Path, fields, reason: str) -> None:
    if fields is not None:
        (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=reason):
        read_target(str(tmp_path))
