"""The scheduler: no block is lost or owned twice, the budget holds, everyone finishes, nothing is forgotten."""

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from octavo_engine.errors import InvalidRequestError
from octavo_engine.protocol import SamplingParams
from octavo_engine.request import PROMISED, Request, RequestStatus
from octavo_engine.scheduler import Scheduler, SchedulerLimits, Step, check_invariants

BLOCK_SIZE = 4


def make_scheduler(
    num_blocks: int = 16,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 32,
    max_model_len: int = 64,
    enable_prefix_caching: bool = True,
) -> Scheduler:
    return Scheduler(
        SchedulerLimits(
            num_blocks, BLOCK_SIZE, max_num_seqs, max_num_batched_tokens, max_model_len, enable_prefix_caching
        )
    )


def make_request(name: str, prompt: list[int], n: int = 1, max_tokens: int = 8, arrival_time_s: float = 0.0) -> Request:
    params = SamplingParams(n=n, max_tokens=max_tokens)
    return Request(name, 0, list(prompt), len(prompt), params, 0, arrival_time_s, num_forks=n - 1)


def next_token(token_ids: list[int], index: int) -> int:
    """A stand-in for the model: the next token is a function of the tokens so far, so recomputation must repeat it."""
    return (sum(token_ids) * 31 + len(token_ids) + index) % 7


