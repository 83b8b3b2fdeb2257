"""Linear layers for few tokens against float32: under Triton's interpreter, or larger and in bfloat16 on a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from octavo_kernels.linear_choice import Choice, LinearShape, by_num_tokens, read_choices, write_choices
from octavo_kernels.ops import gemv, small_m_linear
from octavo_kernels.ops.gemv import reference
from octavo_kernels.ops.linear import GpuLinear, linear_silu_and_mul

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
# ||output - expected|| / ||expected||: a unit in the last place of the output (the interpreter cuts bfloat16 off).
TOLERANCE = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SCALE = 8 if HAS_GPU else 1  # of the features

GEMV = gemv.Launch(block_n=8, block_k=64, num_warps=4)
DOT = small_m_linear.Launch(block_n=32, block_k=32, num_splits=1, num_warps=4, num_stages=3)
SPLIT_DOT = replace(DOT, num_splits=3)


@pytest.fixture(autouse=True)
def implementation() -> None:
    """Nothing here has an implementation in C to be tested besides."""


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch fills new memory with NaN, so that an element which is not written shows."""
    torch.use_deterministic_algorithms(True)
    try:
        assert bool(torch.empty(3).isnan().all())
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def example(
    num_tokens: int, out_features: int, in_features: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, a weight and a bias; the hidden states are columns of something wider."""
    torch.manual_seed(num_tokens + out_features)
    hidden = torch.randn(num_tokens, in_features + 16, device=DEVICE)[:, :in_features]
    weight = torch.randn(out_features, in_features, device=DEVICE) * 0.1
    return hidden.to(dtype), weight.to(dtype), torch.randn(out_features, device=DEVICE).to(dtype)


def counters(launch: small_m_linear.Launch, out_features: int) -> torch.Tensor:
    return torch.zeros(launch.num_arrivals(out_features), dtype=torch.int32, device=DEVICE)


def run(
    launch: gemv.Launch | small_m_linear.Launch,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    is_gated: bool = False,
) -> torch.Tensor:
    if isinstance(launch, gemv.Launch):
        with poisoned_memory():
            return gemv.gemv(hidden, weight, bias, launch, is_gated=is_gated)
    arrivals = counters(launch, weight.shape[0])
    with poisoned_memory():
        output = small_m_linear.small_m_linear(hidden, weight, bias, launch, arrivals, is_gated=is_gated)
    assert not bool(arrivals.any())
    return output


def relative_error(output: torch.Tensor, expected: torch.Tensor) -> float:
    assert output.shape == expected.shape
    return float((output.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("is_gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize(
    ("launch", "num_tokens", "out_features", "in_features"),
    [
        (GEMV, 1, 22, 70),
        (GEMV, 3, 16, 128),
        (GEMV, 4, 6, 5),
        (DOT, 1, 34, 70),
        (DOT, 17, 30, 64),
        (DOT, 63, 34, 33),
        (SPLIT_DOT, 3, 64, 96),
        (SPLIT_DOT, 63, 34, 40),
    ],
    ids=lambda value: {GEMV: "gemv", DOT: "dot", SPLIT_DOT: "split"}.get(value),
)
def test_equals_reference(
    launch: gemv.Launch | small_m_linear.Launch,
    num_tokens: int,
    out_features: int,
    in_features: int,
    is_gated: bool,
    dtype: torch.dtype,
) -> None:
    if dtype == torch.bfloat16 and not HAS_GPU and launch is not GEMV:
        pytest.skip("Triton's interpreter has no bfloat16 in matrix multiplications")
    hidden, weight, bias = example(num_tokens, SCALE * out_features, SCALE * in_features, dtype)
    for bias_or_none in (bias, None):
        output = run(launch, hidden, weight, bias_or_none, is_gated)
        assert output.dtype == dtype
        assert output.is_contiguous()
        expected = reference(hidden, weight, bias_or_none, is_gated=is_gated)
        assert relative_error(output, expected) < TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("is_gated", [False, True], ids=["one", "gated"])
@pytest.mark.parametrize("num_tokens", [1, 4, 16, 64])
def test_equals_reference_at_a_real_size(num_tokens: int, is_gated: bool) -> None:
    hidden, weight, bias = example(num_tokens, 4096, 14336, torch.bfloat16)
    expected = reference(hidden, weight, bias, is_gated=is_gated)
    dot = small_m_linear.Launch(64, 128, 4, 4, 4)
    launches = [dot, gemv.Launch(8, 1024, 4)] if num_tokens <= gemv.MAX_TOKENS else [dot]
    for launch in launches:
        outputs = [run(launch, hidden, weight, bias, is_gated) for _ in range(20)]
        assert relative_error(outputs[0], expected) < TOLERANCE[torch.bfloat16]
        assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_splits_add_up_in_their_order_whichever_ends_last() -> None:
    hidden, weight, bias = example(5, 48, 96, torch.float32)
    expected = run(SPLIT_DOT, hidden, weight, bias)
    # Large parts that cancel: another order would round the small ones differently.
    weight[:, :32] *= 1e4
    weight[:, 64:] = -weight[:, :32]
    hidden[:, 64:] = hidden[:, :32]
    outputs = [run(SPLIT_DOT, hidden, weight, bias) for _ in range(3 * SCALE)]
    parts = [hidden[:, k : k + 32] @ weight[:, k : k + 32].T for k in (0, 32, 64)]
    torch.testing.assert_close(outputs[0], parts[0] + parts[1] + parts[2] + bias, atol=2e-2, rtol=1e-3)
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    assert not torch.equal(outputs[0], expected)


@pytest.mark.parametrize("launch", [GEMV, DOT, SPLIT_DOT], ids=["gemv", "dot", "split"])
def test_rejects_what_does_not_fit(launch: gemv.Launch | small_m_linear.Launch) -> None:
    hidden, weight, bias = example(2, 15, 32, torch.float32)
    with pytest.raises(ValueError, match="rows"):
        run(launch, hidden[:0], weight, None)
    with pytest.raises(ValueError, match="rows"):
        run(launch, hidden.expand(65, 2, 32)[:, 0], weight, None)
    with pytest.raises(ValueError, match="does not fit hidden"):
        run(launch, hidden, weight[:, :31], None)
    with pytest.raises(ValueError, match="does not fit hidden"):
        run(launch, hidden, weight.half(), None)
    with pytest.raises(ValueError, match="do not make 15 rows"):
        run(launch, hidden, weight, None, is_gated=True)
    with pytest.raises(ValueError, match="bias"):
        run(launch, hidden, weight, bias[1:])
    with pytest.raises(ValueError, match="bias"):
        run(launch, hidden, weight, bias.half())


def test_splits_need_counters() -> None:
    hidden, weight, _ = example(2, 64, 96, torch.float32)
    with pytest.raises(ValueError, match="3 splits need 2 int32 counters"):
        small_m_linear.small_m_linear(hidden, weight, None, SPLIT_DOT)


def choices(out_features: int, in_features: int) -> list[Choice]:
    plain, gated = LinearShape(out_features, in_features), LinearShape(out_features, in_features, is_gated=True)
    return [
        Choice(plain, 1, GEMV, 1.0, 2.0),
        Choice(plain, 4, None, 2.0, 2.0),
        Choice(plain, 8, SPLIT_DOT, 2.5, 3.0),
        Choice(gated, 2, GEMV, 1.0, 3.0),
    ]


def test_a_number_of_tokens_takes_the_choice_of_the_next_that_was_measured() -> None:
    table = by_num_tokens(choices(48, 64))
    assert table[LinearShape(48, 64)] == (None, GEMV, None, None, None, SPLIT_DOT, SPLIT_DOT, SPLIT_DOT, SPLIT_DOT)
    assert table[LinearShape(48, 64, is_gated=True)] == (None, GEMV, GEMV)


def test_choices_survive_their_file(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    write_choices(path, choices(48, 64), [{"gpu": "a GPU"}])
    assert read_choices(path) == choices(48, 64)
    path.write_text('{"choices": [{"out_features": 1}]}')
    with pytest.raises(ValueError, match="not a table"):
        read_choices(path)


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 8, 9])
def test_a_layer_equals_reference_whatever_was_chosen(num_tokens: int) -> None:
    hidden, weight, bias = example(num_tokens, 48, 64, torch.float32)
    layer = GpuLinear(weight, bias, by_num_tokens(choices(48, 64)))
    assert layer.num_bytes == weight.nbytes + bias.nbytes
    assert relative_error(layer(hidden), reference(hidden, weight, bias)) < 1e-5
    expected = reference(hidden, weight, bias, is_gated=True)
    assert relative_error(linear_silu_and_mul(layer, hidden), expected) < 1e-5


def test_a_shape_far_from_all_that_were_measured_runs_on_torch() -> None:
    hidden, weight, bias = example(1, 40, 24, torch.float32)
    output = GpuLinear(weight, bias, by_num_tokens(choices(48, 64)))(hidden)
    assert torch.equal(output, torch.nn.functional.linear(hidden, weight, bias))
