"""`make demo`, as a user runs it: Kubernetes, operator, engine and client together."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.cluster
@pytest.mark.model
@pytest.mark.timeout(900)
def test_the_demo_deploys_chats_and_leaves_nothing() -> None:
    result = subprocess.run(
        [sys.executable, ROOT / "tools" / "demo.py"], capture_output=True, text=True, check=False, timeout=840
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Paris" in result.stdout
    assert "No resources found" in result.stdout + result.stderr
