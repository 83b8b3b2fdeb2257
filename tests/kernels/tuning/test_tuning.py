"""Tuning times what is right, keeps what it finds and adds it to what was there. The tests give the times: those of an
interpreter mean nothing.
"""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from octavo_engine.cli import cli
from octavo_kernels.launch import interpret_on_cpu
from octavo_kernels.linear_choice import Choice, LinearChoices, LinearShape, by_num_tokens, read_choices
from octavo_kernels.ops import gemv, paged_decode, paged_prefill, small_m_linear
from octavo_kernels.tuning import attention, linear, tables
from octavo_kernels.tuning.attention_batches import Batch, decode_batches
from octavo_kernels.tuning.targets import Heads, Layer, Target

CPU = torch.device("cpu")
GEMV, DOT = gemv.Launch(2, 32, 1), small_m_linear.Launch(16, 32, 1, 1, 1)
SHAPE, GATED = LinearShape(48, 64), LinearShape(48, 64, is_gated=True)
TARGET = Target("tiny", (Layer("plain", 1, SHAPE), Layer("gated", 0, GATED)))


@pytest.fixture(autouse=True)
def implementation() -> str:
    return "triton"


def tune(
    monkeypatch: pytest.MonkeyPatch, times_us: list[float], num_tokens: tuple[int, ...] = (1,), target=TARGET, known=()
):
    """Choices and report, with these times in turn and two candidates."""
    clock = itertools.cycle(times_us)

    def median_us(run, num_copies: int, device: torch.device) -> float:
        run(0)
        return next(clock)

    monkeypatch.setattr(linear, "_DTYPE", torch.float32)  # the interpreter multiplies no bfloat16
    monkeypatch.setattr(linear, "median_us", median_us)
    monkeypatch.setattr(linear, "candidates", lambda shape, num_tokens, device: [GEMV, DOT])
    choices: list[Choice] = []
    report: list[str] = []
    with interpret_on_cpu():
        linear.tune_linear(
            [target], num_tokens, known, CPU, choices.extend, report.append, num_processes=1, deadline_s=math.inf
        )
    return choices, report


def test_the_fastest_that_is_right_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    # cuBLAS, gemv, dot; then gated: cuBLAS, fallback, gemv, dot.
    choices, report = tune(monkeypatch, [10.0, 8.0, 5.0, 20.0, 15.0, 14.95, 16.0])
    assert choices == [Choice(SHAPE, 1, DOT, 5.0, 10.0), Choice(GATED, 1, None, 15.0, 20.0)]
    assert any("tiny     a step of  1: cublas 0.010 ms, chosen 0.005 ms" in line for line in report)


def test_a_gate_is_compared_with_the_plain_kernels_of_earlier_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    fallback_us = linear.Bench.fallback_us

    def observed(bench: linear.Bench, hidden: torch.Tensor, plain: LinearChoices) -> float:
        compared.append(plain)
        return fallback_us(bench, hidden, plain)

    monkeypatch.setattr(linear.Bench, "fallback_us", observed)
    known = [Choice(SHAPE, 1, DOT, 5.0, 10.0), Choice(GATED, 1, GEMV, 5.0, 10.0)]
    tune(monkeypatch, [20.0, 15.0, 14.0, 16.0], target=Target("tiny", TARGET.layers[1:]), known=known)
    assert compared == [{SHAPE: (None, DOT)}]


def test_a_candidate_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = gemv.gemv
    monkeypatch.setattr(gemv, "gemv", lambda *arguments, **options: right(*arguments, **options) * 1.1)
    target = Target("tiny", TARGET.layers[:1])
    choices, report = tune(monkeypatch, [10.0, 9.0], target=target)
    assert choices == [Choice(SHAPE, 1, DOT, 9.0, 10.0)]
    assert [line for line in report if line.startswith(f"WRONG: {GEMV}: error 1")]


def test_a_table_keeps_what_is_not_measured_anew(tmp_path: Path) -> None:
    path = tmp_path / "h100.json"
    old = [Choice(SHAPE, 1, GEMV, 5.0, 6.0), Choice(SHAPE, 2, None, 7.0, 7.0), Choice(GATED, 1, DOT, 8.0, 9.0)]
    tables.add_choices(path, old, "A GPU")
    tables.check_table(path, "linear", "A GPU")
    new = [Choice(SHAPE, 2, DOT, 6.5, 7.0), Choice(SHAPE, 4, None, 8.0, 8.0)]
    tables.add_choices(path, new, "A GPU")
    assert set(read_choices(path)) == {old[0], old[2], *new}
    assert by_num_tokens(read_choices(path))[SHAPE] == (None, GEMV, DOT, None, None)


