import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from octavo_engine.bench.ceilings import measure_cpu_rates
from octavo_engine.bench.command import bench
from octavo_engine.bench.gpu_ceilings import measure_gpu_ceilings
from octavo_engine.bench.linears import linear_shapes, measure_linears
from octavo_engine.bench.models import find_model
from octavo_engine.bench.timing import median_s


def test_works_take_turns() -> None:
    calls: list[str] = []
    works = [lambda name=name: calls.append(name) for name in "ab"]
    median_s(works, "cpu", num_repeats=2, num_warm_ups=1, num_calls=2)
    assert "".join(calls) == "ababa"


def test_linear_layers_of_llama_8b_and_of_a_mixture_of_experts() -> None:
    dense, experts = find_model("llama-8b"), find_model("qwen3-30b-a3b")
    shapes = {each.name: (each.out_features, each.in_features, each.count) for each in _shapes(dense)}
    assert shapes == {
        "qkv": (6144, 4096, 32),
        "o": (4096, 4096, 32),
        "up": (28_672, 4096, 32),
        "down": (4096, 14_336, 32),
        "output": (128_256, 4096, 1),
    }
    assert [each.name for each in _shapes(experts)] == ["qkv", "o", "output"]


def _shapes(model):
    return linear_shapes(model.geometry, model.config)


def test_a_step_is_the_sum_over_the_layers() -> None:
    shapes = _shapes(find_model("tiny-llama"))
    (times,) = measure_linears(shapes, torch.device("cpu"), torch.float32, num_rows=[3])
    expected_us = sum(times.layer_us[each.name] * each.count for each in shapes)
    assert times.num_rows == 3
    assert times.step_ms == pytest.approx(expected_us / 1e3)
    assert times.weights_gb_s > 0


def test_rates_of_the_cpu_are_positive() -> None:
    rates = measure_cpu_rates("float32")
    assert rates.bytes_per_s > 1e8
    assert rates.flops_per_s > 1e8


@pytest.mark.gpu
def test_a_gpu_reads_multiplies_and_sustains() -> None:
    ceilings = measure_gpu_ceilings(sustained_s=0.2)
    assert ceilings.read_gb_s > 100
    assert 0.5 < ceilings.copy_gb_s / ceilings.read_gb_s < 1.5
    assert 0.3 < ceilings.sustained_matmul_tflops / ceilings.matmul_tflops < 1.2
    assert ceilings.rates.flops_per_s == ceilings.matmul_tflops * 1e12


@pytest.mark.gpu
def test_linears_of_a_gpu_are_timed_in_graphs() -> None:
    shapes = _shapes(find_model("tiny-llama"))
    times = measure_linears(shapes, torch.device("cuda"), torch.bfloat16, num_rows=[1, 16])
    assert [each.num_rows for each in times] == [1, 16]
    assert all(value > 0 for each in times for value in each.layer_us.values())


def test_the_command_records_ceilings_and_linears(tmp_path: Path) -> None:
    output = tmp_path / "ceilings.jsonl"
    arguments = ["ceilings", "--device", "cpu", "--linears", "tiny-llama", "-o", str(output)]
    run = CliRunner().invoke(bench, arguments, catch_exceptions=False)
    assert run.exit_code == 0, run.output
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["kind"] for record in records] == ["ceilings", *["linears"] * 5]
    assert [record["num_rows"] for record in records[1:]] == [1, 16, 64, 256, 512]
