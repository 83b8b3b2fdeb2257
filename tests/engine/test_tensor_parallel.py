"""An engine whose layers are spread over ranks gives the tokens of one that is not, and ends as a whole."""

import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.rank_helpers import generate_in_processes, ignore, process_core, seat_of, sharded_core, thread_ranks
from engine.server.server_process import ServerProcess, running_model
from octavo_engine.bench.checkpoint import write_configuration, write_weights
from octavo_engine.bench.shapes import shape_config
from octavo_engine.config import EngineConfig
from octavo_engine.core import EngineCore
from octavo_engine.device import open_device
from octavo_engine.errors import ConfigError
from octavo_engine.parallel import Ranks
from octavo_engine.protocol import (
    AbortRequests,
    AddRequest,
    EngineStats,
    SamplingParams,
    Seat,
    SequenceOutput,
    StepOutputs,
)
from octavo_engine.ranks import LeadingCore, follow
from octavo_engine.scheduler import check_invariants
from octavo_engine.start import start

pytestmark = pytest.mark.usefixtures("one_thread")

TIE = 1e-3  # where the two likeliest tokens are this close, either is right
PROMPTS = [[(7 * i + 3 * j) % 131 for j in range(5 + 6 * i)] for i in range(6)]
FIELDS: dict[str, Any] = {
    "device": "cpu", "dtype": "float32", "max_model_len": 64, "num_kv_blocks": 14, "block_size": 8, "max_num_seqs": 8,
    "max_num_batched_tokens": 23,
}  # fmt: skip
# One model of each family, with what sets it apart, over (ranks that share a layer, stages). It has three layers.
FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[int, int]]] = {
    "llama": ("Llama", {}, (2, 1)),
    "llama with copied KV heads": ("Llama", {"num_attention_heads": 4, "num_key_value_heads": 2}, (4, 1)),
    "mistral with a window": ("Mistral", {"sliding_window": 9}, (1, 2)),
    "qwen2 with tied embeddings": ("Qwen2", {"tie_word_embeddings": True}, (2, 2)),
    "qwen2 with a window in upper layers": (
        "Qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}, (1, 3)
    ),
    "qwen3": ("Qwen3", {}, (2, 1)),
    "neox": ("GPTNeoX", {"num_attention_heads": 4, "intermediate_size": 102}, (2, 2)),
    "neox in sequence": ("GPTNeoX", {"num_attention_heads": 4, "use_parallel_residual": False}, (2, 1)),
    "falcon with one KV head": ("Falcon", {"num_attention_heads": 4}, (2, 1)),
    "new falcon": ("Falcon", {"new_decoder_architecture": True, "num_attention_heads": 4, "num_kv_heads": 2}, (2, 1)),
    "falcon with linear biases": (
        "Falcon",
        {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False, "num_attention_heads": 4},
        (2, 1),
    ),
}  # fmt: skip
SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 1.3, "frequency_penalty": 0.5, "min_tokens": 3, "logit_bias": {5: 2.0}},
    {"temperature": 1.2, "top_p": 0.9, "seed": 7, "n": 2},
    {"temperature": 0.9},  # the engine's own seeds
]


def add_all(core: EngineCore | LeadingCore, max_tokens: int, prompts: list[list[int]] = PROMPTS) -> None:
    """One request for each prompt, sampled in all the ways there are."""
    for i, prompt in enumerate(prompts):
        sampling = {"ignore_eos": True, "logprobs": 2, **SAMPLINGS[i % len(SAMPLINGS)]}
        core.add_request(AddRequest(f"r{i}", prompt, SamplingParams(max_tokens=max_tokens, **sampling), float(i)))


def run(core: EngineCore | LeadingCore) -> dict[tuple[str, int], list[SequenceOutput]]:
    answers: dict[tuple[str, int], list[SequenceOutput]] = {}
    while core.has_work:
        for output in core.step().outputs:
            answers.setdefault((output.request_id, output.index), []).append(output)
    return answers


def assert_same(answers: dict[tuple[str, int], list[SequenceOutput]], expected) -> None:
    """Token for token, up to where the one core could have gone on either way."""
    assert answers.keys() == expected.keys()
    for name, outputs in answers.items():
        for own, other in zip(outputs, expected[name], strict=True):
            if own.token_ids != other.token_ids:
                (first, best), (second, next_best) = other.logprobs[0].top
                assert best - next_best < TIE, (name, own.token_ids, other.token_ids, first, second)
                break


