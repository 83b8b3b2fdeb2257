"""The MLPs of a layer: gated, and plain."""

from collections.abc import Mapping

import torch
from octavo_kernels.ops.gelu import Approximate, gelu

from octavo_engine.errors import UnsupportedModelError
from octavo_engine.layers.layer import Layer
from octavo_engine.layers.linear import Linear
from octavo_engine.parallel import Group

_GELU_NAMES: Mapping[str, Approximate] = {
    "gelu": "none",
    "gelu_new": "tanh",
    "gelu_fast": "tanh",
    "gelu_pytorch_tanh": "tanh",
}


def read_gelu(config: Mapping[str, object], field: str) -> Approximate:
    """Which GELU a field of config.json names, by default the exact one. Raises UnsupportedModelError for others."""
    name = str(config.get(field) or "gelu")
    if name not in _GELU_NAMES:
        known = ", ".join(_GELU_NAMES)
        raise UnsupportedModelError(f"config.json: {field} {name!r} is not supported; supported: {known}")
    return _GELU_NAMES[name]


class GatedMlp(Layer):
    """down(silu(gate(x)) * up(x)), gate and up in one multiplication."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, bias: bool) -> None:
        super().__init__()
        self.gate_up_proj = Linear(
            hidden_size, {"gate_proj": intermediate_size, "up_proj": intermediate_size}, bias=bias
        )
        self.down_proj = Linear(intermediate_size, {"down_proj": hidden_size}, bias=bias)

    def shard(self, group: Group) -> None:
        """As `Layer.shard`: a share of the features between the projections."""
        features = group.share(self.down_proj.in_features)
        self.gate_up_proj.keep_rows({"gate_proj": features, "up_proj": features})
        self.down_proj.keep_columns(features, group)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[num_tokens, hidden_size] -> the same."""
        output: torch.Tensor = self.down_proj(self.gate_up_proj.silu_and_mul(hidden))
        return output


class Mlp(Layer):
    """down(gelu(up(x)))."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, bias: bool, approximate: Approximate) -> None:
        super().__init__()
        self.approximate = approximate
        self.up_proj = Linear(hidden_size, {"up_proj": intermediate_size}, bias=bias)
        self.down_proj = Linear(intermediate_size, {"down_proj": hidden_size}, bias=bias)

    def shard(self, group: Group) -> None:
        """As `Layer.shard`: a share of the features between the projections."""
        features = group.share(self.down_proj.in_features)
        self.up_proj.keep_rows({"up_proj": features})
        self.down_proj.keep_columns(features, group)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[num_tokens, hidden_size] -> the same."""
        output: torch.Tensor = self.down_proj(gelu(self.up_proj(hidden), self.approximate))
        return output
