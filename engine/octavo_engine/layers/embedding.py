"""Token embedding and the output layer, which may share its weight."""

import torch
from torch import nn
from torch.nn import functional


class Embedding(nn.Module):
    """Rows of a table: [num_tokens] ids -> [num_tokens, hidden_size]."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size), requires_grad=False)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Look up each token."""
        return functional.embedding(token_ids, self.weight)


class OutputLayer(nn.Module):
    """Hidden states to logits, with a weight of its own or with the embedding's."""

    def __init__(self, hidden_size: int, vocab_size: int, *, tied_to: Embedding | None) -> None:
        super().__init__()
        # In a list, so that the embedding is not a submodule twice.
        self._tied = [tied_to] if tied_to else []
        if not tied_to:
            self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size), requires_grad=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[num_rows, hidden_size] -> [num_rows, vocab_size] float32."""
        weight = self._tied[0].weight if self._tied else self.weight
        return functional.linear(hidden, weight).float()
