"""Hopper's linear layers against float32 on such a GPU; without one, how they are cut, compiled and refused."""

from pathlib import Path

import pytest
import torch
from octavo_kernels import cuda_source
from octavo_kernels.cuda_source import CudaKernel, cached_cubin, compile_cubin
from octavo_kernels.linear_choice import Choice, LinearShape, read_choices, write_choices
from octavo_kernels.ops.gemv import reference
from octavo_kernels.ops.linear import GpuLinear, linear_silu_and_mul
from octavo_kernels.ops.wgmma_linear import (
    CAPABILITY,
    Launch,
    even_clusters,
    kernel_of,
    most_clusters,
    num_groups,
    wgmma_linear,
)
from octavo_kernels.tuning.linear_candidates import wgmma_launches

NUM_MULTIPROCESSORS = 132
# All shapes of clusters.
LAUNCHES = (
    Launch(256), Launch(64, cluster_n=2), Launch(80, cluster_k=2), Launch(128, cluster_n=2, cluster_k=2),
    Launch(96, 2), Launch(224, 2, 2), Launch(192, 2, cluster_k=2), Launch(256, 2, 2, 2),
)  # fmt: skip
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 4e-3}


@pytest.fixture
def hopper(device: torch.device) -> torch.device:
    """A GPU with its instructions; new memory holds NaN."""
    if torch.cuda.get_device_capability(device) != CAPABILITY:
        pytest.skip("only Hopper has these instructions")
    return device


