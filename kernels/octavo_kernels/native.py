"""The C kernels of `cpu_kernels.c`: compiled once for this machine's processor, loaded once a process.

They need a C compiler, as Triton's kernels do on a GPU. Where there is none, or it fails, the ops use torch: slower,
the same results. The choice is made at the first use, logged, and reported as the engine's kernels.
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("cpu_kernels.c")
COMPILE_FLAGS = ("-O3", "-march=native", "-ffast-math", "-fopenmp", "-fPIC")
# Without -ffast-math: gcc would link a start-up routine that makes the whole process flush small numbers to zero.
LINK_FLAGS = ("-shared", "-fopenmp")
COMPILERS = ("cc", "gcc", "clang")
COMPILE_TIMEOUT_S = 120
CACHE_VARIABLE = "OCTAVO_CACHE"

# What paged decode takes: sizes that it keeps on the stack, and heads of whole vectors.
MAX_HEAD_DIM, MAX_BLOCK_SIZE, HEAD_DIM_MULTIPLE = 256, 128, 8

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_SIGNATURES = {
    "octavo_add_rms_norm": [_POINTER] * 4 + [_FLOAT] + [_INT] * 2,
    "octavo_silu_and_mul": [_POINTER] * 2 + [_INT] * 2,
    "octavo_rotate": [_POINTER] * 3 + [_INT] * 5,
    "octavo_write_kv": [_POINTER] * 5 + [_INT] * 3,
    "octavo_paged_decode": [_POINTER] * 5 + [_INT] * 10 + [_FLOAT],
}


class CpuKernels:
    """The compiled kernels. They take float32 tensors on the CPU; the ops check what else they need."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, None
        self._library = library

    def add_rms_norm(
        self, hidden: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """Add `hidden` to `residual` in place and return the normalised sum; [num_rows, size], contiguous."""
        output = torch.empty_like(residual)
        self._library.octavo_add_rms_norm(
            output.data_ptr(), residual.data_ptr(), hidden.data_ptr(), weight.data_ptr(), eps, *residual.shape
        )
        return output

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """[num_rows, 2 * size] -> [num_rows, size], contiguous."""
        num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        output = gate_up.new_empty(num_rows, size)
        self._library.octavo_silu_and_mul(output.data_ptr(), gate_up.data_ptr(), num_rows, size)
        return output

    def rotate_(self, heads: torch.Tensor, num_rotated: int, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Rotate the first heads of [num_rows, num_heads, head_dim], contiguous, in place."""
        num_rows, num_heads, head_dim = heads.shape
        self._library.octavo_rotate(
            heads.data_ptr(), cos.data_ptr(), sin.data_ptr(), num_rows, num_heads, num_rotated, head_dim,
            cos.shape[-1] // 2,
        )  # fmt: skip

    def write_kv(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache_layer: torch.Tensor,
        key_rows: torch.Tensor,
        value_rows: torch.Tensor,
    ) -> None:
        """Copy each token's keys and values to rows of the layer's cache; key and value have one row stride."""
        self._library.octavo_write_kv(
            kv_cache_layer.data_ptr(), key.data_ptr(), value.data_ptr(), key_rows.data_ptr(), value_rows.data_ptr(),
            len(key), key.stride(0), kv_cache_layer.stride(2),
        )  # fmt: skip

    def paged_decode(
        self,
        output: torch.Tensor,
        query: torch.Tensor,
        kv_cache_layer: torch.Tensor,
        block_tables: torch.Tensor,
        seq_lens: torch.Tensor,
        window: int,
        scale: float,
    ) -> None:
        """Attention of one query token per sequence, into `output` [num_seqs, num_heads, head_dim], contiguous.

        block_tables, seq_lens: int64, contiguous; window: 0 for none
        """
        num_seqs, num_heads, head_dim = output.shape
        _, _, block_size, num_kv_heads, _ = kv_cache_layer.shape
        self._library.octavo_paged_decode(
            output.data_ptr(), query.data_ptr(), kv_cache_layer.data_ptr(), block_tables.data_ptr(),
            seq_lens.data_ptr(), num_seqs, block_tables.shape[1], query.stride(0), num_heads, num_kv_heads, head_dim,
            block_size, kv_cache_layer.stride(0), kv_cache_layer.stride(1), window, scale,
        )  # fmt: skip


@functools.cache
def cpu_kernels() -> CpuKernels | None:
    """The kernels of this process; None where they cannot be compiled."""
    compiler = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    if compiler is None:
        logger.info("there is no C compiler, so the CPU's small ops run on torch, more slowly")
        return None
    try:
        return CpuKernels(_compiled(compiler))
    except (OSError, subprocess.SubprocessError) as error:
        detail = error.stderr if isinstance(error, subprocess.CalledProcessError) else error
        logger.warning("the CPU kernels cannot be compiled, so torch's ops are used, more slowly: %s", detail)
        return None


def kernels_for(*tensors: torch.Tensor) -> CpuKernels | None:
    """The kernels, if they take these tensors."""
    if all(tensor.is_cpu and tensor.dtype == torch.float32 for tensor in tensors):
        return cpu_kernels()
    return None


def _compiled(compiler: str) -> Path:
    """The shared library for this source, compiler and processor, compiled if it is not in the cache."""
    processor = Path("/proc/cpuinfo").read_text().split("\n\n")[0] if Path("/proc/cpuinfo").exists() else ""
    flags = next((line for line in processor.splitlines() if line.startswith(("flags", "Features"))), "")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    key = "\0".join((SOURCE.read_text(), *COMPILE_FLAGS, *LINK_FLAGS, version, platform.machine(), flags))
    folder = _cache_folder()
    path = folder / f"cpu-kernels-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            fresh, compiled = Path(scratch) / path.name, Path(scratch) / "kernels.o"
            # libm last, since the vectorised expf comes out of it.
            for command in (
                [compiler, *COMPILE_FLAGS, "-c", "-o", str(compiled), str(SOURCE)],
                [compiler, *LINK_FLAGS, "-o", str(fresh), str(compiled), "-lm"],
            ):
                subprocess.run(command, capture_output=True, text=True, check=True, timeout=COMPILE_TIMEOUT_S)
            fresh.replace(path)  # whole or not at all, also when several processes compile at once
        logger.info("compiled the CPU kernels into %s", path)
    return path


def _cache_folder() -> Path:
    """Where compiled kernels are kept; a container's read-only home leaves a folder of this user's own for it."""
    wanted = Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/octavo").expanduser()
    try:
        wanted.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=wanted):
            return wanted
    except OSError:
        return _private_folder()


def _private_folder() -> Path:
    """This user's among the temporary files; one for this process only, where somebody else can write to it."""
    folder = Path(tempfile.gettempdir()) / f"octavo-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    is_private = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
    return folder if is_private else Path(tempfile.mkdtemp(prefix="octavo-"))
