import os
import sys
from pathlib import Path

import pytest
from octavo_engine.bench.local_server import free_port, running
from octavo_engine.errors import OctavoError

HEALTHY = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_server_runs_while_the_block_does(tmp_path: Path) -> None:
    port = free_port()
    with running([sys.executable, "-c", HEALTHY, str(port)], port, tmp_path / "log") as server:
        assert server.url == f"http://127.0.0.1:{port}"
        assert is_alive(server.pid)
    assert not is_alive(server.pid)


def test_a_server_is_ended_when_the_measurement_fails(tmp_path: Path) -> None:
    port = free_port()
    with (
        pytest.raises(ZeroDivisionError),
        running([sys.executable, "-c", HEALTHY, str(port)], port, tmp_path / "log") as server,
    ):
        1 / 0  # noqa: B018
    assert not is_alive(server.pid)


def test_a_server_that_ends_at_once_is_told_with_its_last_words(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such model')"]
    with pytest.raises(OctavoError, match="no such model"), running(command, free_port(), tmp_path / "log"):
        pass


def test_a_server_that_never_answers_is_ended(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    with (
        pytest.raises(OctavoError, match="in time"),
        running(command, free_port(), tmp_path / "log", start_timeout_s=0.5),
    ):
        pass