def spread(config: EngineConfig, tensor: int, pipeline: int = 1) -> EngineConfig:
    return config.model_copy(update={"tensor_parallel_size": tensor, "pipeline_parallel_size": pipeline})


@pytest.mark.parametrize(("architecture", "fields", "sizes"), FAMILIES.values(), ids=FAMILIES)
def test_tokens_are_those_of_one_rank(tiny_model_dir, architecture: str, fields, sizes: tuple[int, int]) -> None:
    config = EngineConfig(model=str(tiny_model_dir(architecture, **fields)), **FIELDS)
    rounds = [PROMPTS, PROMPTS[-1:], PROMPTS[-1:]]  # the first preempts, the last finds its prompt in the prefix cache
    one = EngineCore(config, ignore)
    expected = []
    for prompts in rounds:
        add_all(one, 11, prompts)
        expected.append(run(one))
    with sharded_core(spread(config, *sizes)) as (leading, core):
        for prompts, answers in zip(rounds, expected, strict=True):
            add_all(leading, 11, prompts)
            assert_same(run(leading), answers)
        check_invariants(core.scheduler)
        counters = core.scheduler.counters
        assert counters.num_preemptions > 0
        assert counters.num_prefix_cache_hits > 0
        for memory in core.ready().memory.values():
            # What is planned is the fullest stage, which need not be rank 0's.
            assert memory["actual"] == memory["predicted"] or (sizes[1] > 1 and memory["actual"] < memory["predicted"])


def test_ranks_that_int8_weights_are_spread_over_are_as_good_as_one(tiny_llama_dir) -> None:
    """Each share of a row has a scale of its own, so the logits differ a little."""
    config = EngineConfig(model=str(tiny_llama_dir()), quantization="int8", **FIELDS)
    params = SamplingParams(max_tokens=1, prompt_logprobs=0, ignore_eos=True)
    found = []
    for size in (1, 2):
        with sharded_core(spread(config, size)) as (leading, core):
            leading.add_request(AddRequest("r", PROMPTS[-1], params, 0.0))
            (outputs,) = run(leading).values()
            found.append(torch.tensor([each.logprob for each in outputs[0].prompt_logprobs[1:]]))
            assert core.ready().memory["weights"]["actual"] == core.ready().memory["weights"]["predicted"]
    torch.testing.assert_close(found[0], found[1], atol=0.2, rtol=0)


