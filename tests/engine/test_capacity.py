"""The capacity plan: bytes that can be checked by hand, limits that follow, and a sentence where nothing fits."""

import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from octavo_engine.capacity import GIB, Limits, plan_capacity, step_limit_s, time_to_first_token_s, weight_bytes
from octavo_engine.capacity.memory import token_activation_bytes
from octavo_engine.errors import CapacityError
from octavo_engine.geometry import Experts, Geometry, WeightFormat
from octavo_kernels.hardware import BY_NAME, CPU

LLAMA_8B = Geometry(
    architecture="LlamaForCausalLM",
    num_layers=32,
    hidden_size=4096,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=14336,
    vocab_size=128256,
    max_position_embeddings=131072,
    tie_word_embeddings=False,
    dtype="bfloat16",
)
SMOLLM2 = Geometry("LlamaForCausalLM", 30, 576, 9, 3, 64, 1536, 49152, 8192, True, "float32")
NEOX_20B = Geometry(
    "GPTNeoXForCausalLM", 44, 6144, 64, 64, 96, 24576, 50432, 2048, False, "float16", has_gated_mlp=False
)
QWEN_HALF_B = Geometry("Qwen2ForCausalLM", 24, 896, 14, 2, 64, 4864, 151936, 32768, True, "bfloat16")
H100 = BY_NAME["h100"]


def plan(geometry: Geometry, memory_bytes: int, hardware=H100, dtype: str = "bfloat16", **limits):
    return plan_capacity(geometry, hardware, memory_bytes, dtype=dtype, kv_cache_dtype=dtype, limits=Limits(**limits))


def test_parameters_are_those_of_the_published_models() -> None:
    assert LLAMA_8B.num_parameters == 8_030_261_248
    assert SMOLLM2.num_parameters == 134_515_008
    assert LLAMA_8B.kv_bytes_per_token("bfloat16") == 131_072


def test_int8_keeps_one_byte_and_a_scale_for_each_channel() -> None:
    channels = SMOLLM2.num_layers * ((9 + 3 + 3) * 64 + 576 + 2 * 1536 + 576)
    linear = SMOLLM2.num_linear_parameters
    float32 = 4 * (channels + SMOLLM2.num_parameters - linear)
    assert weight_bytes(SMOLLM2, H100, "float32", "int8") == linear + float32
    assert weight_bytes(SMOLLM2, CPU, "float32", "int8") == linear + float32 + 4 * SMOLLM2.num_embedding_parameters


def test_an_8b_model_on_an_h100() -> None:
    capacity = plan(LLAMA_8B, H100.memory_mib << 20)
    assert capacity.weight_bytes == 2 * 8_030_261_248
    assert capacity.total_bytes <= 0.9 * (H100.memory_mib << 20)
    assert 0.9 * (H100.memory_mib << 20) - capacity.total_bytes < capacity.kv_block_bytes
    assert capacity.max_model_len == 131_072
    assert capacity.max_num_seqs == 512


def test_a_context_that_was_not_asked_for_shrinks_to_what_fits() -> None:
    capacity = plan(LLAMA_8B, 24 * GIB)
    assert capacity.max_model_len == capacity.num_kv_tokens < 131_072


@pytest.mark.parametrize(
    ("memory_gib", "limits"),
    [
        pytest.param(16, {}, id="the weights alone are too large"),
        pytest.param(24, {"max_model_len": 131_072}, id="the context that was asked for"),
        pytest.param(80, {"num_kv_blocks": 10**6}, id="the blocks that were asked for"),
    ],
)
def test_what_does_not_fit_is_told_with_its_size(memory_gib: int, limits: dict[str, int]) -> None:
    with pytest.raises(CapacityError, match=r"needs \d+\.\d GiB for a context of \d+ tokens .* offers"):
        plan(LLAMA_8B, memory_gib * GIB, **limits)


def test_a_cache_fixed_too_small_for_the_context_is_told() -> None:
    with pytest.raises(CapacityError, match=r"num_kv_blocks=10 holds 160 tokens, .* of 1000: raise it to 63, or lower"):
        plan(LLAMA_8B, 80 * GIB, num_kv_blocks=10, max_model_len=1000)


