"""Kernels in CUDA C++, for what Triton 3.6 cannot say: clusters of blocks that share what they fetch, odd tiles.

NVRTC, which torch brings, compiles them without a GPU. Machine code lies beside Triton's, see `kernel_cache`.
"""

import ctypes
import functools
import hashlib
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from octavo_kernels.hardware import ComputeCapability
from octavo_kernels.kernel_cache import kernel_folder, tell_of_compilation

_SPILLS: Final = re.compile(r"(\d+) bytes spill stores")
_TENSOR_MAP_BYTES: Final = 128
# What the tensor memory accelerator fetches into a row of shared memory, in bytes, and swizzles.
_SWIZZLE_BYTES: Final = 128


@dataclass(frozen=True, slots=True)
class CudaKernel:
    """A kernel of a source file with one choice of its macros.

    name:         what it does, for a reader
    source:       the file, which defines one `extern "C"` kernel of the file's name
    macros:       lines that are put ahead of it
    shared_bytes: dynamic shared memory of a block
    num_threads:  of a block
    """

    name: str
    source: Path
    macros: str
    shared_bytes: int
    num_threads: int


@dataclass(frozen=True, slots=True)
class Cubin:
    """Machine code. spill_bytes: of each thread."""

    code: bytes
    spill_bytes: int


def compile_cubin(kernel: CudaKernel, capability: ComputeCapability) -> Cubin:
    """Compile for the one architecture that has a compute capability, anew. Needs no GPU.

    Raises RuntimeError with the compiler's words.
    """
    from cuda.bindings import nvrtc

    text = kernel.macros + kernel.source.read_text()
    program = _checked(nvrtc.nvrtcCreateProgram(text.encode(), kernel.source.name.encode(), 0, [], []))
    options = [_architecture(capability).encode(), b"--std=c++17", b"--ptxas-options=-v"]
    error, *_ = nvrtc.nvrtcCompileProgram(program, len(options), options)
    log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
    nvrtc.nvrtcGetProgramLog(program, log)
    said = log.decode().rstrip(" \n\0")
    if int(error):
        raise RuntimeError(f"{kernel.source.name} does not compile: {said}")
    code = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
    nvrtc.nvrtcGetCUBIN(program, code)
    nvrtc.nvrtcDestroyProgram(program)
    spills = _SPILLS.search(said)
    return Cubin(code, int(spills[1]) if spills else 0)


def _architecture(capability: ComputeCapability) -> str:
    """With the instructions that only this architecture has (`a`)."""
    return "--gpu-architecture=sm_{}{}a".format(*capability)


def cached_cubin(kernel: CudaKernel, capability: ComputeCapability) -> bytes:
    """`compile_cubin`, unless the same was compiled before and lies in the folder of compiled kernels."""
    from cuda.bindings import nvrtc

    version = nvrtc.nvrtcVersion()[1:]
    identity = repr((kernel.macros, kernel.source.read_text(), capability, version))
    path = kernel_folder() / f"{kernel.source.stem}-{hashlib.sha256(identity.encode()).hexdigest()}.cubin"
    if path.exists():
        return path.read_bytes()
    start_s = time.monotonic()
    code = compile_cubin(kernel, capability).code
    tell_of_compilation(kernel.name, time.monotonic() - start_s)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Several processes may compile the same at once; each finds a whole file or none.
    written = path.with_suffix(f".{os.getpid()}")
    written.write_bytes(code)
    written.replace(path)
    return code


@functools.cache
def _function(kernel: CudaKernel, device: torch.device) -> Any:
    """The kernel as the device's driver knows it."""
    from cuda.bindings import driver

    context = _checked(driver.cuDevicePrimaryCtxRetain(device.index))
    _checked(driver.cuCtxPushCurrent(context))  # torch's, which a thread without a call of its own lacks
    try:
        module = _checked(driver.cuModuleLoadData(cached_cubin(kernel, torch.cuda.get_device_capability(device))))
        function = _checked(driver.cuModuleGetFunction(module, kernel.source.stem.encode()))
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(driver.cuFuncSetAttribute(function, attribute, kernel.shared_bytes))
    finally:
        driver.cuCtxPopCurrent()
    return function


class TensorMap(ctypes.Structure):
    """What the tensor memory accelerator takes for a matrix, as an argument of a kernel."""

    _fields_ = (("words", ctypes.c_uint64 * (_TENSOR_MAP_BYTES // 8)),)


@functools.lru_cache(maxsize=4096)
def tensor_map(address: int, shape: tuple[int, int], row_stride: int, dtype: torch.dtype, box_rows: int) -> TensorMap:
    """A matrix of 16-bit floats that is fetched by boxes of `box_rows` rows and 128 bytes, swizzled; zeros beyond it.

    row_stride: in elements. Raises RuntimeError if address or row_stride is no multiple of 16 bytes.
    """
    from cuda.bindings import driver

    num_rows, num_columns = shape
    types = driver.CUtensorMapDataType
    is_half = dtype == torch.float16
    element = types.CU_TENSOR_MAP_DATA_TYPE_FLOAT16 if is_half else types.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
    made = _checked(
        driver.cuTensorMapEncodeTiled(
            element,
            2,
            address,
            [driver.cuuint64_t(num_columns), driver.cuuint64_t(num_rows)],
            [driver.cuuint64_t(row_stride * dtype.itemsize)],
            [driver.cuuint32_t(_SWIZZLE_BYTES // dtype.itemsize), driver.cuuint32_t(box_rows)],
            [driver.cuuint32_t(1), driver.cuuint32_t(1)],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )
    return TensorMap((ctypes.c_uint64 * (_TENSOR_MAP_BYTES // 8))(*(int(word) for word in made.opaque)))


Argument = TensorMap | ctypes.c_void_p | ctypes.c_int


def launch(kernel: CudaKernel, num_blocks: int, arguments: Sequence[Argument], device: torch.device) -> None:
    """Launch on the current stream without waiting, ahead of the end of the kernel before, see `pdl`.

    device: with its index. Raises RuntimeError if the driver refuses.
    """
    from cuda.bindings import driver

    dependent = driver.CUlaunchAttribute()
    dependent.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    dependent.value.programmaticStreamSerializationAllowed = 1
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = num_blocks, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = kernel.num_threads, 1, 1
    config.sharedMemBytes = kernel.shared_bytes
    config.hStream = torch.cuda.current_stream(device).cuda_stream
    config.attrs, config.numAttrs = [dependent], 1
    addresses = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
    with torch.cuda.device(device):
        _checked(driver.cuLaunchKernelEx(config, _function(kernel, device), ctypes.addressof(addresses), 0))


def _checked(result: tuple[Any, ...]) -> Any:
    """What a function of the library returned beside its status. Raises RuntimeError if it failed."""
    status, *values = result
    if int(status):
        raise RuntimeError(f"the CUDA driver or compiler failed with {status!r}")
    return values[0] if len(values) == 1 else tuple(values)
