import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest
from engine.server.fake_core import CRASH_TOKEN_ID
from engine.server.server_process import ServerProcess, running_server

LONG = {"model": "fake", "prompt": "abc"}


def wait_until(condition: object, timeout_s: float = 30) -> None:
    assert callable(condition)
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.02)


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_client_that_leaves_frees_its_blocks(slow_server: ServerProcess, stream: bool) -> None:
    body = {"prompt": "abc" * 50, "n": 2, "max_tokens": 1500, "stream": stream}
    with slow_server.open_socket("/v1/completions", body) as connection:
        wait_until(lambda: slow_server.metric("octavo_num_requests_running") == 2)
        assert slow_server.metric("octavo_kv_cache_usage_ratio") > 0
        if stream:
            assert b"200 OK" in connection.recv(1000)
    wait_until(lambda: slow_server.metric("octavo_num_requests_running") == 0, 5)
    assert slow_server.metric("octavo_kv_cache_usage_ratio") == 0


def test_sigterm_lets_streams_finish_and_refuses_new_requests() -> None:
    with running_server("SlowCore") as server:
        chunks = server.client.completions.create(**LONG, max_tokens=100, stream=True)
        next(chunks)
        server.send_signal(signal.SIGTERM)
        assert server.wait_for("/readyz", 503).json()["reason"] == "shutting down"
        assert server.get("/livez").status_code == 200
        refused = server.post("/v1/completions", {"prompt": "a"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert "retry-after" in refused.headers
        rest = list(chunks)
        assert rest[-1].choices[0].finish_reason == "length"
        assert server.wait() == 0


def test_drain_ends_what_takes_too_long_with_an_error() -> None:
    with running_server("SlowCore", "--drain-timeout-s", "0.5") as server:
        chunks = server.client.completions.create(**LONG, max_tokens=2000, stream=True)
        next(chunks)
        server.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(chunks)
        assert server.wait() == 0


def test_second_signal_ends_at_once() -> None:
    with running_server("SlowCore", "--drain-timeout-s", "60") as server:
        chunks = server.client.completions.create(**LONG, max_tokens=2000, stream=True)
        next(chunks)
        server.send_signal(signal.SIGTERM)
        server.wait_for("/readyz", 503)
        started_s = time.monotonic()
        server.send_signal(signal.SIGINT)
        assert server.wait() == 128 + signal.SIGINT
        assert time.monotonic() - started_s < 10
        with pytest.raises((openai.APIError, httpx.HTTPError)):
            list(chunks)


def test_sigterm_while_loading_ends_cleanly() -> None:
    with running_server("LoadingCore", until_ready=False) as server:
        server.send_signal(signal.SIGTERM)
        assert server.wait() == 0


def test_engine_death_answers_every_request_and_ends_the_server() -> None:
    with running_server("CrashingCore") as server:
        chunks = server.client.completions.create(**LONG, max_tokens=2000, stream=True)
        next(chunks)
        whole: list[httpx.Response] = []
        body = {"prompt": "a", "max_tokens": 2000}
        thread = threading.Thread(target=lambda: whole.append(server.post("/v1/completions", body)))
        thread.start()
        wait_until(lambda: server.metric("octavo_num_requests_running") == 2)
        crash = server.post("/v1/completions", {"prompt": [CRASH_TOKEN_ID]})
        assert (crash.status_code, crash.json()["error"]["code"]) == (503, "engine_unavailable")
        with pytest.raises(openai.APIError, match="exit code 7"):
            list(chunks)
        thread.join()
        assert whole[0].status_code == 503
        assert server.wait() == 1
    assert not any("Traceback" in line for line in server.log)


def test_server_death_ends_the_engine() -> None:
    with running_server("SlowCore") as server:
        children = Path(f"/proc/{server.popen.pid}/task/{server.popen.pid}/children").read_text().split()
        server.send_signal(signal.SIGKILL)
        server.wait()
    (engine_pid,) = children
    wait_until(lambda: not _runs(engine_pid), 10)


def _runs(pid: str) -> bool:
    """Whether the process is there and is no zombie, which waits for whoever adopted it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_model_that_is_not_there_is_one_sentence_and_exit_code_2() -> None:
    with running_server("FailingCore", until_ready=False) as server:
        assert server.wait() == 2
    assert server.log[-1] == "octavo: there is no model at fake"
    assert not any("Traceback" in line for line in server.log)


def test_port_that_is_taken_is_one_sentence_and_exit_code_2() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with running_server("EchoCore", "--port", str(port), until_ready=False) as server:
            assert server.wait() == 2
    assert server.log == [f"octavo: cannot listen on 127.0.0.1:{port}: Address already in use"]


def test_front_end_does_not_import_torch(slow_server: ServerProcess) -> None:
    maps = Path(f"/proc/{slow_server.popen.pid}/maps").read_text()
    assert "libtorch" not in maps


def test_server_modules_do_not_import_torch() -> None:
    code = (
        "import sys, octavo_engine.server.lifecycle, octavo_engine.loading.tokenizer, octavo_engine.model_source\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
