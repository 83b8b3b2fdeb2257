"""Lower bounds on the time of a load, from a model's numbers and what the machine was measured to do.

Weights that a step touches are read once in it, keys and values once a step, every multiplication runs at the measured
rate; scheduling, launches, norms and sampling are free, all requests decode together, and a shared prefix is computed
once. Every layer attends to the whole context: a sliding window would lower the bound. Torch-free, pure arithmetic.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from octavo_engine.errors import ConfigError
from octavo_engine.geometry import DTYPE_BYTES, Experts, Geometry


@dataclass(frozen=True, slots=True)
class Rates:
    """What a machine does at best: bytes/s of its memory, floating point operations/s of matrix multiplication."""

    bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True, slots=True)
class ModelWork:
    """What a model reads and multiplies.

    num_layer_parameters:  weights that every token is multiplied with, over all layers; experts are apart
    num_output_parameters: weights of the output layer, which works on a sequence's last token only
    num_expert_parameters: weights of all `experts`, of which a token is multiplied with some
    pair_flops:            operations for one pair of query and key (scores and values), over all layers
    kv_bytes_per_token:    keys and values of one token, over all layers
    """

    num_layer_parameters: int
    num_output_parameters: int
    pair_flops: int
    kv_bytes_per_token: int
    layer_itemsize: int
    output_itemsize: int
    num_expert_parameters: int = 0
    experts: Experts | None = None

    def weight_bytes(self, num_tokens: int) -> float:
        """Weights that a step with `num_tokens` reads; the embedding's table is looked up, not read."""
        layers: float = self.num_layer_parameters
        if self.experts:
            layers += self.experts.touched_share(num_tokens) * self.num_expert_parameters
        return layers * self.layer_itemsize + self.num_output_parameters * self.output_itemsize

    def linear_flops(self, num_tokens: int, num_logits: int) -> float:
        """Operations of all linear layers."""
        layers: float = self.num_layer_parameters
        if self.experts:
            layers += self.experts.num_experts_per_token / self.experts.num_experts * self.num_expert_parameters
        return 2.0 * (layers * num_tokens + self.num_output_parameters * num_logits)


@dataclass(frozen=True, slots=True)
class Load:
    """Requests that start together: tokens (own prompt, output) of each, after a prefix that all of them share."""

    lengths: Sequence[tuple[int, int]]
    num_prefix_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Floors:
    """Lower bounds in seconds.

    strict_s:        all bytes or all operations, whichever takes longer: perfect overlap throughout
    serial_s:        prefill, then each decode step as its linear part and its reading of keys and values, one after
                     the other; a shared prefix is read once a request
    serial_shared_s: the same with the prefix read once a step for all
    prefill_s:       the prefill's part of these
    """

    strict_s: float
    serial_s: float
    serial_shared_s: float
    prefill_s: float


def model_work(geometry: Geometry, *, dtype: str, kv_cache_dtype: str, quantization: str = "none") -> ModelWork:
    """The work of a model, from the numbers that the capacity plan uses.

    dtype: of weights and output layer. kv_cache_dtype: of keys and values. quantization: none, or a type of one byte.
    """
    experts = geometry.experts
    routers = experts.num_layers * experts.num_experts * geometry.hidden_size if experts else 0
    return ModelWork(
        num_layer_parameters=geometry.num_linear_parameters - geometry.num_expert_parameters + routers,
        num_output_parameters=geometry.vocab_size * geometry.hidden_size,
        pair_flops=geometry.pair_flops,
        kv_bytes_per_token=geometry.kv_bytes_per_token(kv_cache_dtype),
        layer_itemsize=DTYPE_BYTES[dtype] if quantization == "none" else 1,
        output_itemsize=DTYPE_BYTES[dtype],
        num_expert_parameters=geometry.num_expert_parameters,
        experts=experts,
    )


def floors(work: ModelWork, load: Load, rates: Rates) -> Floors:
    """Lower bounds for a load. Raises ConfigError if it has no request."""
    if not load.lengths:
        raise ConfigError("a load needs at least one request")
    prefill = _prefill(work, load)
    steps = _decode(work, load)
    total_bytes = prefill.num_bytes + steps.weight_bytes.sum() + steps.shared_kv_bytes.sum()
    total_flops = prefill.flops + steps.linear_flops.sum() + steps.attention_flops.sum()
    prefill_s = float(max(prefill.num_bytes / rates.bytes_per_s, prefill.flops / rates.flops_per_s))
    return Floors(
        strict_s=float(max(total_bytes / rates.bytes_per_s, total_flops / rates.flops_per_s)),
        serial_s=prefill_s + _serial_s(steps, steps.kv_bytes, rates),
        serial_shared_s=prefill_s + _serial_s(steps, steps.shared_kv_bytes, rates),
        prefill_s=prefill_s,
    )


@dataclass(frozen=True, slots=True)
class _Prefill:
    num_bytes: float
    flops: float


@dataclass(frozen=True, slots=True)
class _DecodeSteps:
    """One element a decode step: bytes read and operations."""

    weight_bytes: NDArray[np.float64]
    linear_flops: NDArray[np.float64]
    kv_bytes: NDArray[np.float64]
    shared_kv_bytes: NDArray[np.float64]
    attention_flops: NDArray[np.float64]


def _prefill(work: ModelWork, load: Load) -> _Prefill:
    """All prompts in one pass, the prefix once; causal attention."""
    prefix, own = load.num_prefix_tokens, np.array([length for length, _ in load.lengths], np.float64)
    num_tokens = int(own.sum()) + prefix
    num_pairs = (own * prefix + own * (own + 1) / 2).sum() + prefix * (prefix + 1) / 2
    return _Prefill(
        num_bytes=work.weight_bytes(num_tokens) + work.kv_bytes_per_token * num_tokens,
        flops=work.linear_flops(num_tokens, len(own)) + work.pair_flops * num_pairs,
    )


def _decode(work: ModelWork, load: Load) -> _DecodeSteps:
    """Step t computes each request's token t, counted from 1: the prefill brought token 0."""
    own, output = (np.array(lengths, np.float64) for lengths in zip(*load.lengths, strict=True))
    steps = range(1, int(output.max()))
    num_running = [int((output > step).sum()) for step in steps]
    own_context = np.array([(own[output > step] + step).sum() for step in steps])
    running = np.array(num_running, np.float64)
    prefixes = running * load.num_prefix_tokens
    # A step reads its context and the token that it writes.
    return _DecodeSteps(
        weight_bytes=np.array([work.weight_bytes(count) for count in num_running]),
        linear_flops=np.array([work.linear_flops(count, count) for count in num_running]),
        kv_bytes=work.kv_bytes_per_token * (own_context + prefixes + running),
        shared_kv_bytes=work.kv_bytes_per_token * (own_context + load.num_prefix_tokens + running),
        attention_flops=work.pair_flops * (own_context + prefixes),
    )


def _serial_s(steps: _DecodeSteps, kv_bytes: NDArray[np.float64], rates: Rates) -> float:
    linear_s = np.maximum(steps.weight_bytes / rates.bytes_per_s, steps.linear_flops / rates.flops_per_s)
    attention_s = np.maximum(kv_bytes / rates.bytes_per_s, steps.attention_flops / rates.flops_per_s)
    return float(linear_s.sum() + attention_s.sum())
