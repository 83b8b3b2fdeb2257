"""Triton's interpreter without work that proves nothing: more than half of the time of the kernels' tests."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import triton.language as tl
import triton.runtime.interpreter as interpreter
from triton.language.semantic import TritonSemantic


def quicken_interpreter() -> None:
    """Change the interpreter of this process. Results stay as they are."""
    _patch_language_once_a_launch()
    _describe_each_shape_once()
    _compare_shapes_at_once()
    _remember_numpy_types()
    # It repeats each integer operation in 64 bits; inputs that an interpreter can compute overflow no offset.
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _patch_language_once_a_launch() -> None:
    """Have functions that a running kernel calls take `triton.language` as an earlier one in its launch left it.

    The interpreter replaces the functions of `triton.language` when a kernel is launched and puts them back at its
    end. It also replaces them whenever a kernel calls another function, thousands of times, with what they already are.
    """
    patch = interpreter._patch_lang

    class Launch(interpreter._LangPatchScope):
        def __init__(self) -> None:
            super().__init__()
            self.patched: set[str] = set()
            launches.append(self)

        def restore(self) -> None:
            super().restore()
            launches.remove(self)

    launches: list[Launch] = []

    @functools.cache
    def language_modules(function: Callable[..., Any]) -> frozenset[str]:
        return frozenset(value.__name__ for value in function.__globals__.values() if value is tl or value is tl.core)

    def patch_once(function: Callable[..., Any]) -> interpreter._LangPatchScope:
        launch = launches[-1] if launches else Launch()
        modules = language_modules(function)
        if not modules <= launch.patched:
            launch._changes += patch(function)._changes
            launch.patched |= modules
        return launch

    interpreter._patch_lang = patch_once


def _describe_each_shape_once() -> None:
    """Share what each tensor, and each type of one, works out from its shape: a third of all time."""
    make_type, make_tensor = tl.block_type.__init__, tl.tensor.__init__
    of_types: dict[tuple[object, ...], dict[str, Any]] = {}

    def init_type(self: tl.block_type, element_ty: tl.dtype, shape: Any) -> None:
        sizes = tuple(getattr(size, "value", size) for size in shape)
        key = (element_ty.name, getattr(element_ty, "address_space", None), sizes)
        if key not in of_types:
            make_type(self, element_ty, shape)
            self.__dict__["sizes"] = sizes
            of_types[key] = self.__dict__
        self.__dict__ = of_types[key]

    def init_tensor(self: tl.tensor, handle: Any, type: tl.dtype) -> None:  # noqa: A002 - the interpreter names it
        known = type.__dict__.get("of_tensor")
        if known is None:
            make_tensor(self, handle, type)
            type.__dict__["of_tensor"] = {name: value for name, value in self.__dict__.items() if name != "handle"}
            return
        self.__dict__.update(known, handle=handle, type=type)

    tl.block_type.__init__, tl.tensor.__init__ = init_type, init_tensor


def _compare_shapes_at_once() -> None:
    """Have operands of one shape skip the search for a common one."""
    broadcast = TritonSemantic.broadcast_impl_value

    def broadcast_value(self: TritonSemantic[Any], left: tl.tensor, right: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
        is_alike = left.type.__dict__.get("sizes") == right.type.__dict__.get("sizes")
        return (left, right) if is_alike else broadcast(self, left, right)

    TritonSemantic.broadcast_impl_value = broadcast_value


def _remember_numpy_types() -> None:
    find, known = interpreter._get_np_dtype, {}

    def numpy_type(dtype: tl.dtype) -> Any:
        if dtype.name not in known:
            known[dtype.name] = find(dtype)
        return known[dtype.name]

    interpreter._get_np_dtype = numpy_type
