"""Which variant of a Triton kernel a device runs, and how an op shows its kernels to a compiler that has no GPU.

Each op's file holds a table `LAUNCH` with the launch parameters of every variant in `VARIANTS`, so a lookup that fails
is a bug. This module knows no op.
"""

import functools
import logging
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from octavo_kernels.hardware import GENERIC, HARDWARE, identify_gpu

logger = logging.getLogger(__name__)

_interprets_cpu: ContextVar[bool] = ContextVar("interprets_cpu", default=False)

VARIANTS: tuple[str, ...] = tuple(sorted({row.kernel_variant for row in (*HARDWARE, GENERIC) if row.is_gpu}))

# Variants whose devices all convert to float8; Triton refuses the type elsewhere.
FLOAT8_VARIANTS: frozenset[str] = frozenset(VARIANTS) - {
    row.kernel_variant for row in (*HARDWARE, GENERIC) if "float8_e4m3fn" not in row.dtypes
}

# exp(x) = exp2(x * LOG2_E), by the instruction that a GPU has.
LOG2_E = tl.constexpr(math.log2(math.e))

# What Triton assumes of an argument that is a multiple of 16 when it launches; wide loads and stores need it.
_MULTIPLE_OF_16 = [["tt.divisibility", 16]]


def runs_triton(tensor: torch.Tensor) -> bool:
    """Whether an op computes this tensor with its Triton kernel: on a GPU, and wherever `interpret_on_cpu` holds."""
    return tensor.is_cuda or _interprets_cpu.get()


@contextmanager
def interpret_on_cpu() -> Iterator[None]:
    """Have tensors of a CPU take the way of a GPU's, through Triton's interpreter (TRITON_INTERPRET=1). For tests."""
    token = _interprets_cpu.set(True)
    try:
        yield
    finally:
        _interprets_cpu.reset(token)


# Of the whole process, so that threads which began before know it, too.
_asked_variant = ""


def use_variant(name: str) -> None:
    """Have GPUs run the kernels of this variant, one of VARIANTS, instead of the hardware table's; "" undoes it."""
    global _asked_variant
    _asked_variant = name
    variant_of.cache_clear()


@functools.cache
def variant_of(device: torch.device) -> str:
    """The kernel variant of `use_variant`, or that the hardware table gives a GPU; "generic" for an unknown one.

    Tensors of a CPU reach a kernel only through Triton's interpreter, which runs the generic variant.
    """
    if device.type != "cuda":
        return GENERIC.kernel_variant
    if _asked_variant:
        logger.info("%s runs the %s kernels, as the configuration asks", device, _asked_variant)
        return _asked_variant
    properties = torch.cuda.get_device_properties(device)
    match = identify_gpu(properties.name, (properties.major, properties.minor), properties.total_memory >> 20)
    logger.info("%s runs the %s kernels: %s", device, match.hardware.kernel_variant, match.detail)
    return match.hardware.kernel_variant


def cdiv(numerator: int, denominator: int) -> int:
    """Rounded up. Triton's own takes microseconds to find out that it is not being compiled, as does the next one."""
    return -(-numerator // denominator)


def next_power_of_2(number: int) -> int:
    """The least that is not below `number`, which is at least 1."""
    return 1 << (number - 1).bit_length()


@dataclass(frozen=True, slots=True)
class CompileExample:
    """A kernel with the types of one real launch: all that compiling it takes, without tensors.

    name:       op and shape
    function:   what `triton.jit` made
    signature:  type of each argument of the run time, as Triton writes it: "*bf16", "i32", "fp32"
    constexprs: value of each constexpr
    """

    name: str
    function: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, object]
    num_warps: int
    num_stages: int


def signature_of(function: Any, pointers: Mapping[str, str], constexprs: Collection[str]) -> dict[str, str]:
    """`CompileExample.signature` of a kernel by its arguments' names: those that are no pointers are int32."""
    return {name: pointers.get(name, "i32") for name in function.arg_names if name not in constexprs}


def compile_example(example: CompileExample, capability: int) -> Any:
    """Compile for a compute capability, such as 90, into what `triton.compile` returns. Needs no GPU.

    Pointers, strides and widths (arguments that end in `_ptr`, `_stride` and `_features`) count as multiples of 16, as
    those of usual models do in a launch, unless the kernel is not specialized on them.
    """
    names = example.function.arg_names
    signature = {name: "constexpr" if name in example.constexprs else example.signature[name] for name in names}
    attributes = {
        (param.num,): _MULTIPLE_OF_16
        for param in example.function.params
        if param.name in example.signature
        and param.name.endswith(("_ptr", "_stride", "_features"))
        and not (param.do_not_specialize or param.do_not_specialize_on_alignment)
    }
    source = ASTSource(example.function, signature, dict(example.constexprs), attributes)
    options = {"num_warps": example.num_warps, "num_stages": example.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
