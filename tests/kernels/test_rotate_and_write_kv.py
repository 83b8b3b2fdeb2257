"""Queries, keys and values after their projection, against a float64 formula."""

from dataclasses import dataclass

import pytest
import torch
from octavo_kernels.launch import FLOAT8_VARIANTS, variant_of
from octavo_kernels.ops.kv_write import locate_rows
from octavo_kernels.ops.kv_write import reference as write_reference
from octavo_kernels.ops.rotate_and_write_kv import (
    example_inputs,
    rotate_and_write_kv,
    rotate_and_write_kv_triton,
)

EPS = 1e-6
# One rounding, at the end; the interpreter cuts bfloat16 off where a GPU rounds it.
TOLERANCE = {
    torch.float32: {"atol": 1e-5, "rtol": 1e-5},
    torch.float16: {"atol": 1e-5, "rtol": 1e-3},
    torch.bfloat16: {"atol": 1e-5, "rtol": 8e-3},
}


@dataclass(frozen=True)
class Case:
    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 16
    rotary_dim: int = 16
    has_norm: bool = False
    interleaved: bool = False


CASES = {
    "llama": Case(8, 2, 128, 128),
    "one KV head": Case(7, 1, 64, 64),
    "more KV heads than a program": Case(10, 10, 16, 16),
    "phi": Case(4, 4, 80, 32),
    "head_dim 96": Case(3, 1, 96, 96),
    "odd sizes": Case(3, 3, 48, 20),
    "qwen3": Case(8, 2, 128, 128, has_norm=True),
    "norm of a partly rotated head": Case(5, 1, 48, 20, has_norm=True),
    "gpt-j": Case(4, 4, 256, 64, interleaved=True),
    "interleaved and normalised": Case(4, 2, 16, 16, has_norm=True, interleaved=True),
    "no rotation": Case(5, 2, 48, 0),
    "norm without rotation": Case(5, 2, 16, 0, has_norm=True),
}
# The kernel does not take them.
ODD_HEADS = Case(4, 4, 15, 4)


def inputs_of(case: Case, num_tokens: int, dtype: torch.dtype, device: torch.device) -> dict[str, object]:
    heads, cos, sin, cache, slots = example_inputs(
        num_tokens, num_heads=case.num_heads, num_kv_heads=case.num_kv_heads, head_dim=case.head_dim,
        rotary_dim=case.rotary_dim or 2,
    )  # fmt: skip
    weights = [torch.randn(case.head_dim).to(dtype).to(device) if case.has_norm else None for _ in range(2)]
    return {
        "heads": heads.to(dtype).to(device),
        "num_heads": case.num_heads,
        "num_kv_heads": case.num_kv_heads,
        "cos": cos.to(device) if case.rotary_dim else None,
        "sin": sin.to(device) if case.rotary_dim else None,
        # All of the cache, so that the layer stays a view into it.
        "kv_cache_layer": cache._base.to(dtype).to(device)[:, 1],
        "slot_mapping": slots.to(device),
        "q_norm_weight": weights[0],
        "k_norm_weight": weights[1],
        "eps": EPS,
        "interleaved": case.interleaved,
    }


def expected_heads(case: Case, inputs: dict[str, object]) -> torch.Tensor:
    """All heads in float64, as one formula after the other makes them."""
    heads = inputs["heads"].double()
    num_rotated = case.num_heads + case.num_kv_heads
    if case.has_norm:
        normalised = heads / (heads.pow(2).mean(-1, keepdim=True) + EPS).sqrt()
        heads[:, : case.num_heads] = normalised[:, : case.num_heads] * inputs["q_norm_weight"].double()
        keys = normalised[:, case.num_heads : num_rotated]
        heads[:, case.num_heads : num_rotated] = keys * inputs["k_norm_weight"].double()
    if not case.rotary_dim:
        return heads
    half = case.rotary_dim // 2
    dims = torch.arange(case.rotary_dim)
    first, second = (dims[0::2], dims[1::2]) if case.interleaved else (dims[:half], dims[half:])
    pairs = torch.complex(heads[:, :num_rotated, first], heads[:, :num_rotated, second])
    turned = pairs * torch.complex(inputs["cos"][..., :half].double(), inputs["sin"][..., half:].double())
    heads[:, :num_rotated, first], heads[:, :num_rotated, second] = turned.real, turned.imag
    return heads


def check(case: Case, inputs: dict[str, object], before: dict[str, object], dtype: torch.dtype) -> None:
    heads = expected_heads(case, before)
    _, key, value = heads.split((case.num_heads, case.num_kv_heads, case.num_kv_heads), dim=1)
    cache = before["kv_cache_layer"]
    write_reference(key.to(dtype), value.to(dtype), cache, before["slot_mapping"])
    torch.testing.assert_close(inputs["heads"].double(), heads, **TOLERANCE[dtype])
    torch.testing.assert_close(inputs["kv_cache_layer"], cache, equal_nan=True, **TOLERANCE[dtype])
    assert bool(inputs["kv_cache_layer"]._base[:, 0].isnan().all())


def copy_of(inputs: dict[str, object]) -> dict[str, object]:
    return {name: each.clone() if isinstance(each, torch.Tensor) else each for name, each in inputs.items()}


@pytest.mark.parametrize("case", [*CASES.values(), ODD_HEADS], ids=[*CASES, "odd heads"])
@pytest.mark.parametrize("num_tokens", [1, 12])
def test_composition_equals_formula(num_tokens: int, case: Case) -> None:
    torch.manual_seed(0)
    inputs = inputs_of(case, num_tokens, torch.float32, torch.device("cpu"))
    before = copy_of(inputs)
    given = {name: each for name, each in inputs.items() if name != "slot_mapping"}
    rotate_and_write_kv(**given, kv_rows=locate_rows(inputs["slot_mapping"], inputs["kv_cache_layer"]))
    check(case, inputs, before, torch.float32)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("num_tokens", [1, 1000] if torch.cuda.is_available() else [1, 6])