def test_the_gpus_way_brings_the_same_tokens_from_several_ranks(tiny_llama_dir) -> None:
    """Steps launched ahead, graphs, several rounds a step, the GPU's sampler: in the interpreter, two processes."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton's interpreter is off")
    folder = tiny_llama_dir(num_hidden_layers=1)
    config = EngineConfig(
        model=str(folder), device="cpu", dtype="float32", max_model_len=24, block_size=8, num_kv_blocks=8,
        max_num_batched_tokens=16, max_num_seqs=2, num_threads=1,
    )  # fmt: skip

    def generate(core: EngineCore | LeadingCore, **params) -> dict[str, list[int]]:
        for i, prompt in enumerate(PROMPTS[:2]):
            sampling = SamplingParams(max_tokens=4, ignore_eos=True, temperature=0, **params)
            core.add_request(AddRequest(f"r{i}", prompt, sampling, float(i)))
        answers = run(core)
        return {name: [token for each in outputs for token in each.token_ids] for (name, _), outputs in answers.items()}

    penalties = {"repetition_penalty": 1.7, "presence_penalty": 0.5}
    one = EngineCore(config, ignore)
    expected = [generate(one), generate(one, **penalties)]
    with process_core(spread(config, 2), is_interpreted=True) as (leading, core):
        core.max_rounds = lambda: 3 if core._runner.can_repeat(core.scheduler.running) else 1
        assert [generate(leading), generate(leading, **penalties)] == expected


def test_what_a_client_aborts_ends_on_every_rank(tiny_llama_dir) -> None:
    config = EngineConfig(model=str(tiny_llama_dir()), tensor_parallel_size=2, **FIELDS)
    with sharded_core(config) as (leading, core):
        add_all(leading, max_tokens=25)
        leading.step()
        leading.step()
        leading.abort(AbortRequests(["r0", "r4", "unknown"]))
        leading.abort(AbortRequests(["r2"], index=1))
        answers = run(leading)
        reasons = {name: outputs[-1].finish_reason for name, outputs in answers.items()}
        assert [reasons["r0", 0], reasons["r4", 0], reasons["r2", 1]] == ["abort"] * 3
        assert [reasons["r1", 0], reasons["r2", 0]] == ["length"] * 2
        assert core.scheduler.pool.num_used == 0


class OneTokenCore:
    """Brings a token that its maker chose."""

    has_work = True

    def __init__(self, ranks: Ranks, token_id: int) -> None:
        self.ranks, self.token_id = ranks, token_id

    def max_rounds(self) -> int:
        return 1

    def step(self, max_rounds: int | None = None) -> StepOutputs:
        return StepOutputs([SequenceOutput("r", 0, [self.token_id])], EngineStats())


def test_a_rank_that_samples_other_tokens_is_found_out() -> None:
    def go(rank: int) -> None:
        ranks = Ranks.join(seat_of(rank, 2), 2, torch.device("cpu"))
        if rank:
            follow(OneTokenCore(ranks, token_id=8), ranks)
        else:
            leading = LeadingCore(OneTokenCore(ranks, token_id=7), ranks)
            leading.step()
            leading.step()

    with pytest.raises(RuntimeError, match="rank 1 sampled other tokens than rank 0"), thread_ranks(2, go):
        go(0)


def test_messages_of_any_size_reach_every_rank() -> None:
    messages = [b"short", bytes(range(256)) * 1000, b"again"]
    received: list[bytes] = []

    def go(rank: int) -> None:
        ranks = Ranks.join(seat_of(rank, 3), 3, torch.device("cpu"))
        for message in messages:
            if rank == 0:
                ranks.broadcast(message)
            else:
                received.append(ranks.receive())

    with thread_ranks(3, go):
        go(0)
    assert sorted(received) == sorted(messages * 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tensor_parallel_size": 5}, "tensor_parallel_size=5 and .*: 6 heads cannot be divided among 5 devices"),
        (
            {"tensor_parallel_size": 3},
            "tensor_parallel_size=3 and .*: 80 MLP features cannot be divided among 3 devices",
        ),
    ],
)
def test_what_does_not_divide_is_an_error(tiny_llama_dir, fields, message: str) -> None:
    config = EngineConfig(model=str(tiny_llama_dir()), **FIELDS, **fields)
    with pytest.raises(ConfigError, match=message):
        start(config, ignore, seat_of(0, config.num_ranks))


def test_ranks_of_different_hardware_are_an_error(tiny_llama_dir, monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig(model=str(tiny_llama_dir()), tensor_parallel_size=2, **FIELDS)
    monkeypatch.setattr(Ranks, "tell_all", lambda ranks, topic, text: [text, "h100/85899345920"])
    with (
        pytest.raises(ConfigError, match="need the same hardware; these have cpu, h100"),
        sharded_core(config),
    ):
        pass


def test_an_engine_of_several_ranks_does_not_run_in_one_process(tiny_llama_dir) -> None:
    config = EngineConfig(model=str(tiny_llama_dir()), tensor_parallel_size=2, **FIELDS)
    with pytest.raises(ConfigError, match="2 GPUs need a process each: only `octavo serve` runs them"):
        EngineCore(config, ignore)


@pytest.fixture(scope="module")
def served_dir(tmp_path_factory) -> Path:
    """A tiny model with a tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    config = {**shape_config("tiny-llama"), "dtype": "float32"}
    write_configuration(config, folder)
    write_weights(config, folder, seed=0, dtype="float32", on_progress=lambda fraction, file: None)
    return folder


SERVED = {"device": "cpu", "num_threads": 1, "max_model_len": 1024, "num_kv_blocks": 128}
OPTIONS = [f"--{name.replace('_', '-')}={value}" for name, value in SERVED.items()]


