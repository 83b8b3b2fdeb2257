import asyncio
import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from engine.server.fake_core import CRASH_TOKEN_ID, MAX_MODEL_LEN
from octavo_engine.async_engine import AsyncEngine, Chunk, FinishedSequence, Generation
from octavo_engine.config import EngineConfig
from octavo_engine.errors import EngineDeadError
from octavo_engine.protocol import SamplingParams

pytestmark = pytest.mark.usefixtures("_fake_cores_importable")


class Observer:
    def __init__(self) -> None:
        self.queue_times: list[float] = []
        self.first_tokens: list[float] = []
        self.num_next_tokens = 0
        self.finished: list[FinishedSequence] = []

    def observe_queue_time(self, seconds: float) -> None:
        self.queue_times.append(seconds)

    def observe_first_token(self, seconds: float) -> None:
        self.first_tokens.append(seconds)

    def observe_next_tokens(self, seconds: float, num_tokens: int) -> None:
        self.num_next_tokens += num_tokens

    def observe_finished(self, sequence: FinishedSequence) -> None:
        self.finished.append(sequence)


@asynccontextmanager
async def running_engine(core: str, observer: Observer | None = None, **config: object) -> AsyncIterator[AsyncEngine]:
    engine = AsyncEngine(
        EngineConfig(model="fake", **config), core=f"engine.server.fake_core:{core}", observer=observer
    )
    engine.start()
    try:
        yield engine
    finally:
        await engine.close()


async def collect(generation: Generation) -> dict[tuple[int, int], Chunk]:
    """Everything that each sequence gained."""
    whole: dict[tuple[int, int], Chunk] = {}
    with generation:
        async for chunks in generation:
            for chunk in chunks:
                key = (chunk.prompt_index, chunk.index)
                if key in whole:
                    whole[key].merge(chunk)
                else:
                    whole[key] = chunk
    return whole


async def until(condition: object) -> None:
    assert callable(condition)
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - what it waits for is a number that the engine sends
            await asyncio.sleep(0.01)


async def test_all_sequences_of_all_prompts_end() -> None:
    async with running_engine("EchoCore") as engine:
        ready = await engine.wait_ready()
        assert ready.max_model_len == MAX_MODEL_LEN
        whole = await collect(engine.generate([[1, 2, 3], [4]], SamplingParams(n=2, max_tokens=4)))
        assert {key: chunk.token_ids for key, chunk in whole.items()} == {
            (0, 0): [1, 2, 3, 1],
            (0, 1): [2, 3, 1, 2],
            (1, 0): [4, 4, 4, 4],
            (1, 1): [4, 4, 4, 4],
        }
        assert {chunk.finish_reason for chunk in whole.values()} == {"length"}
        assert engine.num_requests == 0


async def test_slow_consumer_gets_one_chunk_with_several_tokens() -> None:
    async with running_engine("EchoCore") as engine:
        await engine.wait_ready()
        with engine.generate([[7]], SamplingParams(max_tokens=50, logprobs=0)) as generation:
            await until(lambda: engine.num_requests == 0)
            chunks = [chunk async for chunk in generation]
        assert [len(chunk.token_ids) for (chunk,) in chunks] == [50]
        assert len(chunks[0][0].logprobs or []) == 50


async def test_leaving_a_generation_frees_its_blocks() -> None:
    async with running_engine("SlowCore") as engine:
        await engine.wait_ready()
        with engine.generate([[7] * 100], SamplingParams(n=2, max_tokens=1000)) as generation:
            await anext(generation)
            assert engine.stats.num_used_kv_blocks > 0
        assert engine.num_requests == 0
        await until(lambda: engine.stats.num_used_kv_blocks == 0 and engine.stats.num_running == 0)


async def test_stopped_sequence_gives_nothing_more_while_others_go_on() -> None:
    observer = Observer()
    async with running_engine("SlowCore", observer) as engine:
        await engine.wait_ready()
        generation = engine.generate([[1, 2]], SamplingParams(n=2, max_tokens=10))
        await anext(generation)
        generation.stop(0, 1)
        whole = await collect(generation)
        assert set(whole) == {(0, 0)}
        await until(lambda: engine.stats.num_running == 0)
    assert [sequence.finish_reason for sequence in observer.finished] == ["stop", "length"]


async def test_observer_sees_each_token_once() -> None:
    observer = Observer()
    async with running_engine("EchoCore", observer) as engine:
        await engine.wait_ready()
        await collect(engine.generate([[1, 2, 3]], SamplingParams(n=2, max_tokens=5)))
    assert len(observer.first_tokens) == 2
    assert observer.num_next_tokens == 8
    assert [(s.num_prompt_tokens, s.num_generation_tokens) for s in observer.finished] == [(3, 5), (3, 5)]
    assert all(0 <= sequence.decode_s <= sequence.e2e_s for sequence in observer.finished)


