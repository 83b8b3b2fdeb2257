"""The same engine on every torch device: a tiny model, chunked, preempted and forked, against `transformers`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from octavo_engine.config import EngineConfig
from octavo_engine.core import EngineCore
from octavo_engine.protocol import AddRequest, SamplingParams
from octavo_engine.scheduler import check_invariants

pytestmark = pytest.mark.usefixtures("one_thread")

TIE = 1e-3
NUM_TOKENS = 24

DEVICES = [
    pytest.param("cpu", id="cpu"),
    pytest.param(
        "cuda",
        id="cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU")],
    ),
]


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
def test_forks_draw_for_themselves_and_repeat_by_seed(tiny_llama_dir, device: str) -> None:
    folder = tiny_llama_dir()
    config = EngineConfig(model=str(folder), device=device, dtype="float32", max_model_len=128, num_kv_blocks=64)
    core = EngineCore(config, lambda phase: None)
    prompt = [list(range(2, 21))]
    first = generate(core, prompt, n=4, temperature=1.5, seed=3, top_p=0.9)
    assert len({tuple(answer) for answer in first.values()}) == 4
    assert generate(core, prompt, n=4, temperature=1.5, seed=3, top_p=0.9) == first
