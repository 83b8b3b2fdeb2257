"""Lower bounds on the time of a step: bytes over bandwidth, or operations over their rate."""

from dataclasses import dataclass
from functools import lru_cache

from octavo_kernels.hardware import Hardware

from octavo_engine.geometry import Geometry


@dataclass(frozen=True, slots=True)
class _Shares:
    """What a step does with the weights, worked out once for a model.

    read:          share of the stored weights that every step reads; the embedding's table is looked up, not read,
                   unless it is the output layer, too
    experts:       share of them that only tokens read which choose them
    token_flops:   operations of one token in all layers; logits_flops: in the output layer
    """

    read: float
    experts: float
    token_flops: int
    logits_flops: int


@lru_cache(maxsize=256)
def _shares(geometry: Geometry, is_gpu: bool) -> _Shares:
    table = geometry.vocab_size * geometry.hidden_size
    is_shared = geometry.tie_word_embeddings and is_gpu
    num_stored = geometry.num_parameters + (table if geometry.tie_word_embeddings and not is_shared else 0)
    experts = geometry.num_expert_parameters / num_stored
    return _Shares(
        read=(1 if is_shared else 1 - table / num_stored) - experts,
        experts=experts,
        token_flops=2 * geometry.num_active_linear_parameters,
        logits_flops=2 * table,
    )


def step_limit_s(
    geometry: Geometry,
    hardware: Hardware,
    *,
    weight_bytes: int,
    kv_bytes: int,
    num_tokens: int,
    num_logits: int,
    num_pairs: int = 0,
) -> float:
    """The roofline of one step: bytes over bandwidth or arithmetic over rate, whichever takes longer.

    weight_bytes: all weights, of which a step reads a part
    kv_bytes:     keys and values that the step reads
    num_pairs:    pairs of a query and a key that it sees, in one layer
    """
    shares = _shares(geometry, hardware.is_gpu)
    read_share = shares.read
    if geometry.experts:
        read_share += shares.experts * geometry.experts.touched_share(num_tokens)
    read_s = (weight_bytes * read_share + kv_bytes) / (hardware.memory_bandwidth_gbps * 1e9)
    flops = shares.token_flops * num_tokens + shares.logits_flops * num_logits + geometry.pair_flops * num_pairs
    return max(read_s, flops / (hardware.bf16_tflops * 1e12))


def decode_step_s(
    geometry: Geometry, hardware: Hardware, *, weight_bytes: int, kv_cache_dtype: str, num_seqs: int, num_context: int
) -> float:
    """One token more for each of `num_seqs` sequences with contexts of `num_context` tokens."""
    return step_limit_s(
        geometry,
        hardware,
        weight_bytes=weight_bytes,
        kv_bytes=num_seqs * geometry.kv_read_bytes(num_context, kv_cache_dtype),
        num_tokens=num_seqs,
        num_logits=num_seqs,
        num_pairs=num_seqs * num_context,
    )


def time_to_first_token_s(
    geometry: Geometry,
    hardware: Hardware,
    *,
    weight_bytes: int,
    kv_cache_dtype: str,
    num_prompt_tokens: int,
    max_num_batched_tokens: int,
) -> float:
    """A prompt alone on the device, in chunks of the step's budget; each chunk sees those before it."""
    seconds = 0.0
    for start in range(0, num_prompt_tokens, max_num_batched_tokens):
        num_tokens = min(max_num_batched_tokens, num_prompt_tokens - start)
        end = start + num_tokens
        seconds += step_limit_s(
            geometry,
            hardware,
            weight_bytes=weight_bytes,
            kv_bytes=geometry.kv_read_bytes(end, kv_cache_dtype),
            num_tokens=num_tokens,
            num_logits=1 if end == num_prompt_tokens else 0,
            num_pairs=num_tokens * start + num_tokens * (num_tokens + 1) // 2,
        )
    return seconds


def prefill_tokens_per_s(
    geometry: Geometry, hardware: Hardware, *, weight_bytes: int, num_tokens: int, num_context: int
) -> float:
    """Tokens a second of steps that are full of prompts of `num_context` tokens."""
    step_s = step_limit_s(
        geometry,
        hardware,
        weight_bytes=weight_bytes,
        kv_bytes=0,
        num_tokens=num_tokens,
        num_logits=max(1, num_tokens // num_context),
        num_pairs=num_tokens * (num_context + 1) // 2,
    )
    return num_tokens / step_s
