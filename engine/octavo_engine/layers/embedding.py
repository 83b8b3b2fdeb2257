"""Token embedding and the output layer, which may share its weight."""

from collections.abc import Sequence

import torch
from octavo_kernels.ops.linear import LinearKernel, PackedLinear
from torch import nn
from torch.nn import functional

from octavo_engine.layers.layer import Layer
from octavo_engine.parallel import Group


class Embedding(Layer):
    """Rows of a table: [num_tokens] ids -> [num_tokens, hidden_size] of `output_dtype`, by default the table's.

    rows: those of the checkpoint's table that are here; behind them, ranks with fewer than others have zeros
    """

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.num_rows, self.rows = vocab_size, slice(0, vocab_size)
        self._summed_over: Group | None = None
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size), requires_grad=False)
        self.output_dtype: torch.dtype | None = None

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Look up each token."""
        if self._summed_over:
            return self._look_up(token_ids, self._summed_over)
        return functional.embedding(token_ids, self.weight).to(self.output_dtype or self.weight.dtype)

    def shard(self, group: Group) -> None:
        """As `Layer.shard`: a part of the vocabulary."""
        self._summed_over = group
        self.rows, self.weight = _own_rows(self.weight, group)

    def _look_up(self, token_ids: torch.Tensor, group: Group) -> torch.Tensor:
        """One rank finds a token, for all others it is zeros."""
        num_here = self.rows.stop - self.rows.start
        rows = token_ids - self.rows.start
        is_here = (rows >= 0) & (rows < num_here)
        found = functional.embedding(rows.where(is_here, 0), self.weight)
        return group.all_reduce(found.where(is_here[:, None], 0).to(self.output_dtype or self.weight.dtype))


class GatheredLinear:
    """A packed weight whose other rows are on other ranks: each gets the outputs of all, `widths` of each rank."""

    def __init__(self, packed: PackedLinear, group: Group, widths: Sequence[int]) -> None:
        self._packed, self._group, self._widths = packed, group, widths
        self.num_bytes = packed.num_bytes

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """As `PackedLinear`."""
        return self._group.all_gather_columns(self._packed(hidden), self._widths)


class OutputLayer(Layer):
    """Hidden states to logits, with a weight of its own or with the embedding's."""

    def __init__(self, hidden_size: int, vocab_size: int, *, tied_to: Embedding | None) -> None:
        super().__init__()
        # In a list, so that the embedding is not a submodule twice.
        self._tied = [tied_to] if tied_to else []
        weight = None if tied_to else nn.Parameter(torch.empty(vocab_size, hidden_size), requires_grad=False)
        self.register_parameter("weight", weight)
        self.num_rows, self.rows = vocab_size, slice(0, vocab_size)
        self._group: Group | None = None
        self._packed: PackedLinear

    def shard(self, group: Group) -> None:
        """As `Layer.shard`: a part of the vocabulary, of which every rank gets all logits."""
        self._group = group
        if not self._tied:
            self.rows, self.weight = _own_rows(self.get_parameter("weight"), group)

    def pack(self, kernel: LinearKernel) -> int:
        """Hand the loaded weight to a kernel, once. Returns the bytes that it keeps beside the embedding's.

        A shared weight stays as it lies, too, since it is looked up by row.
        """
        weight = self._tied[0].weight if self._tied else self.get_parameter("weight")
        self._packed = kernel.pack(weight.data, None)
        if self._group:
            widths = [share.stop - share.start for share in self._group.padded_shares(self.num_rows)]
            self._packed = GatheredLinear(self._packed, self._group, widths)
        self.register_parameter("weight", None)
        return 0 if self._tied and not kernel.is_copy else self._packed.num_bytes

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[num_rows, hidden_size] -> [num_rows, vocab_size]."""
        return self._packed(hidden)


def _own_rows(weight: nn.Parameter, group: Group) -> tuple[slice, nn.Parameter]:
    """Which of a table's rows are this rank's, and memory for as many as any rank has."""
    shares = group.padded_shares(len(weight))
    most = shares[0].stop - shares[0].start
    return shares[group.rank], nn.Parameter(weight.new_empty(most, weight.shape[1]), requires_grad=False)
