"""Programmatic dependent launch: a kernel is on the device before the one ahead of it has ended.

Between two kernels of a few microseconds their launch and their end cost as much as the work. A kernel that takes part
calls `wait_for_previous` before it reads or writes anything that another kernel writes; what it reads earlier, such as
weights, arrives meanwhile. It must not skip that call: a kernel has then ended only after the one ahead of it, so that
waiting for the previous one is waiting for all of them. Kernels that do not take part, cuBLAS's and torch's, start when
everything before them has ended: what was written ahead of one of those may be read without waiting, too.
"""
# Triton's kernels: untyped arguments, constexprs in capitals.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octavo_kernels.hardware import GENERIC, HARDWARE
from octavo_kernels.launch import VARIANTS, variant_of

_FIRST_CAPABILITY = (9, 0)

# Variants whose devices all have it.
PDL_VARIANTS: frozenset[str] = frozenset(VARIANTS) - {
    row.kernel_variant for row in (*HARDWARE, GENERIC) if (row.compute_capability or (0, 0)) < _FIRST_CAPABILITY
}


_OPTIONS = {name: {"USE_PDL": name in PDL_VARIANTS, "launch_pdl": name in PDL_VARIANTS} for name in VARIANTS}


def pdl_options(device: torch.device) -> Mapping[str, bool]:
    """What a launch on this device adds: the kernel's constexpr and the launch's attribute."""
    return _OPTIONS[variant_of(device)]


@triton.jit
def launch_next(USE_PDL: tl.constexpr):
    """Let the next kernel be launched as soon as every program of this one is on the device."""
    if USE_PDL:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous(USE_PDL: tl.constexpr):
    """Wait until the kernels ahead have ended and what they wrote can be read."""
    if USE_PDL:
        gdc_wait()


@triton.jit
def prefetch_l2(pointers, NUM_BYTES: tl.constexpr):
    """Ask for NUM_BYTES, a multiple of 16, from each aligned address on, without waiting: into the L2 cache."""
    tl.inline_asm_elementwise(
        f"cp.async.bulk.prefetch.L2.global [$1], {NUM_BYTES}; mov.u32 $0, 0;",
        "=r,l",
        [pointers],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def begin(USE_PDL: tl.constexpr):
    """Both, for a kernel that has nothing to do before."""
    launch_next(USE_PDL)
    wait_for_previous(USE_PDL)
