"""Which geometries the engine runs. Others can be planned, so that a plan shows what they would need."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from octavo_engine.errors import UnsupportedModelError
from octavo_engine.geometry.shapes import Geometry

_MODELS = Path(__file__).parents[1] / "models"
_DECORATOR = "register_model"


@cache
def served_architectures() -> frozenset[str]:
    """The architectures that the engine's models register, from their source: importing them needs torch."""
    files = sorted(_MODELS.glob("*.py"))
    return frozenset(name for file in files for name in _registered(ast.parse(file.read_text(encoding="utf-8"))))


def _registered(module: ast.Module) -> Iterator[str]:
    for node in module.body:
        for decorator in node.decorator_list if isinstance(node, ast.ClassDef) else ():
            if isinstance(decorator, ast.Call) and getattr(decorator.func, "id", "") == _DECORATOR:
                yield from (str(each.value) for each in decorator.args if isinstance(each, ast.Constant))


def why_not_served(geometry: Geometry) -> str:
    """Why the engine does not run a model of this geometry, in a sentence; empty if it does."""
    if geometry.architecture not in served_architectures():
        return why_unknown(geometry.architecture)
    if geometry.weight_format is not None:
        return (
            f"weights quantised by {geometry.weight_format.method} are not supported: take the model's unquantised "
            "checkpoint, which quantization int8 shrinks as it is loaded"
        )
    return ""


def why_unknown(architecture: str) -> str:
    """The sentence about an architecture that the engine has no model for."""
    return f"the architecture {architecture} is not supported; supported: {', '.join(sorted(served_architectures()))}"


def check_served(geometry: Geometry) -> None:
    """Raise UnsupportedModelError, with the reason, unless the engine runs it."""
    problem = why_not_served(geometry)
    if problem:
        raise UnsupportedModelError(problem)
