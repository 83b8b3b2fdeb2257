"""The bound behind `octavo_step_roofline_ratio` is the one that benchmarks report."""

import pytest
from octavo_engine.bench.roofline import Load, Rates, floors, model_work
from octavo_engine.bench.shapes import SHAPES
from octavo_engine.capacity import Limits, plan_capacity
from octavo_engine.geometry import geometry_from_config
from octavo_engine.protocol import SamplingParams
from octavo_engine.request import Request
from octavo_engine.scheduler import ScheduledRequest, Step
from octavo_engine.step_roofline import scheduled_step_limit_s
from octavo_kernels.hardware import BY_NAME

H200 = BY_NAME["h200"]
RATES = Rates(H200.memory_bandwidth_gbps * 1e9, H200.bf16_tflops * 1e12)


def limit_s(shape: str, chunks: list[tuple[int, int]], kv_cache_dtype: str = "bfloat16", **fields) -> float:
    """Of a step with these (first token, number of tokens); each chunk samples."""
    geometry = geometry_from_config({**SHAPES[shape], **fields})
    capacity = plan_capacity(
        geometry, H200, H200.memory_mib << 20, dtype="bfloat16", kv_cache_dtype=kv_cache_dtype,
        limits=Limits(max_model_len=16_384),
    )  # fmt: skip
    scheduled = [_scheduled(first_token, num_tokens) for first_token, num_tokens in chunks]
    step = Step(scheduled, num_tokens=sum(num_tokens for _, num_tokens in chunks))
    return scheduled_step_limit_s(step, geometry, H200, capacity)


def _scheduled(first_token: int, num_tokens: int) -> ScheduledRequest:
    request = Request("r", 0, [1], 1, SamplingParams(), 0, 0.0)
    return ScheduledRequest(request, first_token, num_tokens, (request,))


@pytest.mark.parametrize("kv_cache_dtype", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize(("num_seqs", "context"), [(1, 128), (1, 8192), (32, 1024), (128, 2048)])
@pytest.mark.parametrize("shape", ["llama-8b", "llama-1b", "qwen3-30b-a3b"])
def test_a_decode_step_is_bound_as_in_benchmarks(shape: str, num_seqs: int, context: int, kv_cache_dtype: str) -> None:
    work = model_work(geometry_from_config(SHAPES[shape]), dtype="bfloat16", kv_cache_dtype=kv_cache_dtype)
    bound = floors(work, Load([(context, 2)] * num_seqs), RATES)
    limit = limit_s(shape, [(context, 1)] * num_seqs, kv_cache_dtype)
    assert limit == pytest.approx(bound.serial_s - bound.prefill_s, rel=0.05)


@pytest.mark.parametrize("lengths", [[8192], [512] * 16])
def test_a_step_of_whole_prompts_is_bound_as_in_benchmarks(lengths: list[int]) -> None:
    work = model_work(geometry_from_config(SHAPES["llama-8b"]), dtype="bfloat16", kv_cache_dtype="bfloat16")
    bound = floors(work, Load([(length, 1) for length in lengths]), RATES)
    assert limit_s("llama-8b", [(0, length) for length in lengths]) == pytest.approx(bound.prefill_s, rel=0.05)


def test_layers_with_a_window_read_no_more_than_it() -> None:
    window = {"sliding_window": 1024, "architectures": ["MistralForCausalLM"]}
    far, near = (limit_s("llama-8b", [(context, 1)] * 32, **window) for context in (8192, 1024))
    assert far == pytest.approx(near, rel=0.01)
    assert limit_s("llama-8b", [(8192, 1)] * 32) > 1.5 * far


def test_chunks_of_a_prompt_cost_what_the_prompt_does() -> None:
    whole = limit_s("llama-8b", [(0, 8192)])
    chunks = sum(limit_s("llama-8b", [(first, 2048)]) for first in range(0, 8192, 2048))
    assert chunks == pytest.approx(whole, rel=0.01)
