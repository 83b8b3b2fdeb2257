"""SIGTERM ends the operator within seconds, also before it has an API server to talk to."""

import socket
import subprocess
import time

import pytest
import yaml
from octavo_operator.handlers import make_settings
from operator_harness import OperatorProcess


def kubeconfig(folder, port):
    """Of an API server on loopback, to be reached without a password."""
    path = folder / "kubeconfig"
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "x", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
        "users": [{"name": "x", "user": {}}],
        "contexts": [{"name": "x", "context": {"cluster": "x", "user": "x"}}],
        "current-context": "x",
    }
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize("is_silent", [False, True], ids=["nobody listens", "nobody answers"])
def test_ends_while_it_waits_for_an_api_server(tmp_path, is_silent):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if is_silent:
            server.listen()
        process = OperatorProcess(kubeconfig(tmp_path, server.getsockname()[1]), tmp_path / "log").start()
        deadline = time.monotonic() + 30
        while process.probe("/healthz") != 200:
            assert time.monotonic() < deadline, process.log.read_text()
            time.sleep(0.05)
        assert process.probe("/readyz") == 503
        started = time.monotonic()
        try:
            assert process.stop(timeout_s=5) == 0
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        assert time.monotonic() - started < 2
        assert "Traceback" not in process.log.read_text()


def test_watches_that_end_leave_no_order_to_kill_the_process_behind():
    assert make_settings().process.ultimate_exiting_timeout is None
