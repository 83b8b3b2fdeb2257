import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from octavo_engine.bench.checkpoint import write_configuration, write_weights
from octavo_engine.bench.command import bench
from octavo_engine.bench.offline import OfflinePlan, OfflineResult, generate, measure_workload
from octavo_engine.bench.roofline import ModelWork, Rates
from octavo_engine.bench.shapes import shape_config
from octavo_engine.bench.step_profile import profile_steps
from octavo_engine.bench.workloads import BenchRequest, Workload, fixed, make_requests, named
from octavo_engine.config import EngineConfig
from octavo_engine.core import EngineCore
from octavo_engine.errors import OctavoError


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    config = {**shape_config("tiny-llama"), "dtype": "float32"}
    write_configuration(config, folder)
    write_weights(config, folder, seed=0, dtype="float32", on_progress=lambda fraction, file: None)
    return folder


@pytest.fixture(scope="module")
def core(model_folder: Path) -> Iterator[EngineCore]:
    num_threads = torch.get_num_threads()
    config = EngineConfig(model=str(model_folder), device="cpu", max_model_len=64, num_threads=1)
    yield EngineCore(config, lambda phase: None)
    torch.set_num_threads(num_threads)


def result(workload: Workload, *, times_s: tuple[float, ...], first_token_times_s: tuple[float, ...]) -> OfflineResult:
    count = workload.num_requests
    inputs = workload.num_prefix_tokens + workload.input_tokens.longest
    lengths = ((inputs, workload.output_tokens.longest),) * count
    return OfflineResult(workload, lengths, times_s, first_token_times_s, num_distinct_ends=count)


def test_every_answer_has_the_tokens_that_it_wants(core: EngineCore) -> None:
    answers = generate(core, [BenchRequest((1, 2, 3), 5), BenchRequest((4,), 1), BenchRequest((5, 6), 9)])
    assert [len(answer) for answer in answers] == [5, 1, 9]


def test_equal_prompts_get_equal_answers(core: EngineCore) -> None:
    requests = make_requests(named("T0"), 0, vocab_size=320)
    assert generate(core, requests) == generate(core, requests)


def test_a_request_that_the_engine_refuses_fails_the_measurement(core: EngineCore) -> None:
    with pytest.raises(OctavoError, match="refused"):
        generate(core, [BenchRequest(tuple(range(100)), 5)])


def test_a_workload_is_repeated_as_often_as_it_says(core: EngineCore) -> None:
    measured = measure_workload(core, named("T0"), OfflinePlan(), vocab_size=320)
    assert len(measured.times_s) == 2
    assert measured.first_token_times_s == ()
    assert measured.lengths == ((9, 4),) * 3
    assert len(measure_workload(core, named("T0"), OfflinePlan(num_repeats=1), vocab_size=320).times_s) == 1


def test_figures_are_those_of_the_median_repeat() -> None:
    figures = result(fixed(10, 5, 4), times_s=(3.0, 1.0, 2.0), first_token_times_s=())
    assert figures.output_tokens_per_s == 4 * 5 / 2.0
    assert figures.total_tokens_per_s == 4 * 15 / 2.0
    assert figures.decode_ms_per_token is None


def test_decoding_is_what_comes_after_the_first_token() -> None:
    figures = result(named("W3"), times_s=(2.0,), first_token_times_s=(0.3, 0.725, 0.8))
    assert figures.first_token_ms == 725
    assert figures.decode_ms_per_token == pytest.approx(1275 / 255)


def test_the_bound_takes_a_shared_prefix_for_what_it_is() -> None:
    figures = result(named("W5"), times_s=(1.0,), first_token_times_s=())
    assert figures.load.num_prefix_tokens == 2048
    assert figures.load.lengths[0] == (128, 128)
    work = ModelWork(100, 10, 4, 2, layer_itemsize=1, output_itemsize=1)
    bound = figures.floors(work, Rates(1.0, 1e12))
    assert bound.serial_shared_s < bound.serial_s


def test_a_profile_covers_the_steps_and_leaves_the_engine_idle(core: EngineCore) -> None:
    requests = make_requests(fixed(20, 30, 3), 0, vocab_size=320)
    profile = profile_steps(core, requests, num_steps=4)
    assert profile.num_steps == 4
    assert profile.tokens_per_step == 3
    assert 0 < profile.busy_ms <= profile.wall_ms
    assert "gemm" in {kind.name for kind in profile.kinds}
    assert not core.has_work


def test_the_command_writes_figures_bounds_and_profile(model_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    arguments = ["offline", "--model", str(model_folder), "--workload", "T0", "--repeats", "2", "--profile", "2"]
    arguments += ["--set", "device=cpu", "--set", "num-threads=1", "--bandwidth-gb-s", "10", "--tflops", "0.1"]
    run = CliRunner().invoke(bench, [*arguments, "-o", str(output)], catch_exceptions=False)
    assert run.exit_code == 0, run.output
    (record,) = [json.loads(line) for line in output.read_text().splitlines()]
    assert record["workload"]["name"] == "T0"
    assert len(record["times_s"]) == 2
    assert 0 < record["percent_of_strict"] <= record["percent_of_serial"]
    assert record["rates"] == {"bytes_per_s": 1e10, "flops_per_s": 1e11}
    assert record["engine"]["config"]["max_model_len"] == 13
    assert record["profile"]["kinds"]
    assert "T0" in run.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--model"),
        (["--model", "tiny-llama", "--workload", "nothing"], "sharegpt"),
        (["--model", "tiny-llama", "--workload", "W4"], "8256"),
        (["--model", "tiny-llama", "--tflops", "1"], "go together"),
        (["--model", "tiny-llama", "--set", "max_num_seqs"], "NAME=VALUE"),
        (["--model", "tiny-llama", "--set", "no_field=1"], "no such field"),
        (["--model", "/no/such/folder"], "no folder"),
    ],
    ids=["no-model", "unknown-workload", "too-long", "one-rate", "no-value", "no-field", "no-folder"],
)
def test_a_mistake_is_told_in_a_sentence(arguments: list[str], message: str) -> None:
    run = CliRunner().invoke(bench, ["offline", *arguments])
    assert isinstance(run.exception, OctavoError)
    assert message in str(run.exception)
