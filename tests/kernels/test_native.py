"""The C kernels leave the process that loads them as it was, and come from a folder that only its user writes to."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from octavo_kernels import native

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


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files; no other may be used."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "no-folder").touch()
    monkeypatch.setenv(native.CACHE_VARIABLE, str(tmp_path / "no-folder"))
    return tmp_path


def test_the_folder_for_want_of_a_cache_is_private_and_kept(temporary: Path) -> None:
    folder = native._cache_folder()
    assert folder.parent == temporary
    assert folder.stat().st_mode & 0o777 == 0o700
    assert native._cache_folder() == folder


@pytest.mark.parametrize(
    "occupy",
    [lambda path: (path.mkdir(), path.chmod(0o777)), lambda path: path.symlink_to(path.parent), Path.touch],
    ids=["open to all", "a link", "a file"],
)
def test_a_folder_that_others_may_write_to_is_not_used(temporary: Path, occupy: Callable[[Path], object]) -> None:
    wanted = native._cache_folder()
    wanted.rmdir()
    occupy(wanted)
    folder = native._cache_folder()
    assert folder.parent == temporary
    assert folder != wanted
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_folder_of_another_user_is_not_used(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: mine + 1)
    (temporary / f"octavo-{mine + 1}").mkdir(mode=0o700)
    assert native._cache_folder() != temporary / f"octavo-{mine + 1}"
