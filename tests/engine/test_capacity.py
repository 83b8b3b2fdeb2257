"""The capacity plan: bytes that can be checked by hand, limits that follow, and a sentence where nothing fits."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from octavo_engine.capacity import GIB, Limits, plan_capacity, step_limit_s, weight_bytes
from octavo_engine.errors import CapacityError, UnsupportedModelError
from octavo_engine.geometry import Geometry, geometry_from_config
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
        pytest.param(80, {"num_kv_blocks": 10, "max_model_len": 1000}, id="a context larger than the blocks"),
    ],
)
def test_what_does_not_fit_is_told_with_its_size(memory_gib: int, limits: dict[str, int]) -> None:
    with pytest.raises(CapacityError, match=r"needs \d+\.\d GiB for a context of \d+ tokens .* offers"):
        plan(LLAMA_8B, memory_gib * GIB, **limits)


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


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_hidden_layers": None}, "num_hidden_layers must be a positive integer"),
        ({"hidden_size": "4096"}, "hidden_size must be a positive integer"),
        ({"num_key_value_heads": 3}, "not a multiple"),
    ],
)
def test_a_config_that_contradicts_itself_is_refused(change: dict[str, object], sentence: str) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "vocab_size": 100,
        "max_position_embeddings": 64,
    }
    assert geometry_from_config(config) == replace(geometry_from_config(config))
    with pytest.raises(UnsupportedModelError, match=sentence):
        geometry_from_config({**config, **change})
