"""Servers with fake cores, shared by the tests that only ask them."""

import os
from collections.abc import Iterator

import pytest
from engine.server.server_process import TESTS, ServerProcess, running_server


@pytest.fixture(scope="session")
def echo_server() -> Iterator[ServerProcess]:
    """Answers at once with the prompt, over and over."""
    with running_server("EchoCore") as server:
        yield server


@pytest.fixture(scope="session")
def slow_server() -> Iterator[ServerProcess]:
    """The same at 50 tokens/s, to have something in mid-stream."""
    with running_server("SlowCore") as server:
        yield server


@pytest.fixture
def _fake_cores_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's process finds `engine.server.fake_core`, as this process does."""
    paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
