"""Capacity: geometry x hardware x dtype -> bytes, KV blocks, batch limits and the predicted roofline.

Pure and torch-free. The operator admits with it, the engine starts with it and reports predicted against actual.
`memory` counts bytes, `roofline` predicts times, `limits` chooses how much runs at once and says why, `parallelism`
splits what one device does not hold, and `budget` shares a device's memory between all of it.
"""

from octavo_engine.capacity.budget import Capacity, LimitReasons, Limits, plan_capacity
from octavo_engine.capacity.memory import (
    GIB,
    activation_dtype,
    check_kv_cache_dtype,
    decode_graph_sizes,
    resolve_kv_cache_dtype,
    resolve_weight_dtype,
    weight_bytes,
)
from octavo_engine.capacity.parallelism import Parallelism, find_parallelism, shard
from octavo_engine.capacity.roofline import step_limit_s, time_to_first_token_s

__all__ = [
    "GIB",
    "Capacity",
    "LimitReasons",
    "Limits",
    "Parallelism",
    "activation_dtype",
    "check_kv_cache_dtype",
    "decode_graph_sizes",
    "find_parallelism",
    "plan_capacity",
    "resolve_kv_cache_dtype",
    "resolve_weight_dtype",
    "shard",
    "step_limit_s",
    "time_to_first_token_s",
    "weight_bytes",
]
