"""The operator's HTTP side."""

import socket

import pytest
from octavo_operator.errors import OperatorError
from octavo_operator.probes import serve_probes
from prometheus_client import CollectorRegistry


async def test_a_port_that_is_taken_is_one_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OperatorError, match=rf"cannot listen on 127\.0\.0\.1:{port}: Address already in use"):
            await serve_probes("127.0.0.1", port, CollectorRegistry(), lambda: "", lambda: "")
