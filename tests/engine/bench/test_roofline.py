"""Lower bounds against numbers worked out by hand, and against those of the comparison with vLLM and SGLang."""

import pytest
from octavo_engine.bench.roofline import Load, ModelWork, Rates, floors, model_work
from octavo_engine.bench.shapes import SHAPES
from octavo_engine.errors import ConfigError
from octavo_engine.geometry import Experts, geometry_from_config

# 100 weights of layers, 10 of the output, a byte each; 4 operations a pair; 2 bytes of keys and values a token.
WORK = ModelWork(100, 10, 4, 2, layer_itemsize=1, output_itemsize=1)


def of_shape(name: str) -> ModelWork:
    config = SHAPES[name]
    return model_work(geometry_from_config(config), dtype="bfloat16", kv_cache_dtype="bfloat16")


def test_one_request_by_hand_where_memory_decides() -> None:
    # Prompt of 3: 110 + 3 * 2 bytes. Two decode steps: 110, and keys and values of 5 and of 6 tokens.
    bound = floors(WORK, Load([(3, 3)]), Rates(bytes_per_s=1.0, flops_per_s=1e12))
    assert bound.prefill_s == 116
    assert bound.serial_s == bound.strict_s == 116 + (110 + 10) + (110 + 12)


def test_one_request_by_hand_where_arithmetic_decides() -> None:
    # Prompt of 3: 2 * (3 * 100 + 10) + 4 * 6 pairs. Steps: 2 * 110 each, and 4 * 4 and 4 * 5 for their contexts.
    bound = floors(WORK, Load([(3, 3)]), Rates(bytes_per_s=1e12, flops_per_s=1.0))
    assert bound.prefill_s == 620 + 24
    assert bound.serial_s == bound.strict_s == 644 + 220 + 16 + 220 + 20


def test_a_serial_bound_adds_the_slower_of_each_part() -> None:
    # A decode step reads 110 bytes in 110 s, multiplies 220 in 22 s; its context takes 10 s to read, 1.6 to multiply.
    bound = floors(WORK, Load([(3, 2)]), Rates(bytes_per_s=1.0, flops_per_s=10.0))
    assert bound.serial_s - bound.prefill_s == 110 + 10


def test_a_shared_prefix_is_computed_once_and_read_once_or_by_each() -> None:
    # Prefix of 10, two requests of 1 + 2 tokens: prefill of 12 tokens; a step at contexts of 12 each.
    bound = floors(WORK, Load([(1, 2), (1, 2)], num_prefix_tokens=10), Rates(1.0, 1e12))
    assert bound.prefill_s == 110 + 12 * 2
    assert bound.serial_s - bound.prefill_s == 110 + 2 * 2 * 13
    assert bound.serial_shared_s - bound.prefill_s == 110 + 2 * (10 + 2 * 3)


def test_a_request_that_has_ended_costs_nothing() -> None:
    both, one = (floors(WORK, Load(lengths), Rates(1.0, 1e12)) for lengths in ([(3, 1), (3, 3)], [(3, 3)]))
    assert both.serial_s - both.prefill_s == one.serial_s - one.prefill_s


def test_one_token_takes_no_decode_step() -> None:
    bound = floors(WORK, Load([(3, 1)]), Rates(1.0, 1.0))
    assert bound.serial_s == bound.prefill_s


def test_a_load_without_requests_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one request"):
        floors(WORK, Load([]), Rates(1.0, 1.0))


def test_a_step_reads_the_experts_that_its_tokens_touch() -> None:
    experts = Experts(num_layers=1, num_experts=4, num_experts_per_token=2, intermediate_size=1)
    work = ModelWork(100, 10, 4, 2, layer_itemsize=1, output_itemsize=1, num_expert_parameters=200, experts=experts)
    assert work.weight_bytes(1) == 100 + 2 * 50 + 10
    assert work.weight_bytes(2) == 100 + 3 * 50 + 10
    assert work.linear_flops(3, 1) == 2 * (3 * (100 + 2 * 50) + 10)


def test_llama_8b_work_by_hand() -> None:
    work = of_shape("llama-8b")
    layer = 4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14_336
    assert work.num_layer_parameters == 32 * layer
    assert work.weight_bytes(1) == 2 * (32 * layer + 128_256 * 4096)
    assert work.kv_bytes_per_token == 131_072
    assert work.pair_flops == 4 * 32 * 32 * 128


def test_weights_of_one_byte_leave_the_output_layer_as_it_is() -> None:
    config = SHAPES["llama-8b"]
    work = model_work(geometry_from_config(config), dtype="bfloat16", kv_cache_dtype="int8", quantization="int8")
    assert work.weight_bytes(1) == work.num_layer_parameters + 2 * work.num_output_parameters
    assert work.kv_bytes_per_token == 131_072 / 2


@pytest.mark.parametrize(
    ("shape", "load", "strict_s", "serial_s", "serial_shared_s"),
    [
        pytest.param("llama-1b", Load([(512, 256)] * 512), 1.131643, 2.009166, 2.009166, id="W1, 1B"),
        pytest.param("llama-1b", Load([(32, 512)] * 256), 0.837624, 0.857583, 0.857583, id="W2, 1B"),
        pytest.param("llama-1b", Load([(128, 256)]), 0.212326, 0.212326, 0.212326, id="W3, 1B"),
        pytest.param("llama-8b", Load([(8192, 64)] * 32), 5.526820, 6.519434, 6.519434, id="W4, 8B"),
        pytest.param("llama-8b", Load([(128, 128)] * 256, 2048), 1.361622, 4.510619, 1.603166, id="W5, 8B"),
    ],
)
def test_dense_bounds_equal_those_of_the_peer_comparison(
    shape: str, load: Load, strict_s: float, serial_s: float, serial_shared_s: float
) -> None:
    bound = floors(of_shape(shape), load, Rates(2.99e12, 7.71e14))
    assert bound.strict_s == pytest.approx(strict_s, abs=1e-6)
    assert bound.serial_s == pytest.approx(serial_s, abs=1e-6)
    assert bound.serial_shared_s == pytest.approx(serial_shared_s, abs=1e-6)


@pytest.mark.parametrize(("batch_size", "milliseconds"), [(1, 2.04), (4, 5.26), (16, 13.41), (32, 17.96)])
def test_a_step_of_a_mixture_of_experts_equals_that_of_the_peer_comparison(
    batch_size: int, milliseconds: float
) -> None:
    # The mean over 127 decode steps is that at a context of 192 tokens, since the bound is linear in the context.
    bound = floors(of_shape("qwen3-30b-a3b"), Load([(128, 128)] * batch_size), Rates(2.99e12, 7.71e14))
    assert (bound.serial_s - bound.prefill_s) / 127 * 1e3 == pytest.approx(milliseconds, abs=5e-3)
