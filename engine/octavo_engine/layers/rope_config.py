"""Rotary settings out of the fields of config.json, in the spellings of several generations of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from octavo_kernels.ops.rotary import RopeScaling, RopeType

from octavo_engine.errors import UnsupportedModelError

DEFAULT_THETA = 10_000.0


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """rotary_dim: dimensions of a head that are rotated, the first ones; theta: the base of the frequencies."""

    rotary_dim: int
    theta: float
    scaling: RopeScaling


def read_rope_config(config: Mapping[str, Any], head_dim: int) -> RopeConfig:
    """`rope_parameters` (transformers 5), or `rope_theta` beside `rope_scaling` with `rope_type` or `type`.

    Raises UnsupportedModelError that names an unknown type or a missing field.
    """
    fields: Mapping[str, Any] = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = fields.get("rope_theta") or config.get("rope_theta") or DEFAULT_THETA
    share = fields.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    return RopeConfig(
        rotary_dim=int(head_dim * float(share)),
        theta=float(theta),
        scaling=_read_scaling(fields, int(config.get("max_position_embeddings") or 0)),
    )


def _read_scaling(fields: Mapping[str, Any], max_position_embeddings: int) -> RopeScaling:
    rope_type = _rope_type(fields)
    if rope_type == "default":
        return RopeScaling()
    if rope_type == "factors":
        return RopeScaling("factors", frequency_factors=tuple(fields["frequency_factors"]))
    if "factor" not in fields:
        raise UnsupportedModelError(f"config.json: the rope type {rope_type} needs a factor")
    return RopeScaling(
        rope_type,
        factor=float(fields["factor"]),
        original_max_position=int(fields.get("original_max_position_embeddings") or max_position_embeddings),
        low_freq_factor=float(fields.get("low_freq_factor", 1.0)),
        high_freq_factor=float(fields.get("high_freq_factor", 4.0)),
        beta_fast=float(fields.get("beta_fast") or 32.0),
        beta_slow=float(fields.get("beta_slow") or 1.0),
        attention_factor=fields.get("attention_factor"),
        mscale=fields.get("mscale"),
        mscale_all_dim=fields.get("mscale_all_dim"),
        truncate=bool(fields.get("truncate", True)),
    )


def _rope_type(fields: Mapping[str, Any]) -> RopeType:
    name = fields.get("rope_type") or fields.get("type") or "default"
    known: tuple[RopeType, ...] = get_args(RopeType)
    for rope_type in known:
        if rope_type == name:
            return rope_type
    raise UnsupportedModelError(f"config.json: the rope type {name!r} is not supported; supported: {', '.join(known)}")