def example(
    num_tokens: int, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, a weight and a bias; the hidden states are columns of something wider, the weight rows of it."""
    hidden = torch.randn(num_tokens, in_features + 24, device=device)[:, :in_features]
    weight = torch.randn(out_features + 8, in_features, device=device)[:out_features] * in_features**-0.5
    return hidden.to(dtype), weight.to(dtype), torch.randn(out_features, device=device).to(dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("launch", "is_gated"),
    [(launch, is_gated) for launch in LAUNCHES for is_gated in (False, True) if launch.cluster_k == 1 or not is_gated],
    ids=lambda value: {False: "plain", True: "gated"}[value] if isinstance(value, bool) else str(value),
)
@pytest.mark.parametrize(
    ("num_tokens", "out_features", "in_features"),
    [
        (1, 16, 8),
        (37, 144, 200),
        (128, 512, 64),
        (129, 2000, 576),
        (256, 4096, 1024),
        (300, 528, 264),
        (700, 6144, 2048),
    ],
)
def test_equals_reference(
    num_tokens: int, out_features: int, in_features: int, launch: Launch, is_gated: bool, dtype: torch.dtype,
    hopper: torch.device,
) -> None:  # fmt: skip
    hidden, weight, bias = example(num_tokens, out_features, in_features, dtype, hopper)
    for bias_or_none in (bias, None):
        output = wgmma_linear(hidden, weight, bias_or_none, launch, is_gated=is_gated)
        expected = reference(hidden, weight, bias_or_none, is_gated=is_gated)
        assert output.dtype == dtype
        assert output.is_contiguous()
        assert output.shape == expected.shape
        assert (output.float() - expected).norm() < TOLERANCE[dtype] * expected.norm()
        assert torch.equal(output, wgmma_linear(hidden, weight, bias_or_none, launch, is_gated=is_gated))


@pytest.mark.gpu
@pytest.mark.parametrize("launch", [Launch(128, 2), Launch(128, 2, 2, 2)], ids=str)
def test_waits_for_the_kernels_ahead_and_is_waited_for(launch: Launch, hopper: torch.device) -> None:
    """In a graph, layer after layer with nothing between them, as programmatic dependent launch has them overlap."""
    first, second = (example(200, 2048, 2048, torch.bfloat16, hopper)[1] for _ in range(2))
    hidden = torch.randn(200, 2048, dtype=torch.bfloat16, device=hopper)

    def layers() -> torch.Tensor:
        states = hidden
        for weight in (first, second) * 8:
            states = wgmma_linear(states, weight, None, launch)
        return states

    expected = layers()
    torch.use_deterministic_algorithms(False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = layers()
    for _ in range(50):
        output.fill_(float("nan"))
        graph.replay()
        assert torch.equal(output, expected)


@pytest.mark.gpu
def test_a_layer_runs_what_was_chosen(hopper: torch.device) -> None:
    hidden, weight, bias = example(100, 256, 128, torch.bfloat16, hopper)
    launches = (None,) * 65 + (Launch(64),) * 64
    layer = GpuLinear(
        weight.contiguous(), bias, {LinearShape(256, 128, is_gated=gated): launches for gated in (False, True)}
    )
    torch.testing.assert_close(layer(hidden).float(), reference(hidden, weight, bias), atol=0.05, rtol=0.02)
    gated = reference(hidden, weight, bias, is_gated=True)
    torch.testing.assert_close(linear_silu_and_mul(layer, hidden).float(), gated, atol=0.05, rtol=0.02)


def test_rejects_what_does_not_fit() -> None:
    launch = Launch(64)
    hidden, weight, bias = example(4, 32, 40, torch.bfloat16, torch.device("cpu"))
    with pytest.raises(ValueError, match="rows"):
        wgmma_linear(hidden[:0], weight, None, launch)
    with pytest.raises(ValueError, match="does not fit hidden"):
        wgmma_linear(hidden, weight.half(), None, launch)
    with pytest.raises(ValueError, match="bias"):
        wgmma_linear(hidden, weight, bias[1:], launch)
    with pytest.raises(ValueError, match="bfloat16 or float16"):
        wgmma_linear(hidden.float(), weight.float(), None, launch)
    with pytest.raises(ValueError, match="aligned"):
        wgmma_linear(hidden[:, 1:9], weight[:, 1:9].contiguous(), None, launch)
    with pytest.raises(ValueError, match="aligned"):
        wgmma_linear(hidden, weight[:28], None, launch)
    with pytest.raises(ValueError, match="aligned"):
        wgmma_linear(hidden, weight[:24], None, launch, is_gated=True)
    for wrong in (Launch(72), Launch(272, 2), Launch(64, 4), Launch(64, 2, 3), Launch(64, cluster_k=4), Launch(0)):
        with pytest.raises(ValueError, match="there is no kernel"):
            wgmma_linear(hidden, weight, None, wrong)
    with pytest.raises(ValueError, match="there is no gated kernel"):
        wgmma_linear(hidden, weight, None, Launch(64, cluster_k=2), is_gated=True)


def test_launches_with_the_tensors_device_current(
    monkeypatch: pytest.MonkeyPatch, entered_devices: list[torch.device]
) -> None:
    second = torch.device("cuda", 1)

    def function(kernel: CudaKernel, device: torch.device) -> None:
        assert entered_devices == [device] == [second]
        raise LookupError

    monkeypatch.setattr(cuda_source, "_function", function)
    kernel = kernel_of(Launch(64), torch.bfloat16, is_gated=False, has_bias=False)
    with pytest.raises(LookupError):
        cuda_source.launch(kernel, 1, (), second)


@pytest.mark.parametrize("block_n", range(16, 257, 16))
def test_the_pipeline_fits_into_shared_memory(block_n: int) -> None:
    launch = Launch(block_n, 2)
    assert 4 <= launch.num_stages <= 8
    assert launch.shared_bytes <= 227 << 10


@pytest.mark.parametrize("num_tokens", [65, 128, 256, 300, 512, 1024])
@pytest.mark.parametrize("out_features", [16, 4096, 6144, 28672, 128256])
@pytest.mark.parametrize("is_gated", [False, True], ids=["plain", "gated"])
def test_clusters_share_the_groups_evenly(num_tokens: int, out_features: int, is_gated: bool) -> None:
    launches = wgmma_launches(LinearShape(out_features, 4096, is_gated), num_tokens, NUM_MULTIPROCESSORS)
    assert launches
    for launch in launches:
        assert launch.cluster_m == (1 if num_tokens <= 128 else 2)
        assert launch.cluster_k == 1 or not is_gated
        groups = num_groups(num_tokens, out_features, launch)
        clusters = even_clusters(num_tokens, out_features, launch, NUM_MULTIPROCESSORS)
        if launch.cluster_k > 1:
            assert clusters == groups
            continue
        most = most_clusters(launch, NUM_MULTIPROCESSORS)
        assert clusters <= most
        # No more rounds than with all clusters, and with one cluster less there were.
        rounds = -(-groups // most)
        assert -(-groups // clusters) == rounds
        assert clusters == 1 or -(-groups // (clusters - 1)) > rounds


@pytest.mark.parametrize(("cluster", "most"), [((1, 1, 1), 132), ((2, 1, 1), 66), ((2, 2, 1), 32), ((2, 2, 2), 16)])
def test_large_clusters_leave_multiprocessors_idle(cluster: tuple[int, int, int], most: int) -> None:
    assert most_clusters(Launch(64, *cluster), NUM_MULTIPROCESSORS) == most


def test_candidates_fill_the_multiprocessors() -> None:
    def first(out_features: int, in_features: int, num_tokens: int, is_gated: bool = False) -> Launch:
        return wgmma_launches(LinearShape(out_features, in_features, is_gated), num_tokens, NUM_MULTIPROCESSORS)[0]

    assert first(28672, 4096, 256, is_gated=True) == Launch(224, 2, 2)  # 64 groups: two rounds of 32 clusters
    assert first(4096, 14336, 256) == Launch(128, 2, 2, 2)  # 16 groups: one round
    assert first(4096, 14336, 128) == Launch(64, 1, 2, 2)
    assert wgmma_launches(LinearShape(6144, 4096), 1025, NUM_MULTIPROCESSORS) == []


def test_a_table_keeps_launches(tmp_path: Path) -> None:
    choice = Choice(LinearShape(8, 16, is_gated=True), 256, Launch(224, 2, 2), 1.0, 2.0)
    write_choices(tmp_path / "gpu.json", [choice], [])
    assert read_choices(tmp_path / "gpu.json") == [choice]


def test_machine_code_is_kept_for_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_source, "kernel_folder", lambda: tmp_path / "not" / "yet")
    compiled: list[str] = []
    monkeypatch.setattr(cuda_source, "tell_of_compilation", lambda name, seconds: compiled.append(name))
    plain, gated = (kernel_of(Launch(64), torch.bfloat16, is_gated=each, has_bias=False) for each in (False, True))
    code = cached_cubin(plain, CAPABILITY)
    assert code == cached_cubin(plain, CAPABILITY)
    assert cached_cubin(gated, CAPABILITY) != code
    assert compiled == ["wgmma_linear n64 1x1x1 bfloat16", "wgmma_linear n64 1x1x1 bfloat16 gated"]
    assert len(list((tmp_path / "not" / "yet").iterdir())) == 2


def test_what_does_not_compile_says_why(tmp_path: Path) -> None:
    source = tmp_path / "broken.cu"
    source.write_text('extern "C" __global__ void broken() { nonsense(); }')
    kernel = cuda_source.CudaKernel("broken", source, "", 0, 32)
    with pytest.raises(RuntimeError, match=r'broken\.cu does not compile: .*"nonsense" is undefined'):
        compile_cubin(kernel, CAPABILITY)
