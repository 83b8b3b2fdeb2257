"""Scales of an 8-bit KV cache, where a checkpoint brings them: what a layer's keys and values are divided by."""

import math
import re

from octavo_engine.errors import UnsupportedModelError
from octavo_engine.layers.attention import Attention
from octavo_engine.loading.weight_source import StoredTensor
from octavo_engine.models import Model

# compressed-tensors keeps a scale beside the projections, ModelOpt within the one that it belongs to.
_SCALE = re.compile(r"(?P<attention>.+?)\.(?:(?:k_proj\.)?(?P<k>k_scale)|(?:v_proj\.)?(?P<v>v_scale))")


def take_kv_scale(model: Model, name: str, stored: StoredTensor) -> bool:
    """Give a scale to its layer; False if the tensor is none. name: the tensor's, as the model spells it.

    Raises UnsupportedModelError for anything but one positive number.
    """
    match = _SCALE.fullmatch(name)
    layer = dict(model.named_modules()).get(match["attention"]) if match else None
    if match is None or not isinstance(layer, Attention):
        return False
    values = stored.read().float().flatten().tolist()
    if len(values) != 1 or not math.isfinite(values[0]) or values[0] <= 0:
        raise UnsupportedModelError(
            f"the checkpoint's {stored.name} is {values[0] if len(values) == 1 else f'{len(values)} numbers'}; "
            "the scale of a KV cache is one positive number"
        )
    setattr(layer, match["k"] or match["v"], values[0])
    return True
