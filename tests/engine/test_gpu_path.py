"""The way that a GPU takes through the engine, without a GPU: Triton's kernels in the interpreter, graphs replayed as
plain calls, steps launched ahead of their tokens. Tokens must equal those of the CPU's own way.
"""

import os
from pathlib import Path

import pytest
from octavo_engine.config import EngineConfig
from octavo_engine.core import EngineCore
from octavo_engine.protocol import AbortRequests, AddRequest, SamplingParams
from octavo_engine.scheduler import check_invariants
from octavo_kernels.launch import interpret_on_cpu

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="Triton's interpreter is off")

PROMPTS = [[2 + (7 * i + 3 * j) % 120 for j in range(4 + 5 * i)] for i in range(3)]


def make_core(folder: Path, **fields) -> EngineCore:
    config = EngineConfig(
        model=str(folder), device="cpu", dtype="float32", max_model_len=32, block_size=8, max_num_seqs=3,
        **{"num_kv_blocks": 16, "max_num_batched_tokens": 13, **fields},
    )  # fmt: skip
    return EngineCore(config, lambda phase: None)


def generate(core: EngineCore, max_tokens: int = 6, **params) -> dict[tuple[str, int], list[int]]:
    for i, prompt in enumerate(PROMPTS):
        sampling = SamplingParams(**{"max_tokens": max_tokens, "ignore_eos": True, "temperature": 0, **params})
        core.add_request(AddRequest(f"r{i}", prompt, sampling, arrival_time_s=float(i)))
    answers: dict[tuple[str, int], list[int]] = {}
    while core.has_work:
        for output in core.step().outputs:
            answers.setdefault((output.request_id, output.index), []).extend(output.token_ids)
        check_invariants(core.scheduler)
    return answers


@pytest.fixture
def folder(tiny_llama_dir) -> Path:
    return tiny_llama_dir(num_hidden_layers=1)


@pytest.mark.parametrize("enable_cuda_graphs", [True, False])
def test_greedy_tokens_are_the_cpus(folder: Path, enable_cuda_graphs: bool) -> None:
    expected = generate(make_core(folder))
    with interpret_on_cpu():
        assert generate(make_core(folder, enable_cuda_graphs=enable_cuda_graphs)) == expected


def test_preempted_sequences_go_on_with_the_same_tokens(folder: Path) -> None:
    expected = generate(make_core(folder), max_tokens=13)
    with interpret_on_cpu():
        core = make_core(folder, num_kv_blocks=4)
        assert generate(core, max_tokens=13) == expected
    assert core.scheduler.counters.num_preemptions > 0


def test_several_rounds_a_step_bring_the_same_tokens(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = generate(make_core(folder), max_tokens=7)
    with interpret_on_cpu():
        core = make_core(folder)
        monkeypatch.setattr(core, "_max_rounds", lambda: 3)
        assert generate(core, max_tokens=7) == expected


def test_stop_tokens_end_a_sequence_that_is_ahead_of_the_host(folder: Path) -> None:
    free = generate(make_core(folder))
    stop = free["r1", 0][2]
    with interpret_on_cpu():
        stopped = generate(make_core(folder), stop_token_ids=(stop,))
    for name, token_ids in free.items():
        end = token_ids.index(stop) + 1 if stop in token_ids else len(token_ids)
        assert stopped[name] == token_ids[:end]


def test_penalties_see_every_token(folder: Path) -> None:
    params = {"repetition_penalty": 1.7, "presence_penalty": 0.5, "frequency_penalty": 0.3}
    expected = generate(make_core(folder), **params)
    with interpret_on_cpu():
        assert generate(make_core(folder), **params) == expected


def test_a_draw_depends_on_its_seed_alone(folder: Path) -> None:
    params = {"temperature": 1.2, "top_p": 0.9, "seed": 7, "max_tokens": 3}
    with interpret_on_cpu():
        crowd = generate(make_core(folder), **params)
        alone = make_core(folder, enable_prefix_caching=False)
        alone.add_request(AddRequest("r1", PROMPTS[1], SamplingParams(ignore_eos=True, **params), 0.0))
        tokens: list[int] = []
        while alone.has_work:
            for output in alone.step().outputs:
                tokens += output.token_ids
    assert crowd["r1", 0] == tokens


def test_an_aborted_sequence_gets_nothing_more(folder: Path) -> None:
    with interpret_on_cpu():
        core = make_core(folder)
        for i, prompt in enumerate(PROMPTS):
            params = SamplingParams(max_tokens=8, ignore_eos=True, temperature=0)
            core.add_request(AddRequest(f"r{i}", prompt, params, arrival_time_s=float(i)))
        for _ in range(4):
            core.step()
        core.abort(AbortRequests(["r0"]))
        outcomes = [output for _ in range(20) if core.has_work for output in core.step().outputs]
    of_aborted = [output for output in outcomes if output.request_id == "r0"]
    assert [(output.token_ids, output.finish_reason) for output in of_aborted] == [([], "abort")]
    assert core.scheduler.pool.num_used == 0