async def test_request_that_can_never_run_ends_with_its_error() -> None:
    async with running_engine("EchoCore") as engine:
        await engine.wait_ready()
        whole = await collect(engine.generate([[1] * MAX_MODEL_LEN], SamplingParams(n=2)))
        assert [chunk.error for chunk in whole.values()] == ["the prompt is too long"] * 2
        assert engine.num_requests == 0


async def test_death_of_the_process_ends_every_request_with_an_error() -> None:
    observer = Observer()
    async with running_engine("CrashingCore", observer) as engine:
        await engine.wait_ready()
        params = SamplingParams(max_tokens=1000)
        others = [asyncio.create_task(collect(engine.generate([[5]], params))) for _ in range(3)]
        await until(lambda: engine.stats.num_running == 3)
        crash = asyncio.create_task(collect(engine.generate([[CRASH_TOKEN_ID]], SamplingParams())))
        for task in (*others, crash):
            with pytest.raises(EngineDeadError, match="exit code 7"):
                await task
        assert engine.is_dead
        assert "exit code 7" in await engine.wait_dead()
        with pytest.raises(EngineDeadError):
            engine.generate([[5]], SamplingParams())
    assert [sequence.finish_reason for sequence in observer.finished] == ["error"] * 4


async def test_defect_in_a_step_is_told() -> None:
    async with running_engine("RaisingCore") as engine:
        await engine.wait_ready()
        with pytest.raises(EngineDeadError, match="RuntimeError: the step went wrong"):
            await collect(engine.generate([[5]], SamplingParams()))
        assert engine.failure is not None
        assert not engine.failure.is_user_error


async def test_user_error_at_start_up_is_told_as_such() -> None:
    async with running_engine("FailingCore") as engine:
        with pytest.raises(EngineDeadError, match="there is no model at fake"):
            await engine.wait_ready()
        assert engine.failure is not None
        assert engine.failure.is_user_error


async def test_close_ends_running_requests_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    async with running_engine("SlowCore") as engine:
        await engine.wait_ready()
        task = asyncio.create_task(collect(engine.generate([[5]], SamplingParams(max_tokens=1000))))
        await until(lambda: engine.stats.num_running == 1)
    with pytest.raises(EngineDeadError, match="closed"):
        await task
    assert os.listdir(tmp_path) == []


async def test_an_engine_that_hangs_is_stalled_though_its_clients_left() -> None:
    async with running_engine("HangingCore", stall_timeout_s=0.2) as engine:
        await engine.wait_ready()
        with engine.generate([[1]], SamplingParams(max_tokens=1)):
            pass
        assert engine.num_requests == 0
        with engine.generate([[1]], SamplingParams(max_tokens=1)):  # one that asks again is no sign of life
            await until(engine.is_stalled)
        assert engine.is_stalled()


async def test_an_engine_whose_clients_left_is_idle_soon() -> None:
    async with running_engine("SlowCore", stall_timeout_s=0.2) as engine:
        await engine.wait_ready()
        with engine.generate([[1, 2], [3]], SamplingParams(max_tokens=1000, n=2)) as generation:
            generation.stop(0, 1)
            await anext(generation)
        await asyncio.sleep(0.3)
        assert not engine.is_stalled()


async def test_stalled_when_work_waits_and_no_step_finishes() -> None:
    async with running_engine("HangingCore", stall_timeout_s=0.2) as engine:
        await engine.wait_ready()
        await asyncio.sleep(0.3)
        assert not engine.is_stalled()
        task = asyncio.create_task(collect(engine.generate([[5]], SamplingParams())))
        await asyncio.sleep(0)
        assert not engine.is_stalled()
        await until(engine.is_stalled)
    with pytest.raises(EngineDeadError):
        await task


async def test_start_up_tells_phase_and_estimate() -> None:
    seen = set()
    async with running_engine("LoadingCore") as engine:
        while engine.ready is None:
            seen.add(engine.phase.phase)
            if engine.phase.phase == "loading" and 0 < engine.phase.fraction < 1:
                remaining_s = engine.estimate_remaining_s()
                assert remaining_s is not None
                assert 0 <= remaining_s < 60
            await asyncio.sleep(0.02)
        assert engine.estimate_remaining_s() is None
        assert engine.ready_after_s is not None
        assert engine.ready_after_s >= 2
    assert "loading" in seen
