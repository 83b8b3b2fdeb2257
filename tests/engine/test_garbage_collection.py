"""What the engine leaves to Python's garbage collector, and what the collector then may do."""

import gc
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from engine.devices import DEVICES
from octavo_engine.config import EngineConfig
from octavo_engine.core import EngineCore
from octavo_engine.protocol import AbortRequests, AddRequest, SamplingParams

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def manual_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def serve(core: EngineCore, name: str, num_requests: int) -> None:
    """Requests of every kind: greedy and drawn, forked, refused, aborted, preempted, with log probabilities."""
    for number in range(num_requests):
        params = SamplingParams(
            n=1 + number % 3, max_tokens=12, ignore_eos=True, temperature=0.7 * (number % 2), repetition_penalty=1.1,
            logprobs=2 if number % 4 == 0 else None, prompt_logprobs=1 if number % 5 == 0 else None,
        )  # fmt: skip
        prompt = [2 + (7 * number + j) % 100 for j in range(5 + number % 30)]
        core.add_request(AddRequest(f"{name}-{number}", prompt, params, time.monotonic()))
        if number % 7 == 3:
            core.abort(AbortRequests([f"{name}-{number - 1}"]))
        core.step()
    core.add_request(AddRequest(f"{name}-long", [2] * 1000, SamplingParams(max_tokens=2), time.monotonic()))
    while core.has_work:
        core.step()


@pytest.mark.parametrize("device", DEVICES)
def test_requests_leave_no_cycles_behind(tiny_llama_dir, manual_collection: None, device: str) -> None:
    config = EngineConfig(
        model=str(tiny_llama_dir()), device=device, dtype="float32", max_model_len=64, num_kv_blocks=16, block_size=8,
        max_num_seqs=8, max_num_batched_tokens=32,
    )  # fmt: skip
    core = EngineCore(config, lambda phase: None)
    serve(core, "first", 10)
    gc.collect()
    serve(core, "second", 40)
    assert core.scheduler.counters.num_preemptions > 0
    assert gc.collect() == 0


def test_old_objects_are_spared_and_young_cycles_are_not() -> None:
    program = """
import gc, weakref
from octavo_engine.garbage_collection import spare_old_objects

spare_old_objects()
full_collections = gc.get_stats()[2]["collections"]
kept = [[[number]] for number in range(300_000)]
class Young: pass
young = Young()
young.itself = young
gone = weakref.ref(young)
del young
kept += [[[number]] for number in range(30_000)]
assert gc.get_stats()[2]["collections"] == full_collections
assert gone() is None
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
