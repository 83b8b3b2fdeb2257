"""Every kernel compiles for the GPUs of the table, without a GPU, within their registers and shared memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

OCTAVO = Path(sys.executable).with_name("octavo")


@pytest.mark.timeout(900)
def test_every_variant_compiles_without_spills() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [OCTAVO, "kernels", "compile", "--processes", "2", "--quiet"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert " 0 with problems" in result.stdout


def test_lists_the_launch_parameters_of_a_gpu() -> None:
    result = subprocess.run(
        [OCTAVO, "kernels", "list", "--hardware", "h100"], capture_output=True, text=True, check=True
    )
    assert "variant hopper" in result.stdout
    assert "paged_decode" in result.stdout


def test_an_unknown_gpu_is_one_sentence() -> None:
    command = [OCTAVO, "kernels", "list", "--hardware", "h1000"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "h100" in result.stderr
    assert "Traceback" not in result.stderr
