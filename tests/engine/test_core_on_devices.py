"""The same engine on every torch device: a tiny model, chunked, preempted and forked, against `transformers`."""

import itertools
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.devices import DEVICES
from engine.paged_runner import PagedRunner, load, random_prompts, reference_logits
from octavo_engine import runner
from octavo_engine.bench.models import find_model, model_address
from octavo_engine.config import EngineConfig
from octavo_engine.core import EngineCore
from octavo_engine.protocol import AddRequest, SamplingParams
from octavo_engine.scheduler import check_invariants
from octavo_kernels.kernel_cache import report_compilations
from octavo_kernels.launch import FLOAT8_VARIANTS, variant_of

pytestmark = pytest.mark.usefixtures("one_thread")

TIE = 1e-3
NUM_TOKENS = 24
# ||logits - those in float32|| / ||those in float32||: a few roundings of 2^-9 in each of three layers.
BFLOAT16_ERROR = 0.05


def generate(core: EngineCore, prompts: list[list[int]], n: int = 1, **params) -> dict[tuple[str, int], list[int]]:
    sampling = SamplingParams(n=n, max_tokens=NUM_TOKENS, ignore_eos=True, **params)
    for i, prompt in enumerate(prompts):
        core.add_request(AddRequest(f"r{i}", prompt, sampling, arrival_time_s=float(i)))
    answers: dict[tuple[str, int], list[int]] = {}
    while core.has_work:
        for output in core.step().outputs:
            answers.setdefault((output.request_id, output.index), []).extend(output.token_ids)
        check_invariants(core.scheduler)
    return answers


