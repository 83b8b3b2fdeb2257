"""Compiled kernels outlive a process in a folder of their versions and GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
from pathlib import Path
from octavo_kernels.kernel_cache import report_compilations, use_kernel_cache
from octavo_kernels.launch import compile_example
from octavo_kernels.ops.silu_and_mul import compile_examples

version, capability = sys.argv[2], int(sys.argv[3])
use_kernel_cache(Path(sys.argv[1]), version, divmod(capability, 10))
report_compilations(lambda kernel, seconds: print(kernel, 0 < seconds < 60))
for example in compile_examples("generic"):
    assert compile_example(example, capability).asm["cubin"]
"""


@pytest.fixture(autouse=True)
def implementation() -> str:
    return "triton"


def compile_into(folder: Path, version: str = "1", capability: int = 90, reported: int = 2) -> dict[Path, int]:
    """Compile in a process of its own, which reports so many kernels; files of the folder -> when they were written."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PROGRAM, str(folder), version, str(capability)]
    output = subprocess.run(command, env=environment, check=True, timeout=120, capture_output=True, text=True).stdout
    assert output.splitlines() == ["_silu_and_mul_kernel True"] * reported
    return files_of(folder)


def files_of(folder: Path) -> dict[Path, int]:
    return {path.relative_to(folder): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a start of version 1 on compute capability 9.0 has left."""
    folder = tmp_path_factory.mktemp("kernels")
    first = compile_into(folder)
    assert [path for path in first if path.suffix == ".cubin"]
    assert all(path.parts[0] == "octavo-1" and path.parts[2] == "sm-90" for path in first)
    return folder


def test_a_second_start_compiles_nothing(folder: Path) -> None:
    first = files_of(folder)
    assert compile_into(folder, reported=0) == first


def test_other_versions_and_gpus_have_folders_of_their_own(folder: Path) -> None:
    known = files_of(folder)
    for version, capability, part in (("2", 90, "octavo-2"), ("1", 80, "sm-80")):
        files = compile_into(folder, version, capability)
        assert {path: files[path] for path in known} == known
        new = files.keys() - known.keys()
        assert all(part in path.parts for path in new)
        assert [path for path in new if path.suffix == ".cubin"]
        known = files
