"""The way that a GPU takes through the engine, without a GPU: Triton's kernels in the interpreter, graphs replayed as
plain calls, steps launched ahead of their tokens. Tokens must equal those of the CPU's own way.
"""

import os
from pathlib import Path

import pytest
import torch
from octavo_engine import decode_graphs, staging
from octavo_engine.config import EngineConfig
from octavo_engine.core import EngineCore
from octavo_engine.protocol import AbortRequests, AddRequest, SamplingParams
from octavo_engine.runner import Launched
from octavo_engine.scheduler import Step, check_invariants
from octavo_engine.staging import Array
from octavo_kernels.launch import interpret_on_cpu
from octavo_kernels.ops import paged_decode

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="Triton's interpreter is off")

PROMPTS = [[2 + (7 * i + 3 * j) % 120 for j in range(4 + 5 * i)] for i in range(3)]

PENALTIES = {"repetition_penalty": 1.7, "presence_penalty": 0.5, "frequency_penalty": 0.3}


def make_core(folder: Path, **fields) -> EngineCore:
    config = EngineConfig(
        model=str(folder), device="cpu", dtype="float32", max_model_len=32, block_size=8,
        **{"num_kv_blocks": 24, "max_num_batched_tokens": 13, "max_num_seqs": 3, **fields},
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


@pytest.fixture(autouse=True)
def few_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each program takes the interpreter a tenth of a second; how contexts are split is the kernels' own tests'."""
    monkeypatch.setattr(paged_decode, "num_multiprocessors", lambda device: 1)


@pytest.fixture
def folder(tiny_llama_dir) -> Path:
    return tiny_llama_dir(num_hidden_layers=1)


@pytest.mark.parametrize("enable_cuda_graphs", [True, False])
def test_greedy_tokens_are_the_cpus(folder: Path, enable_cuda_graphs: bool) -> None:
    expected = generate(make_core(folder))
    with interpret_on_cpu():
        assert generate(make_core(folder, enable_cuda_graphs=enable_cuda_graphs)) == expected


def test_preempted_sequences_go_on_with_the_same_tokens(folder: Path) -> None:
    expected = generate(make_core(folder), max_tokens=10)
    with interpret_on_cpu():
        core = make_core(folder, num_kv_blocks=4)
        assert generate(core, max_tokens=10) == expected
    assert core.scheduler.counters.num_preemptions > 0


def test_several_rounds_a_step_bring_the_same_tokens(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = generate(make_core(folder), max_tokens=7)
    with interpret_on_cpu():
        core = make_core(folder)
        monkeypatch.setattr(core, "max_rounds", lambda: 3)
        assert generate(core, max_tokens=7) == expected


@pytest.mark.parametrize("params", [{"temperature": 1.0, "seed": 3}, {"logprobs": 1}, {"min_tokens": 5}], ids=str)
def test_a_newcomer_that_is_a_decode_at_once_is_no_part_of_several_rounds(folder: Path, params: dict) -> None:
    """All but the last token of its prompt is cached, and unlike those that run it is not greedy alone."""
    cached = [5] * 17

    def run(max_rounds: int | None) -> dict[str, list[int]]:
        core, answers = make_core(folder), {"first": [], "running": [], "newcomer": []}

        def step() -> None:
            core._host_s, core._round_s = 3.0, 1.0  # three rounds while the host prepares a step
            for output in core.step(max_rounds).outputs:
                answers[output.request_id] += output.token_ids

        def add(name: str, prompt: list[int], **fields) -> None:
            sampling = SamplingParams(**{"max_tokens": 12, "ignore_eos": True, "temperature": 0, **fields})
            core.add_request(AddRequest(name, prompt, sampling, arrival_time_s=0.0))

        add("first", cached, max_tokens=2)
        while core.has_work:
            step()
        add("running", [7, 8, 9, 10])
        for _ in range(3):
            step()
        add("newcomer", cached, **params)
        for _ in range(40):
            step()
        assert not core.has_work
        check_invariants(core.scheduler)
        return answers

    with interpret_on_cpu():
        assert run(max_rounds=None) == run(max_rounds=1)


def answer(core: EngineCore, name: str, prompt: list[int], max_tokens: int) -> list[int]:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=0)
    core.add_request(AddRequest(name, prompt, params, arrival_time_s=0.0))
    return [token for _ in range(50) if core.has_work for output in core.step().outputs for token in output.token_ids]


def test_a_decode_that_goes_on_sends_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []

    def upload(values: Array, device: torch.device) -> torch.Tensor:
        sent.append(len(values))
        return staging.upload(values, device)

    with interpret_on_cpu():
        core = make_core(folder)
        monkeypatch.setattr(decode_graphs, "upload", upload)
        assert len(answer(core, "alone", PROMPTS[1], max_tokens=9)) == 9
        assert len(sent) == 1
        generate(core, max_tokens=9)
    assert len(sent) > 2, "who comes and who ends is sent"


def test_equal_prompts_at_once_share_their_blocks_and_go_on_as_alone(folder: Path) -> None:
    prompt = [3 + i % 50 for i in range(10)]
    expected = answer(make_core(folder), "alone", prompt, max_tokens=12)
    with interpret_on_cpu():
        core = make_core(folder, max_num_batched_tokens=32)
        answers: dict[str, list[int]] = {"a": [], "b": []}
        for name in answers:
            params = SamplingParams(max_tokens=12, ignore_eos=True, temperature=0)
            core.add_request(AddRequest(name, prompt, params, arrival_time_s=0.0))
        while core.has_work:
            for output in core.step().outputs:
                answers[output.request_id] += output.token_ids
            check_invariants(core.scheduler)
            blocks = [request.block_ids[0] for request in core.scheduler.running]
        assert len(set(blocks)) <= 1
    assert answers == {"a": expected, "b": expected}


def test_prompts_are_scored_as_on_the_cpu(folder: Path) -> None:
    """In several chunks, beside others and before their tokens are known."""

    def scores(core: EngineCore) -> dict[str, list]:
        found: dict[str, list] = {}
        for i, prompt in enumerate(PROMPTS):
            params = SamplingParams(max_tokens=4, ignore_eos=True, temperature=0, prompt_logprobs=i)
            core.add_request(AddRequest(f"r{i}", prompt, params, arrival_time_s=float(i)))
        while core.has_work:
            for output in core.step().outputs:
                if output.prompt_logprobs is not None:
                    assert output.request_id not in found
                    found[output.request_id] = output.prompt_logprobs
        return found

    expected = scores(make_core(folder))
    with interpret_on_cpu():
        found = scores(make_core(folder))
    assert {name: len(rows) for name, rows in found.items()} == {f"r{i}": len(each) for i, each in enumerate(PROMPTS)}
    for name, rows in found.items():
        assert rows[0] is None
        for row, other in zip(rows[1:], expected[name][1:], strict=True):
            assert row.token_id == other.token_id
            assert [token_id for token_id, _ in row.top] == [token_id for token_id, _ in other.top]
            assert row.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_a_prompt_that_goes_on_where_another_ended_keeps_its_own_last_token(folder: Path) -> None:
    """All but its last token is cached, so that it is a decode in the place, and at the position, of the one before."""
    first = [5] * 11
    with interpret_on_cpu():
        core = make_core(folder)
        tokens = first + answer(core, "first", first, max_tokens=6)
        second = [*tokens[:16], (tokens[16] + 1) % 100 + 2]
        found = answer(core, "second", second, max_tokens=6)
        assert core.scheduler.counters.num_prefix_cache_hits > 0
    assert found == answer(make_core(folder), "second", second, max_tokens=6)


def test_stop_tokens_end_a_sequence_that_is_ahead_of_the_host(folder: Path) -> None:
    free = generate(make_core(folder))
    stop = free["r1", 0][2]
    with interpret_on_cpu():
        stopped = generate(make_core(folder), stop_token_ids=(stop,))
    for name, token_ids in free.items():
        end = token_ids.index(stop) + 1 if stop in token_ids else len(token_ids)
        assert stopped[name] == token_ids[:end]


@pytest.mark.parametrize(
    "params",
    [
        pytest.param(PENALTIES, id="penalties"),
        pytest.param({**PENALTIES, "n": 2}, id="forks"),
        pytest.param({"logit_bias": {3: 4.0, 120: -9.0, 17: 5.5}}, id="bias"),
        pytest.param({"min_tokens": 4, "ignore_eos": False, "stop_token_ids": tuple(range(60))}, id="min_tokens"),
        pytest.param({**PENALTIES, "logit_bias": {5: 30.0, 6: 29.0}, "logprobs": 2}, id="all and logprobs"),
    ],
)
def test_constrained_tokens_are_the_cpus(folder: Path, params) -> None:
    plain, expected = generate(make_core(folder, max_num_seqs=6)), generate(make_core(folder, max_num_seqs=6), **params)
    assert any(plain[name, 0] != token_ids for (name, _), token_ids in expected.items()), "the constraint does nothing"
    with interpret_on_cpu():
        core = make_core(folder, max_num_seqs=6)
        assert generate(core, **params) == expected
        assert generate(core, **params) == expected, "in the slots of others"


def test_preempted_sequences_remember_what_they_have_seen(folder: Path) -> None:
    expected = generate(make_core(folder), max_tokens=10, **PENALTIES)
    with interpret_on_cpu():
        core = make_core(folder, num_kv_blocks=4)
        assert generate(core, max_tokens=10, **PENALTIES) == expected
    assert core.scheduler.counters.num_preemptions > 0


def test_penalties_of_one_sequence_leave_the_others_alone(folder: Path) -> None:
    plain, penalised = generate(make_core(folder)), generate(make_core(folder), **PENALTIES)
    with interpret_on_cpu():
        core = make_core(folder)
        for i, prompt in enumerate(PROMPTS):
            params = SamplingParams(max_tokens=6, ignore_eos=True, temperature=0, **(PENALTIES if i == 1 else {}))
            core.add_request(AddRequest(f"r{i}", prompt, params, arrival_time_s=float(i)))
        answers: dict[str, list[int]] = {}
        while core.has_work:
            for output in core.step().outputs:
                answers.setdefault(output.request_id, []).extend(output.token_ids)
    assert answers == {"r0": plain["r0", 0], "r1": penalised["r1", 0], "r2": plain["r2", 0]}


def test_penalties_do_not_wait_for_tokens(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with interpret_on_cpu():
        core = make_core(folder)
        num_promised: list[int] = []
        launch = core._runner.launch

        def watch(step: Step) -> Launched:
            num_promised.append(max(request.num_promised for request in step.sampled) if step.sampled else 0)
            return launch(step)

        monkeypatch.setattr(core._runner, "launch", watch)
        generate(core, **PENALTIES)
    assert sum(num_promised) >= 4, "no step was launched ahead of its tokens"


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
