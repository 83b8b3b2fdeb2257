"""Which layers see only a sliding window, out of the fields of config.json."""

from collections.abc import Mapping
from typing import Any

from octavo_engine.errors import UnsupportedModelError
from octavo_engine.geometry import Geometry


def read_windows(config: Mapping[str, Any], geometry: Geometry) -> tuple[int | None, ...]:
    """Each layer's window, None for the whole context.

    `layer_types` (transformers 5) names each layer's kind; `max_window_layers` is the first with a window; without
    either all layers have the model's.
    Raises UnsupportedModelError that names an unknown kind.
    """
    window, num_layers = geometry.sliding_window, geometry.num_layers
    layer_types = config.get("layer_types")
    if layer_types:
        windows: dict[str, int | None] = {"full_attention": None, "sliding_attention": window}
        for name in layer_types:
            if name not in windows:
                raise UnsupportedModelError(
                    f"config.json: the layer type {name!r} is not supported; supported: {', '.join(windows)}"
                )
        return tuple(windows[name] for name in layer_types[:num_layers])
    first = int(config.get("max_window_layers") or 0)
    return tuple(window if layer >= first else None for layer in range(num_layers))
