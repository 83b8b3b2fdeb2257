"""Where a test runs: on the CPU, and on a GPU where there is one."""

import pytest

DEVICES = [pytest.param("cpu", id="cpu"), pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)]
