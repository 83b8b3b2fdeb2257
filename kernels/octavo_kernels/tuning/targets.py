"""What to tune for: the linear layers and the attention heads of a model, or shapes as the user writes them."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from octavo_kernels.linear_choice import LinearShape

_LINEAR = re.compile(r"(\d+)x(\d+)(:gated)?")
_HEADS = re.compile(r"(\d+)/(\d+)/(\d+)")
_GATED_FAMILIES: Final = frozenset({"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"})

MODELS: Final[Mapping[str, Mapping[str, Any]]] = {
    "llama-8b": {
        "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
    },
    "llama-1b": {
        "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 16, "hidden_size": 2048, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 8192, "vocab_size": 128256,
    },
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Layer:
    """A linear layer of a model, which has `count` of it."""

    name: str
    count: int
    shape: LinearShape


@dataclass(frozen=True, slots=True)
class Heads:
    """Attention heads of a model."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class Target:
    """A model's shapes, or one shape; either part may be empty."""

    name: str
    layers: tuple[Layer, ...] = ()
    heads: tuple[Heads, ...] = ()


def read_target(text: str) -> Target:
    """A name of `MODELS`, a model's folder or config.json, `6144x4096`, `28672x4096:gated` or `32/8/128`.

    A linear shape is out_features x in_features of the weight; heads are queries / keys / dimensions.
    Raises ValueError that says what it should be.
    """
    if text in MODELS:
        return model_target(text, MODELS[text])
    if match := _LINEAR.fullmatch(text):
        shape = LinearShape(int(match[1]), int(match[2]), is_gated=match[3] is not None)
        return Target(text, layers=(Layer(text, 1, shape),))
    if match := _HEADS.fullmatch(text):
        return Target(text, heads=(Heads(*(int(number) for number in match.groups())),))
    path = Path(text) / "config.json" if Path(text).is_dir() else Path(text)
    if not path.is_file():
        raise ValueError(
            f"{text!r} is neither a model ({', '.join(MODELS)}, or a folder with its config.json) nor a shape such as "
            "6144x4096, 28672x4096:gated or 32/8/128"
        )
    try:
        return model_target(path.resolve().parent.name, json.loads(path.read_text()))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} has no shapes to tune for ({error}); give them one by one") from error


def model_target(name: str, config: Mapping[str, Any]) -> Target:
    """The shapes of a model with gated MLPs. config: the fields of its config.json. Raises ValueError for another."""
    if config["architectures"][0] not in _GATED_FAMILIES:
        raise ValueError(f"{config['architectures'][0]} is not one of {', '.join(sorted(_GATED_FAMILIES))}")
    hidden, num_heads, width = config["hidden_size"], config["num_attention_heads"], config["intermediate_size"]
    num_kv_heads = config.get("num_key_value_heads") or num_heads
    head_dim = config.get("head_dim") or hidden // num_heads
    count = config["num_hidden_layers"]
    layers = (
        Layer("qkv", count, LinearShape((num_heads + 2 * num_kv_heads) * head_dim, hidden)),
        Layer("o", count, LinearShape(hidden, num_heads * head_dim)),
        # The gated form of a layer is measured against the plain one's winner; a step runs one of the two.
        Layer("gate_up", count, LinearShape(2 * width, hidden)),
        Layer("gate_up gated", 0, LinearShape(2 * width, hidden, is_gated=True)),
        Layer("down", count, LinearShape(hidden, width)),
        Layer("head", 1, LinearShape(config["vocab_size"], hidden)),
    )
    return Target(name, layers, (Heads(num_heads, num_kv_heads, head_dim),))