def worst_gap(folder: Path, device: str, prompt: list[int], generated: list[int]) -> float:
    """By how much the reference's logits, given the tokens before, prefer another token to the generated one."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + generated], device=device)).logits[0, len(prompt) - 1 : -1].cpu()
    chosen = logits.gather(1, torch.tensor(generated)[:, None])[:, 0]
    return float((logits.max(dim=-1).values - chosen).max())


# One model of each family, with what sets it apart.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": 9}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {}),
    "neox": ("GPTNeoX", {}),
    "falcon": ("Falcon", {}),
    "new falcon": ("Falcon", {"new_decoder_architecture": True, "num_attention_heads": 4, "num_kv_heads": 2}),
    "falcon with linear biases": (
        "Falcon",
        {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False, "num_attention_heads": 4},
    ),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("architecture", "fields"), FAMILIES.values(), ids=FAMILIES)
def test_greedy_tokens_equal_transformers(tiny_model_dir, architecture: str, fields, device: str) -> None:
    folder = tiny_model_dir(architecture, **fields)
    config = EngineConfig(
        model=str(folder), device=device, dtype="float32", max_model_len=128, num_kv_blocks=20, block_size=8,
        max_num_seqs=8, max_num_batched_tokens=23,
    )  # fmt: skip
    core = EngineCore(config, lambda phase: None)
    prompts = [[(7 * i + 3 * j) % 131 for j in range(5 + 6 * i)] for i in range(7)]
    answers = generate(core, prompts, temperature=0)
    assert core.scheduler.counters.num_preemptions > 0
    for i, prompt in enumerate(prompts):
        assert worst_gap(folder, device, prompt, answers[f"r{i}", 0]) < TIE
    assert generate(core, prompts, temperature=0) == answers, "from the prefix cache"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("architecture", "fields"), FAMILIES.values(), ids=FAMILIES)
def test_bfloat16_is_as_close_to_float32_as_transformers_is(
    tiny_model_dir, architecture: str, fields, device: str
) -> None:
    folder, place = tiny_model_dir(architecture, **fields), torch.device(device)
    prompts = random_prompts(131, [3, 20, 41])
    exact, rounded = (torch.cat(reference_logits(folder, prompts, dtype)) for dtype in (torch.float32, torch.bfloat16))
    model = load(folder, dtype=torch.bfloat16, device=place).model
    torch.manual_seed(0)
    runner = PagedRunner(model, prompts, block_size=8, dtype=torch.bfloat16, device=place)
    own = torch.cat(runner.run([11, 1, 1, 7]))
    error, error_of_transformers = (((logits - exact).norm() / exact.norm()).item() for logits in (own, rounded))
    print(
        f"{architecture} {fields} on {device}: error {error:.4f} of the norm, transformers {error_of_transformers:.4f}"
    )
    assert error < min(BFLOAT16_ERROR, 1.5 * error_of_transformers)


@pytest.mark.parametrize("device", DEVICES)
def test_forks_draw_for_themselves_and_repeat_by_seed(tiny_llama_dir, device: str) -> None:
    folder = tiny_llama_dir()
    config = EngineConfig(model=str(folder), device=device, dtype="float32", max_model_len=128, num_kv_blocks=64)
    core = EngineCore(config, lambda phase: None)
    prompt = [list(range(2, 21))]
    first = generate(core, prompt, n=4, temperature=1.5, seed=3, top_p=0.9)
    assert len({tuple(answer) for answer in first.values()}) == 4
    assert generate(core, prompt, n=4, temperature=1.5, seed=3, top_p=0.9) == first


@pytest.mark.parametrize("device", DEVICES)
def test_forks_copy_their_blocks_some_layers_at_a_time(
    tiny_llama_dir, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    config = EngineConfig(model=str(tiny_llama_dir()), device=device, max_model_len=64, num_kv_blocks=32)
    prompt = [list(range(2, 21))]
    answers = []
    for copied_bytes in (runner.COPIED_BYTES, 1):
        monkeypatch.setattr(runner, "COPIED_BYTES", copied_bytes)
        core = EngineCore(config, lambda phase: None)
        answers.append(generate(core, prompt, n=4, temperature=1.5, seed=3))
    assert answers[0] == answers[1]
    assert len(set(map(tuple, answers[0].values()))) == 4


def test_a_request_tells_how_long_it_was_queued(tiny_llama_dir) -> None:
    config = EngineConfig(model=str(tiny_llama_dir()), device="cpu", max_model_len=32, num_kv_blocks=8, max_num_seqs=2)
    core = EngineCore(config, lambda phase: None)
    start_s = time.monotonic()
    for name, arrival_s in (("first", start_s - 5), ("second", start_s)):
        params = SamplingParams(n=2, max_tokens=4, ignore_eos=True, temperature=0)
        core.add_request(AddRequest(name, [2, 3, 4], params, arrival_time_s=arrival_s))
    told: dict[str, list[float]] = {}
    first_ended_s = 0.0
    while core.has_work:
        for output in core.step().outputs:
            if output.queue_time_s is not None:
                told.setdefault(output.request_id, []).append(output.queue_time_s)
            if output.request_id == "first":
                first_ended_s = time.monotonic() - start_s
    (first,), (second,) = told["first"], told["second"]
    assert 5 <= first < 6
    assert first_ended_s <= second <= time.monotonic() - start_s, "it waits for both of the first one's sequences"


@pytest.mark.gpu
def test_constraints_on_a_gpu_choose_the_cpus_tokens(tiny_llama_dir) -> None:
    folder = tiny_llama_dir()
    prompts = [[(7 * i + 3 * j) % 131 for j in range(5 + 6 * i)] for i in range(5)]
    penalties = {"repetition_penalty": 1.7, "presence_penalty": 0.5, "frequency_penalty": 0.3}
    answers = []
    for device in ("cpu", "cuda"):
        config = EngineConfig(
            model=str(folder), device=device, dtype="float32", max_model_len=128, num_kv_blocks=20, block_size=8,
            max_num_seqs=8, max_num_batched_tokens=23,
        )  # fmt: skip
        core = EngineCore(config, lambda phase: None)
        answers.append(generate(core, prompts, n=2, temperature=0, min_tokens=3, logit_bias={5: 4.0}, **penalties))
        assert core.scheduler.counters.num_preemptions > 0
    assert answers[0] == answers[1]


@pytest.mark.gpu
def test_an_8_bit_cache_on_a_gpu_is_close_to_a_wide_one(tiny_llama_dir) -> None:
    if variant_of(torch.device("cuda")) not in FLOAT8_VARIANTS:
        pytest.skip("this GPU has no float8")
    folder = tiny_llama_dir()
    (prompt,) = random_prompts(131, [50])
    params = SamplingParams(max_tokens=9, temperature=0, ignore_eos=True, prompt_logprobs=0)
    found = []
    for kv_cache_dtype in ("auto", "fp8"):
        config = EngineConfig(
            model=str(folder), device="cuda", dtype="bfloat16", kv_cache_dtype=kv_cache_dtype, max_model_len=128,
            num_kv_blocks=64, max_num_batched_tokens=23,
        )  # fmt: skip
        core = EngineCore(config, lambda phase: None)
        core.add_request(AddRequest("r", prompt, params, arrival_time_s=0.0))
        outputs = [output for _ in range(30) if core.has_work for output in core.step().outputs]
        assert sum(len(output.token_ids) for output in outputs) == 9
        logprobs = [each.logprob for output in outputs for each in output.prompt_logprobs or [] if each]
        found.append(torch.tensor(logprobs))
    error = (found[0] - found[1]).abs().max().item()
    print(f"log probabilities over an 8-bit cache differ by up to {error:.3f} of {found[0].std():.2f}")
    assert 0 < error < 0.5


@pytest.mark.gpu
def test_nothing_is_compiled_while_requests_are_answered(tmp_path) -> None:
    """Requests that come one after the other or in swarms, with short and long prompts, greedy and drawn."""
    fields = {"load_format": "dummy", "max_model_len": 4096, "max_num_seqs": 96, "kernel_cache_dir": str(tmp_path)}
    with model_address(find_model("llama-1b")) as address:
        core = EngineCore(EngineConfig(model=address, device="cuda", **fields), lambda phase: None)
    compiled: list[str] = []
    report_compilations(lambda kernel, seconds: compiled.append(kernel))
    drawn = {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.1}
    for sampling, num_at_once, lengths in itertools.product(
        ({"temperature": 0}, drawn), (1, 3, 60), ((5,), (300, 1900))
    ):
        params = SamplingParams(max_tokens=8, ignore_eos=True, **sampling)
        waiting = [(number, length) for number in range(70 // len(lengths)) for length in lengths]
        while waiting or core.has_work:
            for number, length in waiting[:num_at_once]:
                prompt = [2 + (7 * number + j * j) % 30_000 for j in range(length)]
                core.add_request(AddRequest(f"{number}-{length}", prompt, params, time.monotonic()))
            waiting = waiting[num_at_once:]
            core.step()
    assert not compiled
