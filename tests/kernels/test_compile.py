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


# What Triton made of 8-bit floats for sm_90 it would go on to make for sm_89, which lacks the instructions.
_TWO_GPUS = """
from octavo_kernels import catalogue
from octavo_kernels.ops import paged_prefill
examples = [each for each in paged_prefill.compile_examples("ada") if "float8" in each.name][:1]
catalogue.examples = lambda variant: examples
for each in catalogue.compile_all(("hopper", "ada"), 1):
    print("sm_{}{}".format(*each.capability), each.problem)
"""


def test_what_was_compiled_for_one_gpu_does_not_change_another(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", _TWO_GPUS],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.stdout.split("\n")[:2] == ["sm_90 None", "sm_89 None"], result.stderr[-1000:]


# The loads of all threads, then the barrier, then the stores.
_ORDER = """
import re
from octavo_kernels.launch import compile_example
from octavo_kernels.ops import prepare_decode
ptx = compile_example(prepare_decode.compile_examples("hopper")[0], 90).asm["ptx"]
barrier, first_store = ptx.index("bar.sync"), ptx.index("st.global")
last_row = max(each.start() for each in re.finditer("ld.global", ptx[:first_store]))
print(last_row < barrier < first_store)
"""


def test_no_thread_moves_a_decode_row_on_before_all_have_read_it() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", _ORDER]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.stdout == "True\n", result.stderr[-1000:]


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
