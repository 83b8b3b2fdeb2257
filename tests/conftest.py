"""What all tests share: a real Kubernetes, started only if a test asks for it; Triton's interpreter without a GPU."""

import os
from pathlib import Path

# Before anything imports a kernel: Triton reads it when a kernel is defined.
if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ.setdefault("TRITON_INTERPRET", "1")

from quick_interpreter import quicken_interpreter

quicken_interpreter()


pytest_plugins = ["plugin"]