def answer(server: ServerProcess) -> list[int]:
    body = {"prompt": PROMPTS[2], "max_tokens": 9, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    return server.post("/v1/completions", body).json()["choices"][0]["token_ids"]


def answer_of_one_rank(folder: Path) -> list[int]:
    core = EngineCore(EngineConfig(model=str(folder), **SERVED), ignore)
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    core.add_request(AddRequest("r", PROMPTS[2], params, 0.0))
    (outputs,) = run(core).values()
    return [token_id for output in outputs for token_id in output.token_ids]


def test_serves_from_two_ranks_and_ends_when_one_is_killed(served_dir: Path) -> None:
    with running_model(str(served_dir), *OPTIONS, "--tensor-parallel-size=2") as server:
        assert answer(server) == answer_of_one_rank(served_dir)
        body = {"prompt": PROMPTS[0], "max_tokens": 1000, "stream": True, "ignore_eos": True}
        with server.open_socket("/v1/completions", body) as stream:
            assert stream.recv(1)
            os.kill(server.pid_of_rank(1), signal.SIGKILL)
            text = b"".join(iter(lambda: stream.recv(65536), b""))
        assert b"rank 1 of the engine ended unexpectedly (exit code -9)" in text
        assert server.wait() == 1
    assert "the engine died: rank 1 of the engine ended unexpectedly (exit code -9)" in server.log[-1]


def test_serves_from_two_nodes_which_end_together(served_dir: Path, free_tcp_port: int) -> None:
    options = [*OPTIONS, "--tensor-parallel-size=2", "--num-nodes=2", f"--leader-address=localhost:{free_tcp_port}"]
    with (
        running_model(str(served_dir), *options, "--node-rank=1", until_ready=False) as follower,
        running_model(str(served_dir), *options) as leader,
    ):
        assert follower.get("/startupz").json()["phase"] == "ready"
        assert [follower.get(path).status_code for path in ("/readyz", "/livez", "/v1/models")] == [200, 200, 404]
        assert answer(leader) == answer_of_one_rank(served_dir)
        os.kill(follower.pid_of_rank(1), signal.SIGKILL)
        assert (leader.wait(), follower.wait()) == (1, 1)
    reason = "rank 1 of the engine ended unexpectedly (exit code -9)"
    assert any(f"the engine died: node 1: {reason}" in line for line in leader.log)
    assert any(f"the engine died: {reason}" in line for line in follower.log)


def test_more_ranks_than_cores_are_an_error() -> None:
    num_cpus = len(os.sched_getaffinity(0))
    seat = Seat(0, num_cpus + 1, 0, num_cpus + 1, "", 0)
    with pytest.raises(ConfigError, match=f"{num_cpus + 1} ranks on this node need a core each, and there are"):
        open_device(EngineConfig(model="m", device="cpu", tensor_parallel_size=num_cpus + 1), seat)


def test_more_ranks_than_gpus_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="2 ranks on this node need a GPU each, and torch sees 1"):
        open_device(EngineConfig(model="m", tensor_parallel_size=2), Seat(0, 2, 0, 2, "", 0))


# NCCL between real GPUs, whose steps are CUDA graphs; and kernel by kernel, for a spread layer and for two stages.
OF_TWO_GPUS = [name for name, (_, _, sizes) in FAMILIES.items() if math.prod(sizes) == 2]
WITHOUT_GRAPHS = [(name, False) for name in ("llama", "mistral with a window")]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two NVIDIA GPUs")
@pytest.mark.parametrize(("name", "enable_cuda_graphs"), [*((name, True) for name in OF_TWO_GPUS), *WITHOUT_GRAPHS])
def test_tokens_of_two_gpus_are_those_of_one(tiny_model_dir, name: str, enable_cuda_graphs: bool) -> None:
    architecture, fields, sizes = FAMILIES[name]
    config = EngineConfig(
        model=str(tiny_model_dir(architecture, **fields)), enable_cuda_graphs=enable_cuda_graphs,
        **{**FIELDS, "device": "cuda"},
    )  # fmt: skip
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    requests = [AddRequest(f"r{i}", prompt, params, float(i)) for i, prompt in enumerate(PROMPTS)]
    one = generate_in_processes(config, requests)
    assert generate_in_processes(spread(config, *sizes), requests) == one