def test_a_context_that_was_not_asked_for_shrinks_to_the_blocks_that_were() -> None:
    capacity = plan(LLAMA_8B, 80 * GIB, num_kv_blocks=1000)
    assert capacity.max_model_len == capacity.num_kv_tokens == 16_000


@given(
    memory_gib=st.floats(1, 64),
    block_size=st.sampled_from([8, 16, 32, 64]),
    max_num_seqs=st.none() | st.integers(1, 300),
    max_model_len=st.none() | st.integers(1, 8192),
    hardware=st.sampled_from([CPU, H100]),
)
def test_a_plan_never_exceeds_its_memory_and_one_request_always_fits(
    memory_gib, block_size, max_num_seqs, max_model_len, hardware
) -> None:
    memory = int(memory_gib * GIB)
    try:
        capacity = plan(
            SMOLLM2, memory, hardware, "float32",
            block_size=block_size, max_num_seqs=max_num_seqs, max_model_len=max_model_len,
        )  # fmt: skip
    except CapacityError:
        return
    assert capacity.total_bytes <= memory
    assert capacity.num_kv_tokens >= capacity.max_model_len
    assert 1 <= capacity.max_num_seqs <= (max_num_seqs or 512)
    assert capacity.max_num_batched_tokens >= capacity.max_num_seqs


def test_the_roofline_is_bytes_over_bandwidth_for_one_and_arithmetic_for_many() -> None:
    one = step_limit_s(
        LLAMA_8B, H100, weight_bytes=weight_bytes(LLAMA_8B, H100, "bfloat16"), kv_bytes=0, num_tokens=1, num_logits=1
    )
    assert one == pytest.approx(2 * (8_030_261_248 - 128256 * 4096) / 3.35e12)
    many = step_limit_s(LLAMA_8B, H100, weight_bytes=0, kv_bytes=0, num_tokens=8192, num_logits=1)
    assert many == pytest.approx(2 * 8192 * LLAMA_8B.num_linear_parameters / 989e12, rel=0.01)


def test_the_measured_optimum_of_an_8b_model_follows_from_the_chip() -> None:
    """512 sequences and 8,192 tokens of prompts were the best of those measured on an H100 and an H200."""
    for name in ("h100", "h200", "gh200-96gb", "b200"):
        capacity = plan(LLAMA_8B, BY_NAME[name].memory_mib << 20, BY_NAME[name])
        assert (name, capacity.max_num_seqs, capacity.max_num_batched_tokens) == (name, 512, 8192 + 512)


def test_the_limits_of_a_cpu_are_measured_ones() -> None:
    capacity = plan(SMOLLM2, 16 * GIB, CPU, "float32")
    assert (capacity.max_num_seqs, capacity.max_num_batched_tokens) == (64, 256)
    assert capacity.why.max_num_seqs.startswith("measured on a CPU")
    assert "4 GiB, or one context" in capacity.why.num_kv_blocks


