"""Checked reading of the fields of a configuration: a number that makes no sense is named, with what it should be."""

from collections.abc import Mapping
from typing import Any, TypeAlias

from octavo_engine.errors import UnsupportedModelError

Config: TypeAlias = Mapping[str, Any]

# What no model comes near: a count above it is a mistake or a lie, and would only make other numbers absurd.
_MOST = {"num_hidden_layers": 1 << 12, "num_attention_heads": 1 << 14, "max_position_embeddings": 1 << 30}
_MOST_OTHERWISE = 1 << 24


def count(config: Config, name: str, default: int | None = None) -> int:
    """A positive integer; `default` where the field is absent or null.

    Raises UnsupportedModelError that names the field.
    """
    value = config.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UnsupportedModelError(f"config.json: {name} must be a positive integer, not {value!r}")
    most = _MOST.get(name, _MOST_OTHERWISE)
    if value > most:
        raise UnsupportedModelError(f"config.json: {name}={value} is absurd: no model has more than {most:,}")
    return value


def optional_count(config: Config, name: str) -> int | None:
    """A positive integer, or None where the field is absent, null or 0.

    Raises UnsupportedModelError that names the field.
    """
    value = config.get(name)
    return None if value is None or (value == 0 and not isinstance(value, bool)) else count(config, name)


def positive_number(config: Config, name: str, default: float | None = None) -> float:
    """A finite number above 0; `default` where the field is absent or null.

    Raises UnsupportedModelError that names the field.
    """
    value = config.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise UnsupportedModelError(f"config.json: {name} must be a positive number, not {value!r}")
    return float(value)


def flag(config: Config, name: str, default: bool) -> bool:
    """A truth value. Raises UnsupportedModelError that names the field."""
    value = config.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise UnsupportedModelError(f"config.json: {name} must be true or false, not {value!r}")
    return value


def part(config: Config, name: str) -> Config:
    """An object inside the configuration; empty where it is absent or null.

    Raises UnsupportedModelError that names the field.
    """
    value = config.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UnsupportedModelError(f"config.json: {name} must be an object, not {value!r}")
    return value


def layer_list(config: Config, name: str) -> list[Any]:
    """A list; empty where it is absent or null. Raises UnsupportedModelError that names the field."""
    value = config.get(name)
    if value is None:
        return []
    if not isinstance(value, list | tuple):
        raise UnsupportedModelError(f"config.json: {name} must be a list, not {value!r}")
    return list(value)


def must_divide(config_name: str, value: int, divisor_name: str, divisor: int) -> None:
    """Raise UnsupportedModelError unless `divisor` divides `value`."""
    if value % divisor:
        raise UnsupportedModelError(f"config.json: {config_name}={value} is not a multiple of {divisor_name}={divisor}")