def test_kernel_equals_formula(num_tokens: int, case: Case, dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    inputs = inputs_of(case, num_tokens, dtype, device)
    before = copy_of(inputs)
    rotate_and_write_kv_triton(**inputs)
    check(case, inputs, before, dtype)


def test_kernel_takes_tables_of_the_heads_type(device: torch.device) -> None:
    torch.manual_seed(0)
    case = CASES["llama"]
    inputs = inputs_of(case, 6, torch.float16, device)
    inputs |= {"cos": inputs["cos"].half(), "sin": inputs["sin"].half()}
    before = copy_of(inputs)
    rotate_and_write_kv_triton(**inputs)
    check(case, inputs, before, torch.float16)


def test_kernel_leaves_padding_out(device: torch.device) -> None:
    inputs = inputs_of(CASES["qwen3"], 3, torch.float32, device)
    inputs["slot_mapping"].fill_(-1)
    rotate_and_write_kv_triton(**inputs)
    assert bool(inputs["kv_cache_layer"].isnan().all())


def test_kernel_scales_and_clamps_float8(device: torch.device) -> None:
    if device.type == "cuda" and variant_of(device) not in FLOAT8_VARIANTS:
        pytest.skip("this GPU has no float8")
    torch.manual_seed(0)
    case = CASES["no rotation"]
    inputs = inputs_of(case, 6, torch.float32, device)
    # Numbers that the type has, so that nothing hangs on how the interpreter rounds to it.
    heads = inputs["heads"].to(torch.float8_e4m3fn).float()
    heads[0, -1, 0], heads[1, case.num_heads, 1] = 1e6, -1e6
    inputs |= {"heads": heads, "kv_cache_layer": inputs["kv_cache_layer"].to(torch.float8_e4m3fn)}
    expected = inputs["kv_cache_layer"].clone()
    _, key, value = heads.split((case.num_heads, case.num_kv_heads, case.num_kv_heads), dim=1)
    write_reference(key, value, expected, inputs["slot_mapping"], k_scale=0.5, v_scale=0.25)
    rotate_and_write_kv_triton(**inputs, k_scale=0.5, v_scale=0.25)
    torch.testing.assert_close(inputs["kv_cache_layer"].float(), expected.float(), equal_nan=True, atol=0, rtol=0)


@pytest.mark.gpu  # the interpreter does not round to float8
def test_rounds_rotated_keys_to_float8(device: torch.device) -> None:
    if variant_of(device) not in FLOAT8_VARIANTS:
        pytest.skip("this GPU has no float8")
    torch.manual_seed(0)
    case = CASES["qwen3"]
    inputs = inputs_of(case, 63, torch.bfloat16, device)
    inputs["kv_cache_layer"] = inputs["kv_cache_layer"].to(torch.float8_e4m3fn)
    expected = inputs["kv_cache_layer"].clone()
    heads = expected_heads(case, copy_of(inputs))
    _, key, value = heads.split((case.num_heads, case.num_kv_heads, case.num_kv_heads), dim=1)
    write_reference(key, value, expected, inputs["slot_mapping"], k_scale=0.5, v_scale=2.0)
    rotate_and_write_kv_triton(**inputs, k_scale=0.5, v_scale=2.0)
    # Neighbours of this type are an eighth apart; which one is nearer may hang on the last bit.
    torch.testing.assert_close(
        inputs["kv_cache_layer"].float(), expected.float(), equal_nan=True, atol=2**-9, rtol=0.13
    )


@pytest.mark.gpu
def test_is_captured_in_a_graph(device: torch.device) -> None:
    torch.manual_seed(0)
    case = CASES["qwen3"]
    inputs = inputs_of(case, 63, torch.bfloat16, device)
    before = copy_of(inputs)
    rotate_and_write_kv_triton(**copy_of(inputs))  # compiles
    given = {name: each for name, each in inputs.items() if name != "slot_mapping"}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rotate_and_write_kv(**given, kv_rows=locate_rows(inputs["slot_mapping"], inputs["kv_cache_layer"]))
    graph.replay()
    check(case, inputs, before, torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 5}, "contiguous ones"),
        ({"sin": None}, "come together"),
        ({"k_norm_weight": torch.ones(16)}, "come together"),
        ({"cos": torch.ones(3, 1, 18)}, "rotary table"),
        ({"sin": torch.ones(3, 1, 8)}, "rotary table"),
        ({"q_norm_weight": torch.ones(8), "k_norm_weight": torch.ones(16)}, "norm weight"),
        ({"slot_mapping": torch.zeros(2, dtype=torch.int64)}, "does not fit 3 tokens"),
    ],
    ids=["heads", "sine", "one norm", "table", "tables", "weight", "slots"],
)
def test_refuses_what_does_not_fit(change: dict[str, object], message: str, device: torch.device) -> None:
    inputs = inputs_of(Case(), 3, torch.float32, torch.device("cpu")) | change
    with pytest.raises(ValueError, match=message):
        rotate_and_write_kv_triton(**inputs)
    kv_rows = locate_rows(inputs.pop("slot_mapping"), inputs["kv_cache_layer"])
    with pytest.raises(ValueError, match=message):
        rotate_and_write_kv(**inputs, kv_rows=kv_rows)


def test_the_kernel_refuses_heads_of_an_odd_size(device: torch.device) -> None:
    with pytest.raises(ValueError, match="even size, not 15"):
        rotate_and_write_kv_triton(**inputs_of(ODD_HEADS, 3, torch.float32, device))