LIMITS: dict[str, tuple[Geometry, str, int, int, str, str]] = {
    "arithmetic far above reading": (
        LLAMA_8B, "h100", 512, 8192 + 512,
        "a decode step's arithmetic then takes 1.7 times the reading of the weights (equal at 295)",
        "8,192 of prompts and one of each sequence: reading a weight then takes 1/28 of multiplying with it "
        "(equal at 295 tokens); the prompts take 116 ms",
    ),
    "a slow chip, on which others wait": (
        LLAMA_8B, "l4", 112, 1024 + 112,
        "a decode step at contexts of 1,024 tokens then reads weights and cache for 107 ms",
        "running requests wait for a full step, and 2,048 tokens would take over 200 ms",
    ),
    "a cache without grouped heads": (
        NEOX_20B, "h100", 112, 4096 + 112,
        "a decode step at contexts of 1,024 tokens then reads weights and cache for 50 ms",
        "running requests wait for a full step, and 8,192 tokens would take over 200 ms",
    ),
    "logits that outweigh the model": (
        QWEN_HALF_B, "l4", 712, 16384 + 712,
        "logits and token counts of that many take 5% of the memory",
        "reading a weight then takes 1/41 of multiplying with it (equal at 403 tokens)",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("geometry", "name", "seqs", "tokens", "why_seqs", "why_tokens"), LIMITS.values(), ids=LIMITS)
def test_each_limit_says_what_bounds_it(geometry, name, seqs, tokens, why_seqs, why_tokens) -> None:
    hardware = BY_NAME[name]
    capacity = plan(geometry, hardware.memory_mib << 20, hardware)
    assert (capacity.max_num_seqs, capacity.max_num_batched_tokens) == (seqs, tokens)
    assert why_seqs in capacity.why.max_num_seqs
    assert why_tokens in capacity.why.max_num_batched_tokens


def test_a_cache_that_holds_few_tokens_bounds_the_sequences() -> None:
    capacity = plan(NEOX_20B, 48 * GIB, H100)
    assert capacity.max_num_seqs == 24
    assert capacity.why.max_num_seqs == "the KV cache then holds 128 tokens of each"


def test_what_is_fixed_stays_and_says_so() -> None:
    fixed = {"max_model_len": 4096, "max_num_seqs": 7, "max_num_batched_tokens": 300, "num_kv_blocks": 400}
    capacity = plan(LLAMA_8B, 80 * GIB, **fixed)
    assert {name: getattr(capacity, name) for name in fixed} == fixed
    assert {getattr(capacity.why, name) for name in fixed} == {"the configuration fixes it"}


def test_a_context_too_short_to_serve_does_not_count_as_fitting() -> None:
    with pytest.raises(CapacityError, match="for a context of 2048 tokens"):
        plan(LLAMA_8B, int(18.7 * GIB))
    assert plan(LLAMA_8B, int(18.7 * GIB), max_model_len=512, max_num_seqs=4).max_model_len == 512


def test_graphs_share_what_the_widest_of_them_takes() -> None:
    without = plan(LLAMA_8B, 80 * GIB, enable_cuda_graphs=False, max_num_seqs=4)
    capacity = plan(LLAMA_8B, 80 * GIB, max_num_seqs=4)
    assert (without.graph_bytes, without.launch_bound_tokens) == (0, 0)
    # Of a token: 3 hidden states, queries, keys and values, gate, up and their product.
    token_bytes = 2 * (3 * 4096 + (32 + 2 * 8) * 128 + 3 * 14336)
    assert (capacity.graph_bytes, capacity.launch_bound_tokens) == (2048 * token_bytes, 2048)
    lost = (capacity.graph_bytes + capacity.runtime_bytes - without.runtime_bytes) / capacity.kv_block_bytes
    assert without.num_kv_blocks - capacity.num_kv_blocks == pytest.approx(lost, abs=1)
    many = plan(LLAMA_8B, 80 * GIB, max_num_seqs=4096)
    assert many.graph_bytes == 4096 * (token_bytes + 2 * 128256)


def test_a_step_passes_all_stages() -> None:
    one = plan(LLAMA_8B, 80 * GIB)
    all_three = one.of_stages(3)
    assert all_three.predicted_decode_ms == pytest.approx(3 * one.predicted_decode_ms)
    assert all_three.predicted_ttft_ms == pytest.approx(3 * one.predicted_ttft_ms)
    assert all_three.predicted_prefill_tokens_per_s == pytest.approx(one.predicted_prefill_tokens_per_s / 3)
    assert all_three.total_bytes == one.total_bytes


def test_the_host_launches_only_steps_that_compute_longer() -> None:
    assert plan(QWEN_HALF_B, 80 * GIB).launch_bound_tokens == 32768
    assert plan(LLAMA_8B, 80 * GIB).launch_bound_tokens == 2048
    assert plan(NEOX_20B, 80 * GIB).launch_bound_tokens == 1024


def test_graphs_of_prompts_are_no_wider_than_a_step() -> None:
    token_bytes = token_activation_bytes(QWEN_HALF_B, "bfloat16")
    wide = plan(QWEN_HALF_B, 80 * GIB, max_num_seqs=1)
    narrow = plan(QWEN_HALF_B, 80 * GIB, max_num_seqs=1, max_num_batched_tokens=700)
    assert wide.graph_bytes == token_bytes * wide.max_num_batched_tokens
    assert narrow.graph_bytes == token_bytes * 700


def test_a_quantised_checkpoint_takes_its_stored_bytes() -> None:
    awq = replace(LLAMA_8B, weight_format=WeightFormat("awq", 4, 128, zero_point_bits=4))
    linear = LLAMA_8B.num_linear_parameters
    scales = linear // 128
    expected = linear // 2 + scales * 2 + scales // 2 + 2 * (LLAMA_8B.num_parameters - linear)
    assert weight_bytes(awq, H100, "bfloat16") == expected
    assert weight_bytes(awq, H100, "bfloat16", "int8") == weight_bytes(LLAMA_8B, H100, "bfloat16", "int8")


def test_a_step_of_experts_reads_those_that_its_tokens_choose() -> None:
    moe = replace(LLAMA_8B, experts=Experts(32, 8, 2, 14336), intermediate_size=14336)
    weights = weight_bytes(moe, H100, "bfloat16")

    def seconds(num_tokens: int) -> float:
        return step_limit_s(moe, H100, weight_bytes=weights, kv_bytes=0, num_tokens=num_tokens, num_logits=1)

    experts = 2 * moe.num_expert_parameters
    rest = weights - experts - 2 * 128256 * 4096
    assert seconds(1) == pytest.approx((rest + experts / 4) / 3.35e12)
    assert seconds(2) == pytest.approx((rest + experts * (1 - 0.75**2)) / 3.35e12)


def test_a_prompt_in_chunks_takes_as_long_as_its_pairs_and_weights() -> None:
    weights = weight_bytes(LLAMA_8B, H100, "bfloat16")

    def ttft(num_prompt_tokens: int, budget: int) -> float:
        return time_to_first_token_s(
            LLAMA_8B, H100, weight_bytes=weights, kv_cache_dtype="bfloat16",
            num_prompt_tokens=num_prompt_tokens, max_num_batched_tokens=budget,
        )  # fmt: skip

    linear, logits = 2 * LLAMA_8B.num_linear_parameters, 2 * 128256 * 4096
    pairs = 4 * 32 * 32 * 128 * 4096 * 4097 // 2
    assert ttft(4096, 8192) == pytest.approx((linear * 4096 + logits + pairs) / 989e12)
    assert ttft(4096, 1024) == pytest.approx(ttft(4096, 8192))
    # Chunks too short for the arithmetic units: each waits for the weights.
    assert ttft(128, 16) > 8 * 2 * LLAMA_8B.num_linear_parameters / 3.35e12
    assert ttft(1, 16) == pytest.approx((weights - 2 * 128256 * 4096 + 131072) / 3.35e12)


def test_a_window_shortens_the_predicted_decode() -> None:
    window = replace(LLAMA_8B, sliding_window=256, num_full_layers=16)
    full, short = (plan(each, 80 * GIB, enable_cuda_graphs=False) for each in (LLAMA_8B, window))
    assert full.num_kv_blocks == short.num_kv_blocks
    saved = 512 * 131072 // 2 * (1024 - 256) / 3.35e12
    assert full.predicted_decode_ms - short.predicted_decode_ms == pytest.approx(saved * 1e3)


def test_a_roofline_is_worked_out_in_microseconds() -> None:
    """The engine asks for one in every step."""
    weights = weight_bytes(LLAMA_8B, H100, "bfloat16")
    started = time.perf_counter()
    for _ in range(1000):
        step_limit_s(LLAMA_8B, H100, weight_bytes=weights, kv_bytes=0, num_tokens=1, num_logits=1)
    assert time.perf_counter() - started < 0.1
