"""Attention with linear biases: what each head subtracts for each token of distance."""

import math

import torch


def alibi_slopes(num_heads: int) -> torch.Tensor:
    """[num_heads] float32 on the CPU: a geometric sequence from 2^(-8/n) to 2^-8 for n heads, a power of two.

    Other numbers of heads take the sequence of the next lower power of two, then every second value of the next
    higher one's.
    Source: Press et al., "Train Short, Test Long" (https://arxiv.org/abs/2108.12409) section 3 and its code.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    own = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    between = [2 ** (-4 * (2 * i + 1) / power) for i in range(num_heads - power)]
    return torch.tensor(own + between, dtype=torch.float32, device="cpu")
