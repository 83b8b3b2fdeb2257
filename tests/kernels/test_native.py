"""The C kernels leave the process that loads them as it was."""

import subprocess
import sys

PROGRAM = """
import sys
from octavo_kernels.native import cpu_kernels
smallest = float.fromhex("0x1p-1074")
if cpu_kernels() is None:
    sys.exit("there is no C compiler")
assert smallest * 1.0 == smallest != 0.0, "small numbers are flushed to zero"
"""


def test_small_numbers_stay_small_numbers() -> None:
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert result.returncode == 0 or "no C compiler" in result.stderr, result.stderr
