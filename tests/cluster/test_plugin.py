"""How tests are spread over processes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

PASSES = "def test_passes(): pass"
CRASHES_ONCE = f"""
import os, pathlib
def test_before(): pass
def test_crashes():
    path = pathlib.Path(__file__).with_suffix(".begun")
    if not path.exists():
        path.touch()
        os.kill(os.getpid(), {signal.SIGKILL:d})
def test_after(): pass
"""


def test_a_run_whose_process_crashes_ends_with_all_that_is_left(tmp_path: Path) -> None:
    for number in range(8):
        (tmp_path / f"test_{number}.py").write_text(CRASHES_ONCE if number == 4 else PASSES)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "plugin", "-p", "no:cacheprovider", "--numprocesses=1", tmp_path],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)}, cwd=tmp_path, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert "worker 'gw0' crashed while running 'test_4.py::test_crashes'" in result.stdout
    assert "1 failed, 10 passed" in result.stdout
