"""What is computed before anybody is answered."""

import pytest
from octavo_engine.request import Request
from octavo_engine.scheduler import Scheduler, SchedulerLimits
from octavo_engine.warm_up import WarmUp, warm_ups


def widest_step(warm_up: WarmUp, limits: SchedulerLimits) -> int:
    scheduler = Scheduler(limits)
    for number in range(warm_up.num_prompts):
        prompt = [0] * warm_up.num_tokens
        scheduler.add(Request(f"r{number}", 0, prompt, len(prompt), warm_up.params, 0, 0.0))
    return scheduler.schedule().num_tokens


@pytest.mark.parametrize(
    ("max_model_len", "budget"), [(256, 512), (2048, 8448), (9216, 8704), (8704, 8704), (131_072, 8192), (40, 13)]
)
def test_a_step_as_wide_as_any_is_among_it(max_model_len: int, budget: int) -> None:
    limits = SchedulerLimits(8300, 16, 64, budget, max_model_len)
    widest = max(widest_step(warm_up, limits) for warm_up in warm_ups(limits, is_gpu=True))
    assert 0.99 * budget <= widest <= budget


@pytest.mark.parametrize("is_gpu", [False, True])
def test_the_shortest_context_is_warmed_up_too(is_gpu: bool) -> None:
    limits = SchedulerLimits(16, 16, 4, 64, max_model_len=2)
    assert all(widest_step(warm_up, limits) for warm_up in warm_ups(limits, is_gpu=is_gpu))
