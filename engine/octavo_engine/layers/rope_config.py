"""Rotary settings out of the fields of config.json, in the spellings of several generations of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from octavo_kernels.ops.rotary import RopeScaling, RopeType

from octavo_engine.errors import UnsupportedModelError
from octavo_engine.geometry.fields import count, flag, part, positive_number

DEFAULT_THETA = 10_000.0


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """rotary_dim: dimensions of a head that are rotated, the first ones; theta: the base of the frequencies."""

    rotary_dim: int
    theta: float
    scaling: RopeScaling


def read_rope_config(config: Mapping[str, Any], head_dim: int) -> RopeConfig:
    """`rope_parameters` (transformers 5), or `rope_theta` beside `rope_scaling` with `rope_type` or `type`.

    Raises UnsupportedModelError that names an unknown type, or a field that is missing or wrong.
    """
    fields = _rope_fields(config)
    beside = {name: config.get(name) for name in ("rope_theta", "partial_rotary_factor")}
    fields = {**beside, **{name: value for name, value in fields.items() if value is not None}}
    rotary_dim = int(head_dim * positive_number(fields, "partial_rotary_factor", 1.0))
    if not 0 < rotary_dim <= head_dim:
        raise UnsupportedModelError(f"config.json: {rotary_dim} of {head_dim} dimensions of a head cannot be rotated")
    return RopeConfig(rotary_dim, positive_number(fields, "rope_theta", DEFAULT_THETA), _read_scaling(fields, config))


def _rope_fields(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The older object wins where a file has both, as in transformers."""
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    fields = part(config, name)
    by_layer_type = [value for value in fields.values() if isinstance(value, Mapping)]
    if not by_layer_type:
        return fields
    if any(value != by_layer_type[0] for value in fields.values()):
        raise UnsupportedModelError(f"config.json: {name} that differ from layer to layer are not supported")
    return by_layer_type[0]


def _read_scaling(fields: Mapping[str, Any], config: Mapping[str, Any]) -> RopeScaling:
    rope_type = _rope_type(fields)
    if rope_type == "default":
        return RopeScaling()
    if rope_type == "factors":
        return RopeScaling("factors", frequency_factors=tuple(fields["frequency_factors"]))
    if fields.get("factor") is None:
        raise UnsupportedModelError(f"config.json: the rope type {rope_type} needs a factor")
    trained = count(config, "max_position_embeddings", 0)
    if rope_type != "dynamic":  # which knows no other length
        original = "original_max_position_embeddings"
        trained = count(config, original, count(fields, original, trained))
    if not trained and rope_type != "linear":
        raise UnsupportedModelError(f"config.json: the rope type {rope_type} needs max_position_embeddings")
    return RopeScaling(
        rope_type,
        factor=positive_number(fields, "factor"),
        original_max_position=trained,
        low_freq_factor=positive_number(fields, "low_freq_factor", 1.0),
        high_freq_factor=positive_number(fields, "high_freq_factor", 4.0),
        beta_fast=positive_number(fields, "beta_fast", 32.0),
        beta_slow=positive_number(fields, "beta_slow", 1.0),
        attention_factor=_optional_number(fields, "attention_factor"),
        mscale=_optional_number(fields, "mscale"),
        mscale_all_dim=_optional_number(fields, "mscale_all_dim"),
        truncate=flag(fields, "truncate", True),
    )


def _rope_type(fields: Mapping[str, Any]) -> RopeType:
    name = fields.get("rope_type") or fields.get("type") or "default"
    known: tuple[RopeType, ...] = get_args(RopeType)
    for rope_type in known:
        if rope_type == name:
            return rope_type
    raise UnsupportedModelError(f"config.json: the rope type {name!r} is not supported; supported: {', '.join(known)}")


def _optional_number(fields: Mapping[str, Any], name: str) -> float | None:
    """None also where it is 0, which configurations write for no value of their own."""
    return positive_number(fields, name) if fields.get(name) else None
