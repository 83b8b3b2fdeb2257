"""An 8-bit KV cache, in Triton's interpreter on a pretended H100: close to a wide one, with the checkpoint's scales."""

import os
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import triton.language as tl
import triton.runtime.interpreter as triton_interpreter
from octavo_engine.config import EngineConfig
from octavo_engine.core import EngineCore
from octavo_engine.device import Device
from octavo_engine.errors import CapacityError, UnsupportedModelError
from octavo_engine.protocol import AddRequest, SamplingParams
from octavo_engine.scheduler import check_invariants
from octavo_engine.start import start
from octavo_kernels.hardware import BY_NAME
from octavo_kernels.launch import interpret_on_cpu
from octavo_kernels.ops import paged_decode
from safetensors.torch import load_file, save_file

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="Triton's interpreter is off"),
    pytest.mark.usefixtures("one_thread", "pretended_h100", "rounding_interpreter"),
]

PROMPTS = [[2 + (7 * i + 3 * j) % 120 for j in range(9 + 5 * i)] for i in range(3)]
# Of log probabilities whose standard deviation is 1.6: e4m3 has 3 bits of mantissa.
TOLERANCE = 0.5


@pytest.fixture
def pretended_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(torch.device("cpu"), BY_NAME["h100"], 8 << 30)
    monkeypatch.setattr("octavo_engine.start.open_device", lambda config, seat: device)


@pytest.fixture
def rounding_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6's interpreter loses the carry where rounding to float8 reaches the next power of two."""
    convert = triton_interpreter._convert_float

    def convert_by_torch(values, input_dtype, output_dtype, rounding_mode):
        if (input_dtype, output_dtype) != (tl.float32, tl.float8e4nv):
            return convert(values, input_dtype, output_dtype, rounding_mode)
        rounded = torch.from_numpy(np.ascontiguousarray(values)).to(torch.float8_e4m3fn)
        return rounded.view(torch.uint8).numpy().reshape(values.shape)

    monkeypatch.setattr(triton_interpreter, "_convert_float", convert_by_torch)
    # Each program takes the interpreter a tenth of a second; how contexts are split is the kernels' own tests'.
    monkeypatch.setattr(paged_decode, "num_multiprocessors", lambda device: 1)


def make_core(folder: Path, kv_cache_dtype: str = "fp8", **fields) -> EngineCore:
    config = EngineConfig(
        model=str(folder), dtype="float32", kv_cache_dtype=kv_cache_dtype, max_model_len=40, block_size=8,
        **{"num_kv_blocks": 24, "max_num_batched_tokens": 16, "max_num_seqs": 3, **fields},
    )  # fmt: skip
    return EngineCore(config, lambda phase: None)


def generate(core: EngineCore, max_tokens: int = 3, **params) -> dict[tuple[str, int], list[int]]:
    answers: dict[tuple[str, int], list[int]] = {}
    sampling = SamplingParams(**{"max_tokens": max_tokens, "ignore_eos": True, "temperature": 0, **params})
    for i, prompt in enumerate(PROMPTS):
        core.add_request(AddRequest(f"r{i}", prompt, sampling, arrival_time_s=float(i)))
    while core.has_work:
        for output in core.step().outputs:
            answers.setdefault((output.request_id, output.index), []).extend(output.token_ids)
        check_invariants(core.scheduler)
    return answers


def prompt_logprobs(folder: Path, kv_cache_dtype: str = "fp8", *, by_triton: bool = True) -> torch.Tensor:
    """Of the tokens of the longest prompt, in chunks, from the second token on."""
    params = SamplingParams(max_tokens=1, ignore_eos=True, temperature=0, prompt_logprobs=0)
    logprobs: list[float] = []
    with interpret_on_cpu() if by_triton else nullcontext():
        core = make_core(folder, kv_cache_dtype, enable_cuda_graphs=False)
        core.add_request(AddRequest("r", PROMPTS[-1], params, arrival_time_s=0.0))
        while core.has_work:
            for output in core.step().outputs:
                logprobs += [each.logprob for each in output.prompt_logprobs or [] if each]
    assert len(logprobs) == len(PROMPTS[-1]) - 1
    return torch.tensor(logprobs)