def test_a_table_names_every_run_that_it_has_rows_of(tmp_path: Path) -> None:
    path = tmp_path / "h100.json"
    before = {"gpu": "A GPU", "torch": "2.0", "triton": "3.0", "date": "2026-01-01"}
    path.write_text(json.dumps({"measured": before, "choices": []}))
    for choice in (Choice(SHAPE, 1, GEMV, 5.0, 6.0), Choice(SHAPE, 2, None, 7.0, 7.0)):
        tables.check_table(path, "linear", "A GPU")
        tables.add_choices(path, [choice], "A GPU")
    first, second = json.loads(path.read_text())["measured"]
    assert first == before
    assert second["torch"] == torch.__version__
    with pytest.raises(ValueError, match="was measured on A GPU"):
        tables.check_table(path, "linear", "Another GPU")


@pytest.mark.parametrize("op", ["linear", "attention"])
@pytest.mark.parametrize(
    "text",
    [
        "nonsense",
        "{}",
        '{"measured": {"gpu": "A GPU"}}',
        '{"measured": {"gpu": "Another GPU"}, "choices": [], "rows": []}',
    ],
)
def test_another_file_is_left_alone(tmp_path: Path, text: str, op: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"is not a table|was measured on Another GPU"):
        tables.check_table(path, op, "A GPU")
    assert path.read_text() == text


DECODE = attention.Job(
    "decode", Heads(4, 1, 16), (Batch("decode", (1,) * 3, (1, 40, 90)),),
    paged_decode.LAUNCH["generic"], (paged_decode.Launch(2048, 1, 1, num_warps=4, num_stages=1),),
)  # fmt: skip
PREFILL = attention.Job(
    "prefill", Heads(4, 1, 16), (Batch("prefill", (40, 5), (40, 90)),),
    paged_prefill.LAUNCH["generic"], (paged_prefill.Launch(64, 2048, num_warps=4, num_stages=1),),
)  # fmt: skip


def test_attention_launches_are_ranked_by_their_gain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 8.0, 10.0, 20.0])
    monkeypatch.setattr(attention, "median_us", lambda run, num_copies, device: next(clock))
    path = tmp_path / "attention.json"
    report: list[str] = []
    with interpret_on_cpu():
        attention.tune_attention(
            [DECODE, PREFILL], torch.float32, CPU,
            lambda rows: tables.add_rows(path, rows, attention.ROW_KEYS, "A GPU"), report.append, deadline_s=math.inf,
        )  # fmt: skip
    assert not [line for line in report if "WRONG" in line]
    decode, prefill = json.loads(path.read_text())["rows"]
    assert (decode["kind"], decode["num_heads"], decode["cache_dtype"]) == ("decode", 4, "float32")
    assert [(each["gain"], each["tile_bytes"]) for each in decode["launches"]] == [(1.25, 2048), (1.0, 8192)]
    assert [each["gain"] for each in prefill["launches"]] == [1.0, 0.5]
    tables.add_rows(path, [{**decode, "launches": []}], attention.ROW_KEYS, "A GPU")
    assert json.loads(path.read_text())["rows"] == [{**decode, "launches": []}, prefill]


def test_a_wrong_attention_launch_has_no_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "median_us", lambda run, num_copies, device: 1.0)
    errors = iter([0.0, 1.0])
    monkeypatch.setattr(attention, "largest_error", lambda example, run: next(errors))
    found: list = []
    with interpret_on_cpu():
        attention.tune_attention([DECODE], torch.float32, CPU, found.extend, lambda line: None, deadline_s=math.inf)
    assert [each["gain"] for each in found[0]["launches"]] == [1.0]


@pytest.mark.parametrize(
    ("variant", "head_dim", "cache_dtype", "kinds"),
    [
        ("generic", 128, torch.bfloat16, ["decode", "prefill"]),
        ("hopper", 128, torch.bfloat16, ["decode", "many decodes", "prefill"]),
        ("hopper", 256, torch.bfloat16, ["decode", "prefill"]),
        ("hopper", 128, torch.float8_e4m3fn, ["decode", "prefill"]),
    ],
)
def test_what_is_shipped_is_what_serving_launches(
    monkeypatch: pytest.MonkeyPatch, variant: str, head_dim: int, cache_dtype: torch.dtype, kinds: list[str]
) -> None:
    monkeypatch.setattr(attention, "variant_of", lambda device: variant)
    jobs = list(attention.jobs([Heads(32, 8, head_dim)], cache_dtype, CPU))
    assert [job.kind for job in jobs] == kinds
    for job in jobs[:-1]:
        for batch in job.batches:
            served = paged_decode.launch_for(variant, head_dim, cache_dtype, len(batch.query_lens))
            assert job.shipped == served
    assert sum(len(job.batches) for job in jobs[:-1]) == len(decode_batches())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is an NVIDIA GPU")
def test_without_a_gpu_the_command_says_so() -> None:
    result = CliRunner().invoke(cli, ["kernels", "tune", "--shapes", "64x64"])
    assert result.exit_code == 2
    assert "NVIDIA GPU, and there is none here" in result.output
