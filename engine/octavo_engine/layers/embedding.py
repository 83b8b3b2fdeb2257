"""Token embedding and the output layer, which may share its weight."""

import torch
from octavo_kernels.ops.linear import LinearKernel, PackedLinear
from torch import nn
from torch.nn import functional

from octavo_engine.layers.layer import Layer


class Embedding(Layer):
    """Rows of a table: [num_tokens] ids -> [num_tokens, hidden_size] of `output_dtype`, by default the table's."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size), requires_grad=False)
        self.output_dtype: torch.dtype | None = None

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Look up each token."""
        return functional.embedding(token_ids, self.weight).to(self.output_dtype or self.weight.dtype)


class OutputLayer(Layer):
    """Hidden states to logits, with a weight of its own or with the embedding's."""

    def __init__(self, hidden_size: int, vocab_size: int, *, tied_to: Embedding | None) -> None:
        super().__init__()
        # In a list, so that the embedding is not a submodule twice.
        self._tied = [tied_to] if tied_to else []
        weight = None if tied_to else nn.Parameter(torch.empty(vocab_size, hidden_size), requires_grad=False)
        self.register_parameter("weight", weight)
        self._packed: PackedLinear

    def pack(self, kernel: LinearKernel) -> int:
        """Hand the loaded weight to a kernel, once. Returns the bytes that it keeps beside the embedding's.

        A shared weight stays as it lies, too, since it is looked up by row; only torch's kernel needs no copy.
        """
        weight = self._tied[0].weight if self._tied else self.get_parameter("weight")
        self._packed = kernel.pack(weight.data, None)
        self.register_parameter("weight", None)
        return 0 if self._tied and kernel.name == "torch" else self._packed.num_bytes

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[num_rows, hidden_size] -> [num_rows, vocab_size]."""
        return self._packed(hidden)
