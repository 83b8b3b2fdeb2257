"""Finding a server to measure: one that is just starting is waited for."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from octavo_engine.bench.serving import find_endpoint
from octavo_engine.errors import ConfigError


class StartingServer(ThreadingHTTPServer):
    """Lists its model at once, and is healthy when it was asked `num_refusals` times."""

    num_refusals = 2

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = b""
        if self.path == "/v1/models":
            status, body = 200, json.dumps({"data": [{"id": "tiny"}]}).encode()
        elif self.server.num_refusals > 0:
            self.server.num_refusals -= 1
            status = 503
        else:
            status = 200
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def server() -> Iterator[StartingServer]:
    with StartingServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_waits_until_a_server_is_healthy(server: StartingServer) -> None:
    url = f"http://127.0.0.1:{server.server_port}"
    assert find_endpoint(url, None, allow_remote=False, api_key=None, wait_s=30).model == "tiny"
    assert server.num_refusals == 0


def test_a_server_that_does_not_get_healthy_is_an_error(server: StartingServer) -> None:
    server.num_refusals = 1000
    with pytest.raises(ConfigError, match="not healthy in time"):
        find_endpoint(f"http://127.0.0.1:{server.server_port}", None, allow_remote=False, api_key=None, wait_s=0.1)
