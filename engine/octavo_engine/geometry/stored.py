"""A geometry as plain data: what `octavo inspect` prints, what the operator remembers, what a spec may state."""

import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from functools import cache
from typing import Any

from octavo_engine.errors import UnsupportedModelError
from octavo_engine.geometry.shapes import DTYPE_BYTES, Geometry

# No field of any model comes near; above it numbers are mistakes.
_MOST = 1 << 45


def geometry_to_data(geometry: Geometry) -> dict[str, Any]:
    """Field names and values, nested for experts, latent attention and the weight format; nothing that is absent."""
    return _without_nones(asdict(geometry))


def geometry_from_data(data: object) -> Geometry:
    """The geometry of that data.

    Raises UnsupportedModelError that names a field which is missing, unknown or of the wrong type.
    """
    geometry: Geometry = _build(Geometry, data, "geometry")
    _check(geometry)
    return geometry


def _without_nones(data: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _without_nones(value) if isinstance(value, dict) else value
        for name, value in data.items()
        if value is not None
    }


def _build(kind: type, data: object, place: str) -> Any:
    if not isinstance(data, Mapping):
        raise UnsupportedModelError(f"{place} must be an object, not {data!r}")
    known = {each.name: each for each in fields(kind)}
    for name in data:
        if name not in known:
            raise UnsupportedModelError(f"{place}.{name}: there is no such field; known: {', '.join(known)}")
    for name, each in known.items():
        if name not in data and each.default is MISSING:
            raise UnsupportedModelError(f"{place}.{name} is missing")
    hints = _hints(kind)
    built = kind(**{name: _value(hints[name], value, f"{place}.{name}") for name, value in data.items()})
    for name, each in known.items():
        _check_count(getattr(built, name), f"{place}.{name}", is_required=each.default is MISSING)
    return built


def _check_count(value: object, place: str, *, is_required: bool) -> None:
    """Sizes without which there is no model are positive; others may be 0."""
    if type(value) is int and not (1 if is_required else 0) <= value <= _MOST:
        kind = "positive" if is_required else "not negative"
        raise UnsupportedModelError(f"{place} must be {kind}, and below {_MOST:,}; it is {value}")


@cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _value(hint: Any, value: object, place: str) -> Any:
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        hint = next(each for each in typing.get_args(hint) if each is not type(None))
    if is_dataclass(hint):
        return _build(typing.cast("type", hint), value, place)
    # A truth value is an integer to Python, and 4.0 is no count.
    if type(value) is not hint:
        raise UnsupportedModelError(f"{place} must be {hint.__name__}, not {value!r}")
    return value


def _check(geometry: Geometry) -> None:
    """What the types do not say."""
    experts = geometry.experts
    if experts and (experts.num_layers > geometry.num_layers or experts.num_experts_per_token > experts.num_experts):
        raise UnsupportedModelError("geometry.experts has more layers than the model, or a token passes more than all")
    if geometry.num_heads % geometry.num_kv_heads:
        raise UnsupportedModelError(
            f"geometry.num_heads={geometry.num_heads} is not a multiple of num_kv_heads={geometry.num_kv_heads}"
        )
    if geometry.dtype not in DTYPE_BYTES:
        raise UnsupportedModelError(f"geometry.dtype {geometry.dtype!r} is not known: {', '.join(DTYPE_BYTES)}")
