"""Which layers see only a sliding window, out of the fields of config.json."""

from octavo_engine.errors import UnsupportedModelError
from octavo_engine.geometry.fields import Config, layer_list


def layer_windows(config: Config, window: int | None, num_layers: int) -> tuple[int | None, ...]:
    """Each layer's window, None for the whole context.

    `layer_types` (transformers 5) names each layer's kind; `max_window_layers` is the first with a window; with
    `sliding_window_pattern` every layer of that number sees all. Without any of them all layers have the model's.
    Raises UnsupportedModelError that names an unknown kind, or a list that is too short.
    """
    layer_types = layer_list(config, "layer_types")
    if layer_types:
        return _from_types(layer_types, window, num_layers)
    pattern = config.get("sliding_window_pattern")
    if isinstance(pattern, int) and pattern > 0:
        return tuple(None if (layer + 1) % pattern == 0 else window for layer in range(num_layers))
    first = int(config.get("max_window_layers") or 0)
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
