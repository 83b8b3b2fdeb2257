"""Every GPU kernel of this package: found by its module's `LAUNCH` tables and `compile_examples`, compiled without a
GPU for any of the hardware table's.
"""

import importlib
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import triton.backends.nvidia

from octavo_kernels import ops
from octavo_kernels.cuda_source import CudaKernel, compile_cubin
from octavo_kernels.hardware import GENERIC, HARDWARE, ComputeCapability
from octavo_kernels.launch import VARIANTS, CompileExample, compile_example

# Shared memory that one block may have, in bytes (CUDA C++ programming guide, "Technical Specifications").
SHARED_MEMORY: Mapping[ComputeCapability, int] = {
    (8, 0): 163 << 10, (8, 9): 99 << 10, (9, 0): 227 << 10, (10, 0): 227 << 10, (10, 3): 227 << 10,
    (12, 0): 99 << 10, (12, 1): 99 << 10,
}  # fmt: skip

_PROGRAMS = Path(triton.backends.nvidia.__file__).parent / "bin"
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+)")
_SPILLS = re.compile(r"(\d+) bytes spill stores")


@dataclass(frozen=True, slots=True)
class Compiled:
    """What one kernel takes of a multiprocessor. shared_bytes: per block; spill_bytes: per thread."""

    name: str
    capability: ComputeCapability
    registers: int
    shared_bytes: int
    spill_bytes: int

    @property
    def problem(self) -> str | None:
        """Why it must not be shipped, or None."""
        if self.shared_bytes > SHARED_MEMORY[self.capability]:
            return f"needs {self.shared_bytes >> 10} KiB of shared memory of {SHARED_MEMORY[self.capability] >> 10}"
        return f"spills {self.spill_bytes} bytes of registers" if self.spill_bytes else None


def capabilities_of(variant: str) -> list[ComputeCapability]:
    """The compute capabilities of the GPUs that run a variant."""
    rows = (row for row in (*HARDWARE, GENERIC) if row.kernel_variant == variant)
    return sorted({row.compute_capability for row in rows if row.compute_capability})


def op_modules() -> Iterator[ModuleType]:
    """The modules of all ops, by name."""
    for info in sorted(pkgutil.iter_modules(ops.__path__), key=lambda each: each.name):
        yield importlib.import_module(f"{ops.__name__}.{info.name}")


def launch_tables(variant: str) -> dict[str, Any]:
    """Table -> its launch parameters for a variant."""
    return {
        f"{module.__name__.rpartition('.')[2]}.{name}": getattr(module, name)[variant]
        for module in op_modules()
        for name in vars(module)
        if name.endswith("LAUNCH") and isinstance(getattr(module, name), Mapping)
    }


def examples(variant: str) -> list[CompileExample | CudaKernel]:
    """Representative launches of every kernel, with a variant's launch parameters."""
    return [
        example
        for module in op_modules()
        if hasattr(module, "compile_examples")
        for example in module.compile_examples(variant)
    ]


def compile_all(variants: tuple[str, ...] = VARIANTS, num_processes: int | None = None) -> Iterator[Compiled]:
    """Compile every kernel for every GPU of these variants; what variants share is compiled once."""
    jobs: dict[ComputeCapability, dict[object, tuple[str, int]]] = {}
    for variant in variants:
        for index, example in enumerate(examples(variant)):
            for capability in capabilities_of(variant):
                jobs.setdefault(capability, {}).setdefault(_identity(example), (variant, index))
    # A process compiles for one GPU, as an engine's does: Triton's conversions of 8-bit types remain those of the GPU
    # that a process first compiled them for.
    for capability, of_capability in jobs.items():
        with ProcessPoolExecutor(num_processes) as pool:
            yield from pool.map(partial(_compile, capability), of_capability.values())


def _identity(example: CompileExample | CudaKernel) -> object:
    if isinstance(example, CudaKernel):
        return example
    return (
        example.name, repr(example.function), tuple(example.signature.items()),
        tuple((name, repr(value)) for name, value in example.constexprs.items()), example.num_warps, example.num_stages,
    )  # fmt: skip


def _compile(capability: ComputeCapability, job: tuple[str, int]) -> Compiled:
    variant, index = job
    example = examples(variant)[index]
    if isinstance(example, CudaKernel):
        cubin = compile_cubin(example, capability)
        registers, _ = _resources(cubin.code)
        return Compiled(example.name, capability, registers, example.shared_bytes, cubin.spill_bytes)
    major, minor = capability
    kernel = compile_example(example, major * 10 + minor)
    registers, stack_bytes = _resources(kernel.asm["cubin"])
    # Spilled registers lie on the stack, and so does what some of libdevice's functions need.
    spill_bytes = _spill_bytes(kernel.asm["ptx"]) if stack_bytes else 0
    # Dynamic shared memory is the launch's: only the metadata has it.
    return Compiled(example.name, capability, registers, kernel.metadata.shared, spill_bytes)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of stack, of each thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_PROGRAMS / "cuobjdump"), "--dump-resource-usage", file.name]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    match = _RESOURCES.search(output)
    assert match, f"cuobjdump said nothing of resources: {output}"
    return int(match[1]), int(match[2])


def _spill_bytes(ptx: str) -> int:
    """Spilled bytes of each thread, as the assembler tells them."""
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert target, "PTX names its target"
    is_blackwell = int(re.sub(r"\D", "", target[1])) >= 100
    assembler = _PROGRAMS / ("ptxas-blackwell" if is_blackwell else "ptxas")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [
            str(assembler),
            "-v",
            f"--gpu-name={target[1]}",
            str(source),
            "-o",
            str(source.with_suffix(".cubin")),
        ]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = _SPILLS.search(output)
    return int(spills[1]) if spills else 0
