"""Weights on their way: how far they are, and what goes wrong on the way."""

import threading
import time

import pytest
import torch
from octavo_engine.loading.upload import PIECE_BYTES, Uploader

CPU = torch.device("cpu")


def test_progress_counts_bytes_and_the_last_word_says_all() -> None:
    memory, goes_on = torch.zeros(2), threading.Event()
    uploader = Uploader(CPU)
    uploader.submit(lambda uploader: uploader.copy(memory[:1], torch.ones(1)), "first", 30)
    uploader.submit(lambda _: goes_on.wait(20) and memory[1:].fill_(2), "second", 70)
    deadline = time.monotonic() + 20
    while uploader.progress == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert uploader.progress == pytest.approx(0.3)
    goes_on.set()
    said: list[tuple[float, str]] = []
    uploader.wait(lambda share, name: said.append((share, name)))
    assert [name for _, name in said] == ["first", "second"]
    assert (said[-1][0], uploader.progress, memory.tolist()) == (1.0, 1.0, [1.0, 2.0])


@pytest.mark.gpu
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_another_type_is_converted_before_it_reaches_the_gpu(stored: torch.dtype) -> None:
    values = torch.randn(3, PIECE_BYTES // torch.bfloat16.itemsize + 5).to(stored)
    memory = torch.full(values.shape, torch.nan, dtype=torch.bfloat16, device="cuda")
    taken = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    uploader = Uploader(memory.device)
    for row, part in zip(memory, values, strict=True):
        uploader.submit(lambda uploader, row=row, part=part: uploader.copy(row, part), "row", part.nbytes)
    uploader.wait(lambda share, name: None)
    torch.testing.assert_close(memory.cpu(), values.to(torch.bfloat16), rtol=0, atol=0)
    assert torch.cuda.max_memory_allocated() == taken


def test_nothing_to_do_is_done() -> None:
    uploader = Uploader(CPU)
    assert uploader.progress == 1.0
    uploader.wait(lambda share, name: pytest.fail("there was nothing to tell"))


@pytest.mark.parametrize("is_early", [True, False])
def test_what_goes_wrong_reaches_who_waits_and_ends_the_rest(is_early: bool) -> None:
    begun: list[int] = []

    def fail(_: Uploader) -> None:
        time.sleep(0 if is_early else 0.2)
        raise ValueError("no such file")

    uploader = Uploader(CPU)
    uploader.submit(fail, "broken", 1)
    for number in range(50):
        uploader.submit(lambda _, number=number: (time.sleep(0.05), begun.append(number)), "more", 1)
    time.sleep(0.1 if is_early else 0)
    with pytest.raises(ValueError, match="no such file"):
        uploader.wait(lambda share, name: None)
    assert len(begun) < 10


def test_whoever_gives_up_does_not_wait_for_all_weights() -> None:
    uploader = Uploader(CPU)
    for _ in range(100):
        uploader.submit(lambda _: time.sleep(0.5), "slow", 1)
    started_s = time.monotonic()
    with pytest.raises(KeyError), uploader:
        raise KeyError
    assert time.monotonic() - started_s < 20
