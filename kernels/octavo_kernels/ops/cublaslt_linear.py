"""Linear layers by an algorithm of cuBLASLt that was chosen by measurement.

cuBLAS takes the first algorithm of its heuristics. Further down its list there is often a faster one, above all where
the tiles of the first do not fill the multiprocessors. An algorithm is 64 opaque bytes that only the version of the
library that made them understands.
"""

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

MAX_WORKSPACE_BYTES: Final = 32 << 20
_ALGORITHM_BYTES: Final = 64
# What the library's headers call these: types, operations, attributes.
_TYPES: Final = {torch.float16: 2, torch.bfloat16: 14}
_FLOAT32: Final = 0
_COMPUTE_FLOAT32: Final = 68
_TRANSPOSE: Final = 1
_DESCRIPTION_TRANSPOSE_A: Final = 3
_PREFERENCE_WORKSPACE: Final = 1
_NUM_ASKED: Final = 40


@dataclass(frozen=True, slots=True)
class Launch:
    """algorithm: 64 bytes in hexadecimal; version: of the library that understands them."""

    algorithm: str
    workspace_bytes: int
    version: int


class _HeuristicResult(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algorithm", ctypes.c_uint8 * _ALGORITHM_BYTES),
        ("workspace_bytes", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


@functools.cache
def _library() -> ctypes.CDLL:
    """The library that torch has loaded. Raises OSError where there is none."""
    major = (torch.version.cuda or "").partition(".")[0]
    library = ctypes.CDLL(f"libcublasLt.so.{major}")
    library.cublasLtGetVersion.restype = ctypes.c_size_t
    return library


@functools.cache
def version() -> int:
    """The library's, 0 where there is none."""
    try:
        return int(_library().cublasLtGetVersion())
    except OSError:
        return 0


def _call(name: str, *arguments: Any) -> None:
    """Raises RuntimeError if the library refuses."""
    status = getattr(_library(), name)(*arguments)
    if status:
        raise RuntimeError(f"{name} failed with status {status}")


@functools.cache
def _handle(device: torch.device) -> ctypes.c_void_p:
    handle = ctypes.c_void_p()
    with torch.cuda.device(device):
        _call("cublasLtCreate", ctypes.byref(handle))
    return handle


@functools.cache
def _workspace(device: torch.device) -> torch.Tensor:
    return torch.empty(MAX_WORKSPACE_BYTES, dtype=torch.uint8, device=device)


@dataclass(frozen=True, slots=True, eq=False)
class _Problem:
    """output^T = weight hidden^T as the library sees it: column by column, so that rows of ours are its columns."""

    description: ctypes.c_void_p
    weight: ctypes.c_void_p
    hidden: ctypes.c_void_p
    output: ctypes.c_void_p


@functools.cache
def _problem(num_tokens: int, row_stride: int, out_features: int, in_features: int, dtype: torch.dtype) -> _Problem:
    description = ctypes.c_void_p()
    _call("cublasLtMatmulDescCreate", ctypes.byref(description), _COMPUTE_FLOAT32, _FLOAT32)
    transpose = ctypes.c_int32(_TRANSPOSE)
    _call(
        "cublasLtMatmulDescSetAttribute", description, _DESCRIPTION_TRANSPOSE_A,
        ctypes.byref(transpose), ctypes.c_size_t(4),
    )  # fmt: skip

    def layout(num_rows: int, num_columns: int, stride: int) -> ctypes.c_void_p:
        created = ctypes.c_void_p()
        sizes = ctypes.c_uint64(num_rows), ctypes.c_uint64(num_columns), ctypes.c_int64(stride)
        _call("cublasLtMatrixLayoutCreate", ctypes.byref(created), _TYPES[dtype], *sizes)
        return created

    return _Problem(
        description,
        weight=layout(in_features, out_features, in_features),
        hidden=layout(in_features, num_tokens, row_stride),
        output=layout(out_features, num_tokens, out_features),
    )


def candidates(num_tokens: int, out_features: int, in_features: int, dtype: torch.dtype) -> list[Launch]:
    """What the heuristics propose for a multiplication on the current GPU, the most promising first."""
    problem = _problem(num_tokens, in_features, out_features, in_features, dtype)
    preference = ctypes.c_void_p()
    _call("cublasLtMatmulPreferenceCreate", ctypes.byref(preference))
    limit = ctypes.c_uint64(MAX_WORKSPACE_BYTES)
    _call(
        "cublasLtMatmulPreferenceSetAttribute", preference, _PREFERENCE_WORKSPACE,
        ctypes.byref(limit), ctypes.c_size_t(8),
    )  # fmt: skip
    results, num_found = (_HeuristicResult * _NUM_ASKED)(), ctypes.c_int()
    _call(
        "cublasLtMatmulAlgoGetHeuristic", _handle(torch.device("cuda", torch.cuda.current_device())),
        problem.description, problem.weight, problem.hidden, problem.output, problem.output,
        preference, _NUM_ASKED, results, ctypes.byref(num_found),
    )  # fmt: skip
    _call("cublasLtMatmulPreferenceDestroy", preference)
    found: Sequence[_HeuristicResult] = results[: num_found.value]
    return [Launch(bytes(each.algorithm).hex(), each.workspace_bytes, version()) for each in found if not each.state]


@functools.cache
def _algorithm(launch: Launch) -> ctypes.Array[ctypes.c_uint8]:
    return (ctypes.c_uint8 * _ALGORITHM_BYTES).from_buffer_copy(bytes.fromhex(launch.algorithm))


_ONE, _ZERO = ctypes.c_float(1.0), ctypes.c_float(0.0)


def cublaslt_linear(hidden: torch.Tensor, weight: torch.Tensor, launch: Launch) -> torch.Tensor:
    """y = x W^T by the algorithm that `launch` names, without waiting.

    hidden:  [num_tokens, in_features], rows contiguous
    weight:  [out_features, in_features], contiguous, of the type of `hidden`, bfloat16 or float16
    Returns  [num_tokens, out_features], contiguous, in the type of `hidden`
    Calls of a device must not overlap on several streams: they share a workspace. Raises RuntimeError if the library
    refuses, such as another version or a number of tokens that the algorithm was not chosen for.
    """
    (num_tokens, in_features), out_features = hidden.shape, weight.shape[0]
    problem = _problem(num_tokens, hidden.stride(0), out_features, in_features, hidden.dtype)
    output = hidden.new_empty(num_tokens, out_features)
    pointer = ctypes.c_void_p
    with torch.cuda.device(hidden.device):
        _call(
            "cublasLtMatmul", _handle(hidden.device), problem.description, ctypes.byref(_ONE),
            pointer(weight.data_ptr()), problem.weight, pointer(hidden.data_ptr()), problem.hidden, ctypes.byref(_ZERO),
            pointer(output.data_ptr()), problem.output, pointer(output.data_ptr()), problem.output, _algorithm(launch),
            pointer(_workspace(hidden.device).data_ptr()), ctypes.c_size_t(MAX_WORKSPACE_BYTES),
            pointer(torch.cuda.current_stream(hidden.device).cuda_stream),
        )  # fmt: skip
    return output
