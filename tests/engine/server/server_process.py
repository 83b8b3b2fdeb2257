"""Starts `fake_server.py`, or a server with a real model, and waits until it answers."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import httpx
import openai
from guard import Guard

TESTS = Path(__file__).parents[2]
START_TIMEOUT_S = 60
EXIT_TIMEOUT_S = 30


@dataclass
class ServerProcess:
    """A server on a free loopback port; `log` is what it wrote to standard error."""

    popen: subprocess.Popen[str]
    url: str = ""
    log: list[str] = field(default_factory=list)

    @cached_property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60)

    def post(self, path: str, body: object) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60)

    @contextmanager
    def open_socket(self, path: str, body: object) -> Iterator[socket.socket]:
        """A request that is sent, on a connection that the caller may read or drop."""
        content = json.dumps(body).encode()
        url = httpx.URL(self.url)
        head = f"POST {path} HTTP/1.1\r\nHost: {url.host}\r\nContent-Type: application/json\r\n"
        with socket.create_connection((url.host, url.port), timeout=60) as connection:
            connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
            yield connection

    def metric(self, name: str) -> float:
        """The sum of a metric's samples, whatever their labels."""
        lines = self.get("/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if re.match(rf"{re.escape(name)}(\{{| )", line))

    def wait_for(self, path: str, status: int) -> httpx.Response:
        end_s = time.monotonic() + START_TIMEOUT_S
        while (response := self.get(path)).status_code != status:
            assert time.monotonic() < end_s, f"{path} stays {response.status_code}: {self.log}"
            time.sleep(0.05)
        return response

    def wait_for_log(self, pattern: str) -> None:
        """Until it has written a line with that pattern, which may come after the answer that it tells of."""
        end_s = time.monotonic() + START_TIMEOUT_S
        while not any(re.search(pattern, line) for line in self.log):
            assert time.monotonic() < end_s, f"no line with {pattern}: {self.log}"
            time.sleep(0.02)

    def pid_of_rank(self, rank: int) -> int:
        """The process of one rank of an engine that has several."""
        children = Path(f"/proc/{self.popen.pid}/task/{self.popen.pid}/children").read_text().split()
        commands = {int(pid): Path(f"/proc/{pid}/cmdline").read_text() for pid in children}
        (found,) = (pid for pid, command in commands.items() if f'"rank":{rank},' in command)
        return found

    def send_signal(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)

    def wait(self) -> int:
        return self.popen.wait(EXIT_TIMEOUT_S)


@contextmanager
def running_server(core: str, *options: str, until_ready: bool = True) -> Iterator[ServerProcess]:
    """A server with that fake core, stopped at the end."""
    fake_server = [sys.executable, str(Path(__file__).with_name("fake_server.py")), core]
    with _running(fake_server, options, until_ready) as server:
        yield server


@contextmanager
def running_model(model: str, *options: str, until_ready: bool = True) -> Iterator[ServerProcess]:
    """`octavo serve` with a model, stopped at the end."""
    command = [str(Path(sys.executable).with_name("octavo")), "serve", model]
    with _running(command, options, until_ready) as server:
        yield server


@contextmanager
def _running(command: Sequence[str], options: Sequence[str], until_ready: bool) -> Iterator[ServerProcess]:
    arguments = [*command, "--host", "127.0.0.1", "--port", "0", *options]
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    with (
        closing(Guard()) as guard,
        subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, text=True, process_group=0) as popen,
    ):
        guard.watch(popen.pid)
        server = ServerProcess(popen)
        is_listening = threading.Event()
        reader = threading.Thread(target=_read_log, args=(server, is_listening))
        reader.start()
        try:
            assert is_listening.wait(START_TIMEOUT_S), server.log
            if server.url and until_ready:
                server.wait_for("/readyz", 200)
            yield server
        finally:
            if popen.poll() is None:
                popen.send_signal(signal.SIGTERM)
            try:
                popen.wait(EXIT_TIMEOUT_S)
            finally:
                popen.kill()
                reader.join()
                guard.forget(popen.pid)
                server.client.close()


def _read_log(server: ServerProcess, is_listening: threading.Event) -> None:
    assert server.popen.stderr is not None
    for line in server.popen.stderr:
        server.log.append(line.rstrip())
        if match := re.search(r"listening on (http://\S+)", line):
            server.url = match.group(1)
            is_listening.set()
    is_listening.set()  # it ended before it listened
