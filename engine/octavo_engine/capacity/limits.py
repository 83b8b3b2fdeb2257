"""How much runs at once: limits that follow from the model and the chip, each with the sentence that says why.

A weight that is read from memory is multiplied with every token of a step. Below `balance` tokens a step waits for
memory, and further tokens are free; far above it the weights' reading no longer shows. Both limits are multiples of it,
cut where requests would wait too long or would not find room in the KV cache.
"""

import math
from dataclasses import dataclass

from octavo_kernels.hardware import Hardware

from octavo_engine.capacity.memory import seq_bytes, token_activation_bytes
from octavo_engine.geometry import Geometry

# A step's prompt tokens: reading a weight takes at most this part of multiplying with it ...
_READ_PART = 24
# ... and the step no longer than a reader of one token after another (five a second) notices ...
LONGEST_STEP_S = 0.2
# ... and its activations no more than this share of the memory. So, too, logits and token counts of all sequences.
_ACTIVATION_SHARE = 0.05
# Sequences in a step: with this many balances its arithmetic is well above the reading of the weights.
_BALANCES = 1.5
# A decode step over contexts of `TYPICAL_CONTEXT` takes no longer than this, or than twice the reading of the weights.
_LONGEST_DECODE_S = 0.05
TYPICAL_CONTEXT = 1024
# A sequence that the cache has less room for than this would only be preempted.
_SHORTEST_CONTEXT = 128
_MOST_SEQS = 4096
# What launching a layer's kernels one by one takes a slow host: shorter steps are better captured as CUDA graphs.
_LAYER_LAUNCH_S = 1.4e-3
# A CPU's rates depend on its cores, which the hardware table does not know; these were measured on two of them.
_CPU_BATCHED_TOKENS, _CPU_SEQS = 256, 64
_CPU_WHY = "measured on a CPU; its rates depend on cores that the hardware table does not know"


@dataclass(frozen=True, slots=True)
class Choice:
    """A limit and why it is not larger."""

    value: int
    why: str


def balance(geometry: Geometry, hardware: Hardware, *, linear_bytes: int, dtype: str) -> float:
    """Tokens with which multiplying takes as long as reading the linear layers' weights."""
    return linear_bytes / (hardware.memory_bandwidth_gbps * 1e9) / _token_s(geometry, hardware, dtype)


def _token_s(geometry: Geometry, hardware: Hardware, dtype: str) -> float:
    """Seconds of arithmetic for one token. A GPU multiplies float32 at half the rate of 16 bits, at best."""
    rate = hardware.bf16_tflops * 1e12 / (2 if dtype == "float32" else 1)
    return 2 * geometry.num_active_linear_parameters / rate


def choose_batched_tokens(
    geometry: Geometry, hardware: Hardware, memory_bytes: int, *, linear_bytes: int, dtype: str, num_seqs: int
) -> Choice:
    """The token budget of a step: a power of two for prompts, beside one token of each of `num_seqs` sequences.

    Without room for both, a prompt as long as the budget would be cut whenever another sequence decodes, and its second
    piece attend to the first one at half the speed.
    """
    if not hardware.is_gpu:
        return Choice(_CPU_BATCHED_TOKENS, _CPU_WHY)
    equal = balance(geometry, hardware, linear_bytes=linear_bytes, dtype=dtype)
    token_s = _token_s(geometry, hardware, dtype)
    saturated = _power_of_two_above(equal * _READ_PART)
    in_time = _power_of_two_below(LONGEST_STEP_S / token_s)
    in_memory = _power_of_two_below(memory_bytes * _ACTIVATION_SHARE / token_activation_bytes(geometry, dtype))
    floor = _power_of_two_above(equal)
    value = max(min(saturated, in_time, in_memory), floor)
    limit_ms, step_ms = LONGEST_STEP_S * 1e3, value * token_s * 1e3
    if value == saturated:
        why = f"reading a weight then takes 1/{value / equal:.0f} of multiplying with it (equal at {equal:.0f} tokens)"
    elif value == floor:
        why = f"with fewer than {equal:.0f} tokens a step waits for the weights' reading"
    elif value == in_memory:
        why = f"its activations take {_ACTIVATION_SHARE:.0%} of the memory"
    else:
        why = f"running requests wait for a full step, and {2 * value:,} tokens would take over {limit_ms:.0f} ms"
    return Choice(
        value + num_seqs,
        f"{value:,} of prompts and one of each sequence: {why}; the prompts take {step_ms:.0f} ms at best",
    )


def launch_bound_tokens(geometry: Geometry, hardware: Hardware, dtype: str) -> int:
    """Steps with prompts of up to so many tokens are computed faster than a host launches their kernels one by one."""
    return _power_of_two_below(geometry.num_layers * _LAYER_LAUNCH_S / _token_s(geometry, hardware, dtype))


def choose_seqs(
    geometry: Geometry,
    hardware: Hardware,
    *,
    linear_bytes: int,
    weight_bytes: int,
    dtype: str,
    kv_cache_dtype: str,
    memory_bytes: int,
    free_bytes: int,
) -> Choice:
    """The most sequences in a step.

    memory_bytes: what the engine may use; free_bytes: what weights and runtime leave of it
    """
    if not hardware.is_gpu:
        return Choice(_CPU_SEQS, _CPU_WHY)
    equal = balance(geometry, hardware, linear_bytes=linear_bytes, dtype=dtype)
    shared = _power_of_two_above(equal * _BALANCES)
    bandwidth = hardware.memory_bandwidth_gbps * 1e9
    longest_s = max(_LONGEST_DECODE_S, 2 * weight_bytes / bandwidth)
    request_bytes = geometry.kv_read_bytes(TYPICAL_CONTEXT, kv_cache_dtype)
    in_time = _round_down((longest_s * bandwidth - weight_bytes) / request_bytes)
    room = _SHORTEST_CONTEXT * geometry.kv_bytes_per_token(kv_cache_dtype)
    in_cache = _round_down(free_bytes / room)
    in_memory = _most_logits(geometry, memory_bytes * _ACTIVATION_SHARE, dtype)
    value = max(1, min(shared, in_time, in_cache, in_memory))
    if value == shared:
        why = (
            f"a decode step's arithmetic then takes {value / equal:.1f} times the reading of the weights "
            f"(equal at {equal:.0f}): more sequences would share little"
        )
    elif value == in_time:
        why = (
            f"a decode step at contexts of {TYPICAL_CONTEXT:,} tokens then reads weights and cache for "
            f"{longest_s * 1e3:.0f} ms"
        )
    elif value == in_memory:
        why = f"logits and token counts of that many take {_ACTIVATION_SHARE:.0%} of the memory"
    else:
        why = f"the KV cache then holds {_SHORTEST_CONTEXT} tokens of each"
    return Choice(value, why)


def _most_logits(geometry: Geometry, num_bytes: float, dtype: str) -> int:
    """Sequences whose logits and token counts take no more than `num_bytes`, at least 8."""
    return min(_MOST_SEQS, max(8, _round_down(num_bytes / seq_bytes(geometry, dtype))))


def _power_of_two_above(value: float) -> int:
    return 1 << max(0, math.ceil(math.log2(max(value, 1))))


def _power_of_two_below(value: float) -> int:
    return 1 << max(0, math.floor(math.log2(max(value, 1))))


def _round_down(value: float) -> int:
    """To a multiple of 8, where there are so many."""
    count = max(0, int(value))
    return count // 8 * 8 if count >= 8 else count
