"""A step as the model's tensors, and which steps with prompts are launched as a graph."""

import pytest
import torch
from octavo_engine.batch import prepare
from octavo_engine.mixed_graphs import hides_launches
from octavo_engine.protocol import SamplingParams
from octavo_engine.request import Request
from octavo_engine.scheduler import ScheduledRequest, Step

CPU = torch.device("cpu")


def step_of(*requests: tuple[list[int], int, int, bool]) -> Step:
    """Of each request: its tokens, the first one to compute, how many, and whether it samples."""
    scheduled = []
    for number, (token_ids, first_token, num_tokens, samples) in enumerate(requests):
        request = Request(f"r{number}", 0, token_ids, len(token_ids), SamplingParams(), 0, 0.0)
        request.block_ids = [10 * number + 1, 10 * number + 2]
        scheduled.append(ScheduledRequest(request, first_token, num_tokens, (request,) if samples else ()))
    return Step(scheduled, num_tokens=sum(each.num_tokens for each in scheduled))


MIXED = ([5, 6, 7], 2, 1, True), ([8, 9, 10, 11, 12, 13], 1, 5, True), ([14, 15, 16], 0, 2, False)


def test_a_step_is_laid_out_in_batch_order() -> None:
    batch = prepare(step_of(*MIXED), 4, CPU, None)
    assert batch.input_ids.tolist() == [7, 9, 10, 11, 12, 13, 14, 15]
    assert batch.positions.tolist() == [2, 1, 2, 3, 4, 5, 0, 1]
    metadata = batch.metadata
    assert metadata.query_start_loc.tolist() == [0, 1, 6, 8]
    assert metadata.seq_lens.tolist() == [3, 6, 2]
    assert metadata.block_tables.tolist() == [[1, 2], [11, 12], [21, 22]]
    assert metadata.slot_mapping.tolist() == [6, 45, 46, 47, 48, 49, 84, 85]
    assert (metadata.num_decodes, metadata.query_lens, metadata.context_lens) == (1, (1, 5, 2), (3, 6, 2))


@pytest.mark.parametrize(
    ("numbers", "rows"), [((), [0, 5]), ((1, 2, 4), [0, 5]), ((1, 4), [0, 5, 5, 5]), ((1,), [0, 5])]
)
def test_rows_of_logits_are_filled_up_by_repeating_the_last(numbers: tuple[int, ...], rows: list[int]) -> None:
    assert prepare(step_of(*MIXED), 4, CPU, None, numbers).sampled_rows.tolist() == rows


def test_a_step_that_samples_nothing_computes_no_logits() -> None:
    assert prepare(step_of(MIXED[2]), 4, CPU, None, (1, 2)).sampled_rows.tolist() == []


def test_a_device_at_work_hides_the_launches_of_steps_near_the_bound() -> None:
    hidden = [num_tokens for num_tokens in (512, 1536, 1537, 2048, 9000) if hides_launches(num_tokens, 2048)]
    assert hidden == [1537, 2048, 9000]
