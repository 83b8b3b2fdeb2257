"""The lower bound on one scheduled step's time, which `octavo_step_roofline_ratio` sets against what was measured.

The arithmetic is the capacity plan's; this module only counts what a step holds.
"""

from octavo_kernels.hardware import Hardware

from octavo_engine.capacity import Capacity, step_limit_s
from octavo_engine.geometry import Geometry
from octavo_engine.scheduler import Step


def scheduled_step_limit_s(step: Step, geometry: Geometry, hardware: Hardware, capacity: Capacity) -> float:
    """Of one round of the step: weights, keys and values read once, all multiplications at the device's rate."""
    window = geometry.sliding_window
    num_context = num_seen = num_pairs = 0
    for each in step.scheduled:
        context = each.first_token + each.num_tokens
        num_context += context
        num_seen += context if window is None else min(context, window + each.num_tokens - 1)
        num_pairs += each.num_tokens * (2 * each.first_token + each.num_tokens + 1) // 2
    windowed = geometry.num_window_layers / geometry.num_layers
    num_read = num_context * (1 - windowed) + num_seen * windowed
    return step_limit_s(
        geometry,
        hardware,
        weight_bytes=capacity.weight_bytes,
        kv_bytes=round(num_read * capacity.kv_block_bytes / capacity.block_size),
        num_tokens=step.num_tokens,
        num_logits=sum(len(each.sampled) for each in step.scheduled),
        num_pairs=num_pairs,
    )
