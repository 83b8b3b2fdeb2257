"""Linear layers. Projections of the same input are stacked into one weight, so that they are one multiplication."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from octavo_kernels.ops.linear import LinearKernel, PackedLinear, linear_silu_and_mul
from torch import nn

from octavo_engine.layers.layer import Layer
from octavo_engine.parallel import Group


@dataclass(frozen=True, slots=True)
class FusedHeads:
    """Rows of a checkpoint that fuses queries, keys and values: the query heads of a KV head, its key, its value.

    queries: which of a KV head's query heads are wanted
    """

    num_kv_heads: int
    head_dim: int
    queries: slice = field(default_factory=lambda: slice(None))

    def stack(self, stored: torch.Tensor) -> torch.Tensor:
        """[rows, ...] as stored -> the same rows as all queries, all keys, all values."""
        groups = stored.view(self.num_kv_heads, -1, self.head_dim, *stored.shape[1:])
        queries, keys, values = groups[:, :-2][:, self.queries], groups[:, -2], groups[:, -1]
        return torch.cat((queries.flatten(0, 2), keys.flatten(0, 1), values.flatten(0, 1)))

    def num_stacked(self, num_stored: int) -> int:
        """How many rows `stack` makes of as many."""
        num_queries = num_stored // (self.num_kv_heads * self.head_dim) - 2
        return (len(range(num_queries)[self.queries]) + 2) * self.num_kv_heads * self.head_dim


class SummedLinear:
    """A packed weight whose other columns are on other ranks: what all of them make of their inputs is added."""

    def __init__(self, packed: PackedLinear, group: Group) -> None:
        self._packed, self._group = packed, group
        self.num_bytes = packed.num_bytes

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """As `PackedLinear`; the same on every rank."""
        return self._group.all_reduce(self._packed(hidden))


class Linear(Layer):
    """y = x W^T + b, where W stacks the checkpoint's weights named in `parts`.

    weight: [sum of parts, in_features], gone once `pack` has given it to a kernel
    parts:  name in the checkpoint (q_proj) -> its number of output features, in order
    fused:  how the rows of a part are ordered in the checkpoint, where they are not as they are here
    rows, columns: what is here of the checkpoint's weights: rows of each part, and columns
    summed_over: the ranks that hold the other columns, whose outputs are added
    """

    def __init__(
        self, in_features: int, parts: Mapping[str, int], *, bias: bool, fused: FusedHeads | None = None
    ) -> None:
        super().__init__()
        self.parts, self.in_features, self.fused = dict(parts), in_features, fused
        self.rows, self.columns = {part: slice(0, size) for part, size in parts.items()}, slice(0, in_features)
        self.summed_over: Group | None = None
        out_features = sum(parts.values())
        self.weight: nn.Parameter | None = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        self._packed: PackedLinear

    def keep_rows(self, rows: Mapping[str, slice], fused: FusedHeads | None = None) -> None:
        """Compute only these outputs of each part. fused: the order of these rows."""
        self.rows, self.fused = dict(rows), fused
        self._resize(sum(map(self.num_own, self.parts)), self.in_features)

    def keep_columns(self, columns: slice, group: Group) -> None:
        """Take only these inputs; the others are the group's, and the output is the sum over it."""
        self.columns, self.summed_over = columns, group
        self._resize(sum(self.parts.values()), columns.stop - columns.start)

    def num_own(self, part: str) -> int:
        """Output features of a part that are computed here."""
        num_rows: int = self.rows[part].stop - self.rows[part].start
        return self.fused.num_stacked(num_rows) if self.fused else num_rows

    def _resize(self, out_features: int, in_features: int) -> None:
        assert self.weight is not None
        self.weight = nn.Parameter(self.weight.new_empty(out_features, in_features), requires_grad=False)
        if self.bias is not None:
            self.bias = nn.Parameter(self.bias.new_empty(out_features), requires_grad=False)

    def pack(self, kernel: LinearKernel) -> int:
        """Hand the loaded weight to a kernel, once. Returns the bytes that it keeps."""
        assert self.weight is not None
        # To a sum over ranks a bias is added once, where the first columns are.
        bias = self.bias.data if self.bias is not None and self.columns.start == 0 else None
        self._packed = kernel.pack(self.weight.data, bias)
        if self.summed_over:
            self._packed = SummedLinear(self._packed, self.summed_over)
        self.weight = self.bias = None
        return self._packed.num_bytes

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[num_tokens, in_features] -> [num_tokens, out_features]."""
        return self._packed(hidden)

    def silu_and_mul(self, hidden: torch.Tensor) -> torch.Tensor:
        """[num_tokens, in_features] -> [num_tokens, out_features / 2]: silu of the first half times the second."""
        return linear_silu_and_mul(self._packed, hidden)