class Engine:
    """The engine's loop without a model. It writes a tag of each token's prefix into its slot, and reads it back.

    num_ahead: steps that are scheduled before the tokens of the one before them are known
    """

    def __init__(self, scheduler: Scheduler, num_ahead: int = 0, max_rounds: int = 1) -> None:
        self.scheduler = scheduler
        self.num_ahead, self.max_rounds = num_ahead, max_rounds
        self.under_way: deque[tuple[Step, list[list[int]]]] = deque()
        self.device_tokens: dict[tuple[str, int], list[int]] = {}  # a sequence's tokens, as the device knows them
        self.slots: dict[int, tuple[int, ...]] = {}  # slot -> the tokens up to and with the one whose KV is there
        self.finished: dict[tuple[str, int], list[int]] = {}

    def step(self) -> Step:
        scheduler = self.scheduler
        step = scheduler.schedule(self.max_rounds)
        check_invariants(scheduler)
        assert step.num_tokens == sum(each.num_tokens for each in step.scheduled)
        assert step.num_tokens <= scheduler.limits.max_num_batched_tokens
        assert len(scheduler.running) <= scheduler.limits.max_num_seqs
        assert len({id(each.request) for each in step.scheduled}) == len(step.scheduled)
        if step.scheduled:
            self._copy_blocks(step)
            self.under_way.append((step, self._compute(step)))
            scheduler.launch(step)
        if len(self.under_way) > self.num_ahead or not step.scheduled:
            self._complete(*self.under_way.popleft())
        check_invariants(scheduler)
        return step

    def _complete(self, step: Step, generated: list[list[int]]) -> None:
        self.scheduler.complete(step)
        for request, token_ids in zip(step.sampled, generated, strict=True):
            if request.status is RequestStatus.FINISHED:
                continue
            self.scheduler.deliver(request, token_ids)
            assert PROMISED not in request.token_ids[: request.num_known_tokens]
            if request.num_known_tokens - request.num_prompt_tokens == request.params.max_tokens:
                self.finished[request.request_id, request.index] = request.token_ids
                self.scheduler.finish(request)

    def _copy_blocks(self, step: Step) -> None:
        before = dict(self.slots)
        for source, destination in step.block_copies:
            for offset in range(BLOCK_SIZE):
                if source * BLOCK_SIZE + offset in before:
                    self.slots[destination * BLOCK_SIZE + offset] = before[source * BLOCK_SIZE + offset]

    def _compute(self, step: Step) -> list[list[int]]:
        """Write, read back and sample, as the device does: the values of promised tokens are its own."""
        generated: list[list[int]] = [[] for _ in step.sampled]
        for each in step.scheduled:
            self._tokens_of(each.request, each.request)
            for fork in each.sampled[1:]:
                self._tokens_of(fork, each.request)
        for round_index in range(step.num_rounds):
            written: set[int] = set()
            for each in step.scheduled:
                first = each.first_token + round_index
                tokens = self.device_tokens[_name(each.request)]
                for position in range(first, first + each.num_tokens):
                    slot = self._slot(each.request, position)
                    assert slot not in written, "two requests write one slot"
                    written.add(slot)
                    self.slots[slot] = tuple(tokens[: position + 1])
            for each in step.scheduled:
                tokens = self.device_tokens[_name(each.request)]
                for position in range(each.first_token + round_index + each.num_tokens):
                    assert self.slots[self._slot(each.request, position)] == tuple(tokens[: position + 1]), (
                        "a request reads another's KV"
                    )
            for request, token_ids in zip(step.sampled, generated, strict=True):
                tokens = self.device_tokens[_name(request)]
                token_ids.append(next_token(tokens, request.index))
                tokens.append(token_ids[-1])
        return generated

    def _tokens_of(self, request: Request, source: Request) -> list[int]:
        """The device's copy of a sequence's tokens: what the host knows, and what was generated since."""
        known = self.device_tokens.get(_name(source), source.token_ids)
        tokens = self.device_tokens.setdefault(_name(request), list(known))
        assert len(tokens) == request.num_tokens
        return tokens

    def _slot(self, request: Request, position: int) -> int:
        return request.block_ids[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE

    def run(self, max_steps: int = 2000) -> None:
        for _ in range(max_steps):
            if not self.scheduler.has_work and not self.under_way:
                return
            was_idle = not self.under_way
            assert self.step().scheduled or not was_idle, "there is work, but the step is empty"
        raise AssertionError("the scheduler does not come to an end")


def _name(request: Request) -> tuple[str, int]:
    return request.request_id, request.index


def expected_tokens(prompt: list[int], index: int, max_tokens: int) -> list[int]:
    token_ids = list(prompt)
    for _ in range(max_tokens):
        token_ids.append(next_token(token_ids, index))
    return token_ids


requests = st.lists(
    st.tuples(
        st.lists(st.integers(0, 1), min_size=1, max_size=40),  # two token values make equal prefixes likely
        st.integers(1, 3),
        st.integers(1, 20),
    ),
    min_size=1,
    max_size=12,
)


@pytest.mark.parametrize(("num_ahead", "max_rounds"), [(0, 1), (1, 1), (1, 4), (2, 3)])
@given(requests, st.integers(16, 40), st.integers(8, 40), st.booleans(), st.data())
@settings(max_examples=100, deadline=None)
def test_every_request_ends_with_the_tokens_it_has_alone(
    num_ahead, max_rounds, specs, num_blocks, budget, caching, data
) -> None:
    engine = Engine(
        make_scheduler(num_blocks, max_num_batched_tokens=budget, max_model_len=64, enable_prefix_caching=caching),
        num_ahead, max_rounds,
    )  # fmt: skip
    expected = {}
    for i, (prompt, n, max_tokens) in enumerate(specs):
        engine.scheduler.add(make_request(f"r{i:02}", prompt, n, max_tokens, arrival_time_s=i))
        expected |= {(f"r{i:02}", index): expected_tokens(prompt, index, max_tokens) for index in range(n)}
        for _ in range(data.draw(st.integers(0, 3))):
            if engine.scheduler.has_work or engine.under_way:
                engine.step()
    engine.run()
    assert engine.finished == expected
    assert engine.scheduler.pool.num_used == 0


@pytest.mark.parametrize(("num_ahead", "max_rounds"), [(0, 1), (1, 3)])
@given(requests, st.data())
@settings(max_examples=60, deadline=None)
def test_aborts_at_any_moment_lose_no_block(num_ahead, max_rounds, specs, data) -> None:
    engine = Engine(make_scheduler(num_blocks=16), num_ahead, max_rounds)
    for i, (prompt, n, max_tokens) in enumerate(specs):
        engine.scheduler.add(make_request(f"r{i:02}", prompt, n, max_tokens, arrival_time_s=i))
    for _ in range(20):
        if engine.scheduler.has_work or engine.under_way:
            engine.step()
        live = [*engine.scheduler.running, *engine.scheduler.waiting]
        if live and data.draw(st.booleans()):
            engine.scheduler.finish(data.draw(st.sampled_from(live)))
            check_invariants(engine.scheduler)
    engine.run()
    assert engine.scheduler.pool.num_used == 0


def test_preempts_the_newest_request_when_the_pool_is_full() -> None:
    scheduler = make_scheduler(num_blocks=8, max_model_len=32)
    engine = Engine(scheduler)
    old, new = (
        make_request("old", [1] * 8, max_tokens=20),
        make_request("new", [2] * 8, max_tokens=20, arrival_time_s=1),
    )
    scheduler.add(old)
    scheduler.add(new)
    assert engine.step().admitted == [old, new]
    while not scheduler.counters.num_preemptions:
        assert engine.step().admitted == []
    assert scheduler.running == [old]
    assert list(scheduler.waiting) == [new]
    engine.run()
    assert engine.finished["new", 0] == expected_tokens([2] * 8, 0, 20)


def test_a_shared_prefix_is_computed_once() -> None:
    scheduler = make_scheduler()
    engine = Engine(scheduler)
    prefix = list(range(20))
    scheduler.add(make_request("a", [*prefix, 100]))
    engine.run()
    scheduler.add(make_request("b", [*prefix, 200]))
    step = engine.step()
    assert step.num_tokens == 1
    assert scheduler.counters.num_prefix_cache_hits == 20


@pytest.mark.parametrize("n", [1, 2])
def test_equal_prompts_at_once_end_up_in_one_copy(n: int) -> None:
    scheduler = make_scheduler(num_blocks=32)
    engine = Engine(scheduler, num_ahead=1)
    for name in ("a", "b"):
        scheduler.add(make_request(name, [1] * 13, n=n))
    engine.step()
    assert {each.num_tokens for each in engine.under_way[0][0].scheduled} == {13}, "both are computed"
    engine.step()
    assert len({tuple(each.block_ids[:3]) for each in scheduler.running}) == 1
    engine.run()
    assert len(engine.finished) == 2 * n


def test_the_oldest_request_has_all_that_is_cached() -> None:
    """Also what another one with an equal prompt left behind."""
    scheduler = make_scheduler(num_blocks=16)
    engine = Engine(scheduler)
    gone, oldest = make_request("gone", [1] * 16, max_tokens=20), make_request("oldest", [1] * 16, max_tokens=46)
    scheduler.add(gone)
    scheduler.add(oldest)
    engine.step()
    engine.step()
    scheduler.finish(gone)
    engine.run()
    assert scheduler.counters.num_preemptions == 0
    assert engine.finished["oldest", 0] == expected_tokens([1] * 16, 0, 46)


def test_who_was_refused_is_looked_at_again_when_blocks_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = make_scheduler(num_blocks=16)
    engine = Engine(scheduler)
    matched: list[int] = []
    match = scheduler.prefix_cache.match
    monkeypatch.setattr(scheduler.prefix_cache, "match", lambda tokens: matched.append(len(tokens)) or match(tokens))
    scheduler.add(make_request("old", [1] * 24, max_tokens=12))
    scheduler.add(make_request("new", [2] * 40, max_tokens=2, arrival_time_s=1))
    for _ in range(8):
        assert len(scheduler.running) <= 1
        engine.step()
    assert matched == [24, 40], "once each"
    engine.run()
    assert matched == [24, 40, 40]
    assert len(engine.finished) == 2


def test_forks_share_the_prompt_and_copy_only_the_block_they_write() -> None:
    scheduler = make_scheduler()
    engine = Engine(scheduler)
    scheduler.add(make_request("a", [1] * 10, n=3))
    engine.step()
    assert len(scheduler.running) == 3
    assert scheduler.pool.num_used == 3  # 10 tokens in blocks of 4, shared by all
    step = engine.step()
    assert len(step.block_copies) == 2  # the last one to write keeps the original
    assert scheduler.pool.num_used == 2 + 3


def test_a_long_prompt_does_not_stop_running_requests() -> None:
    scheduler = make_scheduler(num_blocks=32, max_num_batched_tokens=9)
    engine = Engine(scheduler)
    scheduler.add(make_request("short", [1], max_tokens=20))
    engine.step()
    scheduler.add(make_request("long", list(range(60)), max_tokens=2, arrival_time_s=1))
    for _ in range(7):
        step = engine.step()
        assert [each.request.request_id for each in step.scheduled] == ["short", "long"]
        assert step.num_tokens <= 9


@pytest.mark.parametrize(
    ("first", "second", "scheduled"),
    [
        pytest.param(36, 10, [36], id="four of forty tokens are no beginning"),
        pytest.param(36, 4, [36, 4], id="a short prompt fits"),
        pytest.param(34, 10, [34, 6], id="six of forty tokens are one"),
    ],
)
def test_a_prompt_is_not_begun_with_a_sliver_of_the_budget(first: int, second: int, scheduled: list[int]) -> None:
    engine = Engine(make_scheduler(num_blocks=32, max_num_batched_tokens=40))
    for i, length in enumerate((first, second)):
        engine.scheduler.add(make_request(f"r{i}", [i] * length, max_tokens=2, arrival_time_s=i))
    assert [each.num_tokens for each in engine.step().scheduled] == scheduled
    engine.run()
    assert len(engine.finished) == 2


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        pytest.param(make_request("r", [1] * 64), "prompt", id="no room for an answer"),
        pytest.param(make_request("r", [1], n=9), "n", id="more sequences than may run"),
    ],
)
def test_refuses_what_could_never_run(request_: Request, param: str) -> None:
    with pytest.raises(InvalidRequestError) as error:
        make_scheduler().add(request_)
    assert error.value.param == param


def test_cached_blocks_are_evicted_least_recently_used_first() -> None:
    scheduler = make_scheduler(num_blocks=16)
    engine = Engine(scheduler)
    for i in range(3):
        scheduler.add(make_request(f"r{i}", [i] * 16, max_tokens=1, arrival_time_s=i))
        engine.run()
    scheduler.add(make_request("again", [0] * 17, max_tokens=1, arrival_time_s=4))
    engine.run()
    scheduler.add(make_request("large", [9] * 24, max_tokens=1, arrival_time_s=5))
    engine.run()
    assert len(scheduler.prefix_cache.match([0] * 17)) == 4, "used last, so still there"
    assert len(scheduler.prefix_cache.match([1] * 17)) < 4, "used first, so evicted first"