@pytest.fixture
def folder(tiny_model_dir) -> Path:
    return tiny_model_dir("Llama", num_hidden_layers=2, shard_size="1GB")


def rewrite(folder: Path, factors: dict[str, float], **scales: float | list[float]) -> None:
    """Multiply projections of each layer, and give each layer scales, named with __ for dots."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name in list(tensors):
        for projection, factor in factors.items():
            if f".{projection}." in name:
                tensors[name] = tensors[name] * factor
    for layer in range(2):
        for name, scale in scales.items():
            tensors[f"model.layers.{layer}.self_attn.{name.replace('__', '.')}"] = torch.tensor(scale)
    save_file(tensors, file, metadata={"format": "pt"})


def test_logits_are_close_to_those_of_a_wide_cache(folder: Path) -> None:
    wide, narrow = (prompt_logprobs(folder, kind) for kind in ("float32", "fp8"))
    error = (wide - narrow).abs().max().item()
    assert 1e-3 < error < TOLERANCE, "exact would mean that the cache is not narrow"
    torch.testing.assert_close(narrow, prompt_logprobs(folder, by_triton=False), atol=1e-4, rtol=0)


@pytest.mark.parametrize("names", [("k_scale", "v_scale"), ("k_proj__k_scale", "v_proj__v_scale")])
def test_scales_of_the_checkpoint_keep_large_keys_and_values(folder: Path, names: tuple[str, str]) -> None:
    expected = prompt_logprobs(folder, "float32")
    # The same function of the tokens, with keys and values beyond what e4m3 holds, which is 448.
    large = {"k_proj": 4096.0, "q_proj": 1 / 4096, "v_proj": 4096.0, "o_proj": 1 / 4096}
    rewrite(folder, large)
    clipped = prompt_logprobs(folder)
    assert (clipped - expected).abs().max() > 2 * TOLERANCE
    rewrite(folder, {}, **dict.fromkeys(names, 4096.0))
    assert (prompt_logprobs(folder) - expected).abs().max() < TOLERANCE
    # A wide cache divides by nothing, so it must not multiply either.
    torch.testing.assert_close(prompt_logprobs(folder, "float32"), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("scale", [0.0, float("nan"), [1.0, 2.0]])
def test_a_scale_that_is_no_positive_number_is_refused(folder: Path, scale) -> None:
    rewrite(folder, {}, k_scale=scale)
    with pytest.raises(UnsupportedModelError, match=r"self_attn\.k_scale"):
        make_core(folder)


def test_prefix_hits_and_preemption_bring_the_same_tokens(folder: Path) -> None:
    with interpret_on_cpu():
        core = make_core(folder)
        expected = generate(core, max_tokens=9)
        assert generate(core, max_tokens=9) == expected
        assert core.scheduler.counters.num_prefix_cache_hits > 0
        small = make_core(folder, num_kv_blocks=5)
        assert generate(small, max_tokens=9) == expected
        assert small.scheduler.counters.num_preemptions > 0


def test_forks_copy_their_blocks(folder: Path) -> None:
    with interpret_on_cpu():
        alone = generate(make_core(folder))
        forked = generate(make_core(folder, max_num_seqs=6), n=2)
    assert forked == {(name, index): alone[name, 0] for name, _ in alone for index in (0, 1)}


def test_a_token_takes_one_byte_for_each_number(folder: Path) -> None:
    sizes = {kind: make_core(folder, kind).ready().memory["kv_cache"] for kind in ("fp8", "bfloat16", "float32")}
    assert all(size["predicted"] == size["actual"] for size in sizes.values())
    assert sizes["float32"]["actual"] == 2 * sizes["bfloat16"]["actual"] == 4 * sizes["fp8"]["actual"]


def test_hardware_without_float8_is_refused_before_the_model_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    config = EngineConfig(model="/nowhere", device="cpu", kv_cache_dtype="fp8")
    with pytest.raises(CapacityError, match=r"fp8 needs a GPU with 8-bit floats.*CPU has none"):
        start(config, lambda phase: None)
