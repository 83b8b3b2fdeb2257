"""Triton's interpreter without work that proves nothing: more than half of the time of the kernels' tests."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import triton.language as tl
import triton.runtime.interpreter as interpreter


def quicken_interpreter() -> None:
    """Change the interpreter of this process. Results stay as they are."""
    _patch_language_once_a_launch()
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
