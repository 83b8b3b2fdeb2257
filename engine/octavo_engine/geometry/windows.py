"""Which layers see only a sliding window, out of the fields of config.json."""

from collections.abc import Mapping
from typing import Final

from octavo_engine.errors import UnsupportedModelError
from octavo_engine.geometry.fields import Config, layer_list, optional_count

_DEFAULT_WINDOW: Final = 4096
_QWEN: Final = {
    "sliding_window": _DEFAULT_WINDOW,
    "use_sliding_window": False,
    "max_window_layers": 28,
    "layer_types": None,
}
# Architecture -> the fields about windows that its configuration class in transformers has, with their defaults. Files
# hold more of them, which mean nothing: a LLaMA has no windows, whatever its file says.
_FIELDS: Final[Mapping[str, Mapping[str, object]]] = {
    "MistralForCausalLM": {"sliding_window": _DEFAULT_WINDOW},
    "MixtralForCausalLM": {"sliding_window": None},
    "Qwen2ForCausalLM": _QWEN,
    "Qwen3ForCausalLM": _QWEN,
    "Qwen2MoeForCausalLM": _QWEN,
    "Qwen3MoeForCausalLM": _QWEN,
    "Gemma2ForCausalLM": {"sliding_window": _DEFAULT_WINDOW, "layer_types": None, "sliding_window_pattern": 2},
    "Gemma3ForCausalLM": {"sliding_window": _DEFAULT_WINDOW, "layer_types": None, "sliding_window_pattern": 6},
}


def window_fields(architecture: str, config: Config) -> Config:
    """What an architecture's class makes of the fields about windows: those that it has, with its defaults.

    A `sliding_window` of null is no window, not the default.
    """
    fields = {
        name: config[name] if name in config and (name == "sliding_window" or config[name] is not None) else default
        for name, default in _FIELDS.get(architecture, {}).items()
    }
    every_name = {name for names in _FIELDS.values() for name in names}
    return {**config, **dict.fromkeys(every_name), **fields}


def layer_windows(config: Config, window: int | None, num_layers: int) -> tuple[int | None, ...]:
    """Each layer's window, None for the whole context. config: as `window_fields` leaves it

    `layer_types` (transformers 5) names each layer's kind; `max_window_layers` is the first with a window; with
    `sliding_window_pattern` every layer of that number sees all. Without any of them all layers have the model's.
    Raises UnsupportedModelError that names an unknown kind, or a list that is too short.
    """
    layer_types = layer_list(config, "layer_types")
    if layer_types:
        return _from_types(layer_types, window, num_layers)
    pattern = optional_count(config, "sliding_window_pattern")
    if pattern:
        return tuple(None if (layer + 1) % pattern == 0 else window for layer in range(num_layers))
    first = optional_count(config, "max_window_layers") or 0
    return tuple(window if layer >= first else None for layer in range(num_layers))


def _from_types(layer_types: list[object], window: int | None, num_layers: int) -> tuple[int | None, ...]:
    windows: dict[object, int | None] = {"full_attention": None, "sliding_attention": window}
    for name in layer_types:
        if name not in windows:
            raise UnsupportedModelError(
                f"config.json: the layer type {name!r} is not supported; supported: {', '.join(map(str, windows))}"
            )
    if len(layer_types) < num_layers:
        raise UnsupportedModelError(f"config.json: layer_types names {len(layer_types)} of {num_layers} layers")
    return tuple(windows[name] for name in layer_types[:num_layers])
