"""The scheduler: which requests get how many tokens of the next step, and which blocks hold their KV.

One token budget and no phases: each request's computed tokens catch up with its known ones. Running requests go first,
oldest first: those that need one token (decodes) always get it, prompts share what is left of the budget; then waiting
ones are admitted. When blocks run out, cached ones are evicted; when that is not enough, the newest running request is
preempted and later recomputed. The oldest request is therefore always served, and since one request fits the pool alone
(checked at admission), the engine cannot deadlock.

Steps may be scheduled ahead: once a step is launched, its tokens are promised, and the next one is scheduled as if they
were there. What depends on their values (stop tokens, the prefix cache, a restart after preemption) waits for them.
Blocks of a sequence that ends meanwhile are free at once, since the device works off its steps in order.

Torch-free; it knows nothing of tensors or of what a token means.
"""

from bisect import insort
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Final

from octavo_engine.block_pool import BlockPool
from octavo_engine.errors import InvalidRequestError
from octavo_engine.prefix_cache import NO_BLOCK, Node, PrefixCache
from octavo_engine.request import Request, RequestStatus

# A step may end this part of its budget short, rather than cut a prompt.
SLIVERS: Final = 8


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """What the capacity plan allows. `max_model_len` tokens fit into `num_blocks` blocks."""

    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    enable_prefix_caching: bool = True


@dataclass(slots=True)
class ScheduledRequest:
    """`num_tokens` tokens of a request, from `first_token` on. `sampled`: who samples from the last token's logits.

    Nothing changes it; but to make a frozen one takes four times as long, and one is made for every token.
    """

    request: Request
    first_token: int
    num_tokens: int
    sampled: tuple[Request, ...]


@dataclass
class Step:
    """One step of the engine: the requests in batch order (decodes first) and the blocks to copy before it.

    num_rounds: how many tokens each sequence gets, one after the other without asking the scheduler again; more than
                one only where every request is a decode
    """

    scheduled: list[ScheduledRequest] = field(default_factory=list)
    block_copies: list[tuple[int, int]] = field(default_factory=list)  # (source, destination)
    admitted: list[Request] = field(default_factory=list)  # those that leave the queue with it
    num_tokens: int = 0
    num_rounds: int = 1

    @cached_property
    def is_decode(self) -> bool:
        """Whether every request computes one token and samples the next."""
        return self.num_tokens == len(self.scheduled) and all(len(each.sampled) == 1 for each in self.scheduled)

    @cached_property
    def sampled(self) -> list[Request]:
        """The sequences that get a token from this step, in batch order."""
        return list(chain.from_iterable(each.sampled for each in self.scheduled))


@dataclass(slots=True)
class SchedulerCounters:
    """Totals since the start."""

    num_preemptions: int = 0
    num_prompt_tokens: int = 0
    num_generation_tokens: int = 0
    num_prefix_cache_queries: int = 0
    num_prefix_cache_hits: int = 0


class Scheduler:
    """Holds every live request and all bookkeeping of blocks."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self.limits = limits
        self.pool = BlockPool(limits.num_blocks)
        self.prefix_cache = PrefixCache(self.pool, limits.block_size, is_enabled=limits.enable_prefix_caching)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # oldest first
        self.counters = SchedulerCounters()
        self._free_slots = list(reversed(range(limits.max_num_seqs)))
        self._refused: Request | None = None  # the first that waits, for which there were too few blocks
        self._slack_when_refused = 0

    @property
    def has_work(self) -> bool:
        """Whether a step would do something."""
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises InvalidRequestError if it could never run: its prompt leaves no room for an answer, or it asks for more
        sequences than may run at once.
        """
        if request.num_prompt_tokens >= self.limits.max_model_len:
            raise InvalidRequestError(
                f"the prompt has {request.num_prompt_tokens} tokens; with at least one token of answer it exceeds "
                f"the context of {self.limits.max_model_len} tokens",
                param="prompt",
                code="context_length_exceeded",
            )
        if request.num_forks >= self.limits.max_num_seqs:
            raise InvalidRequestError(
                f"n={request.num_forks + 1} exceeds the {self.limits.max_num_seqs} sequences that run at once",
                param="n",
            )
        request.max_num_tokens = min(request.num_prompt_tokens + request.params.max_tokens, self.limits.max_model_len)
        self.waiting.append(request)

    def find(self, request_id: str) -> Iterator[Request]:
        """The live sequences of a client's request."""
        return (each for each in chain(self.running, self.waiting) if each.request_id == request_id)

    def schedule(self, max_rounds: int = 1) -> Step:
        """Choose the next step and allocate its blocks. An empty step means that nothing can be computed now.

        max_rounds: tokens that each sequence may get if all are decodes that run already
        """
        step = Step()
        candidates = [request for request in self.running if len(request.token_ids) < request.max_num_tokens]
        num_decodes = sum(len(request.token_ids) - request.num_computed_tokens == 1 for request in candidates)
        chunk_budget = self.limits.max_num_batched_tokens - num_decodes
        for request in candidates:
            if request.status is not RequestStatus.RUNNING:
                continue  # preempted for an older one
            if len(request.token_ids) - request.num_computed_tokens == 1:
                if self._has_room_for_one(request) or self._make_room_by_preemption(request, 1, step):
                    self._put_into(step, request, 1)
                continue
            num_tokens = min(request.num_uncomputed_tokens, chunk_budget)
            if num_tokens and self._make_room_by_preemption(request, num_tokens, step):
                self._put_into(step, request, num_tokens)
                chunk_budget -= num_tokens
        self._admit_waiting(step)
        if step.num_tokens > len(step.scheduled):
            step.scheduled.sort(key=lambda each: each.num_tokens > 1)  # stable: decodes first, else in order
        # A newcomer may be a decode, too, if all but its last token is cached; the caller did not know of it.
        if max_rounds > 1 and not step.admitted and step.scheduled and step.is_decode:
            self._add_rounds(step, max_rounds)
        return step

    def launch(self, step: Step) -> None:
        """Book a step as under way: its tokens are promised."""
        for request in step.sampled:
            request.promise(step.num_rounds)

    def complete(self, step: Step) -> None:
        """Book a step as computed: its KV is valid, and full blocks of known tokens can be shared."""
        for each in step.scheduled:
            request = each.request
            if each.first_token < request.num_prompt_tokens:
                self.counters.num_prompt_tokens += min(each.num_tokens, request.num_prompt_tokens - each.first_token)
            for sequence in each.sampled or (request,):
                if sequence.status is RequestStatus.RUNNING:
                    self._publish(sequence)

    def deliver(self, request: Request, token_ids: Sequence[int]) -> None:
        """Give a sequence the values of its oldest promised tokens."""
        request.keep_promise(token_ids)
        self.counters.num_generation_tokens += len(token_ids)

    def finish(self, request: Request) -> None:
        """End a sequence and release its blocks; what the prefix cache knows of stays until it is evicted."""
        if request.status is RequestStatus.RUNNING:
            self.running.remove(request)
        elif request.status is RequestStatus.WAITING:
            self.waiting.remove(request)
        self._release_blocks(request)
        request.status = RequestStatus.FINISHED

    def _make_room_by_preemption(self, request: Request, num_tokens: int, step: Step) -> bool:
        """Make room, preempting the newest running requests; False if the request had to go itself.

        Running requests are visited oldest first, so whoever is preempted has no part in this step yet.
        """
        while not self._make_room(request, num_tokens, step):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _admit_waiting(self, step: Step) -> None:
        """Start waiting requests, oldest first, up to the first that does not fit: none is overtaken for ever."""
        num_sequences = sum(1 + request.num_forks for request in self.running)  # with those that prompts will fork into
        while self.waiting and step.num_tokens < self.limits.max_num_batched_tokens:
            request = self.waiting[0]
            num_sequences += 1 + request.num_forks
            if num_sequences > self.limits.max_num_seqs:
                return
            if request.num_promised:  # preempted while a step was under way: its tokens must be known first
                return
            if request is self._refused and self._slack <= self._slack_when_refused:  # to match it anew takes time
                return
            if not self._admit(request, step):
                return

    def _add_rounds(self, step: Step, max_rounds: int) -> None:
        """Let a step of decodes bring several tokens, if nobody gets too many and the blocks are there."""
        requests = [each.request for each in step.scheduled]
        max_tokens = min(request.max_num_tokens - len(request.token_ids) for request in requests)
        num_rounds = min(max_rounds, max_tokens)
        num_more, size = num_rounds - 1, self.limits.block_size
        num_new = [
            -(-(request.num_computed_tokens + num_more) // size) - len(request.block_ids) for request in requests
        ]
        if num_more <= 0 or not self._free_up(sum(num_new)):
            return
        for request, num_blocks in zip(requests, num_new, strict=True):
            if num_blocks:
                request.block_ids += self.pool.allocate(num_blocks)
            request.num_computed_tokens += num_more
        step.num_rounds = num_rounds

    def _admit(self, request: Request, step: Step) -> bool:
        """Move the first waiting request into the step, if blocks for all its known tokens can be had.

        A block in hand for each running request keeps a newcomer from being preempted at once.
        """
        nodes = [] if request.wants_prompt_logprobs else self.prefix_cache.match(request.token_ids)
        prefix = [node.block_id for node in nodes]
        self.pool.share(prefix)
        num_missing = self._num_blocks_for(request.num_tokens + 1) - len(prefix)
        num_uncomputed = request.num_tokens - len(prefix) * self.limits.block_size
        is_sliver = self._is_sliver(num_uncomputed, step)
        if is_sliver or not self._free_up(num_missing + len(self.running)):
            self.pool.release(reversed(prefix))
            if not is_sliver:
                self._refused, self._slack_when_refused = request, self._slack
            return False
        self._refused = None
        self.waiting.popleft()
        self._start(request, nodes)
        step.admitted.append(request)
        num_tokens = min(request.num_uncomputed_tokens, self.limits.max_num_batched_tokens - step.num_tokens)
        has_room = self._make_room(request, num_tokens, step)
        assert has_room, "admission counted the blocks"
        self._put_into(step, request, num_tokens)
        return True

    @property
    def _slack(self) -> int:
        """Blocks that a newcomer could get, those that running requests have in hand left out."""
        return self.pool.num_free + self.pool.num_cached - len(self.running)

    def _is_sliver(self, num_uncomputed: int, step: Step) -> bool:
        """Whether so little is left of a step that has prompts that the next one might as well begin this prompt.

        A prompt in one piece is attended to faster than a piece behind another.
        """
        num_left = self.limits.max_num_batched_tokens - step.num_tokens
        has_prompts = step.num_tokens > len(step.scheduled)
        return has_prompts and num_left < num_uncomputed and num_left * SLIVERS <= self.limits.max_num_batched_tokens

    def _start(self, request: Request, nodes: Sequence[Node]) -> None:
        request.status = RequestStatus.RUNNING
        request.block_ids = [node.block_id for node in nodes]
        request.num_computed_tokens = len(nodes) * self.limits.block_size
        request.num_published = len(nodes)
        request.cache_node = nodes[-1] if nodes else self.prefix_cache.root
        if request.num_output_tokens == 0:
            request.num_cached_tokens = request.num_computed_tokens
            self.counters.num_prefix_cache_queries += request.num_prompt_tokens
            self.counters.num_prefix_cache_hits += request.num_computed_tokens
        request.slot = self._free_slots.pop()
        insort(self.running, request, key=_age)

    def _free_up(self, num_blocks: int) -> bool:
        """Evict cached blocks until `num_blocks` are free; False, and nothing evicted, if there are too few."""
        num_missing = num_blocks - self.pool.num_free
        if num_missing > self.pool.num_cached:
            return False
        return num_missing <= 0 or self.prefix_cache.evict(num_missing) == num_missing

    def _has_room_for_one(self, request: Request) -> bool:
        """Whether a token surely has its place: the answer for nearly all, at a fraction of what `_make_room` takes."""
        return request.num_computed_tokens % self.limits.block_size != 0 and not request.may_share_tail

    def _make_room(self, request: Request, num_tokens: int, step: Step) -> bool:
        """Give the request blocks for its next `num_tokens` tokens; a shared block that it will write is copied."""
        num_new = self._num_blocks_for(request.num_computed_tokens + num_tokens) - len(request.block_ids)
        tail = request.num_computed_tokens // self.limits.block_size
        must_copy = tail < len(request.block_ids) and self.pool.num_references(request.block_ids[tail]) > 1
        if not self._free_up(num_new + must_copy):
            return False
        if must_copy:
            shared, (private,) = request.block_ids[tail], self.pool.allocate(1)
            step.block_copies.append((shared, private))
            self.pool.release([shared])
            request.block_ids[tail] = private
            request.num_table_blocks = min(request.num_table_blocks, tail)
        request.may_share_tail = False
        request.block_ids += self.pool.allocate(num_new)
        return True

    def _put_into(self, step: Step, request: Request, num_tokens: int) -> None:
        first_token = request.num_computed_tokens
        request.num_computed_tokens += num_tokens
        step.num_tokens += num_tokens
        sampled: tuple[Request, ...] = ()
        if request.num_uncomputed_tokens == 0:
            sampled = (request, *self._fork(request))
        step.scheduled.append(ScheduledRequest(request, first_token, num_tokens, sampled))

    def _fork(self, request: Request) -> list[Request]:
        """The other sequences of a request whose prompt is complete: they share its blocks and run on their own."""
        if not request.num_forks:
            return []
        forks = [request.fork(index) for index in range(1, request.num_forks + 1)]
        request.num_forks = 0
        request.may_share_tail = True
        for fork in forks:
            fork.may_share_tail = True
            self.pool.share(fork.block_ids)
            fork.slot = self._free_slots.pop()
        position = self.running.index(request) + 1
        self.running[position:position] = forks
        return forks

    def _publish(self, request: Request) -> None:
        """Tell the prefix cache of the blocks that are full of computed tokens.

        Where another request was first with the same tokens, its block takes the place of the own one. So a request
        holds all blocks above those that it publishes, and no block that is cached alone lies above one in use.
        """
        size = self.limits.block_size
        node = request.cache_node
        assert node is not None
        num_valid = min(request.num_computed_tokens, len(request.token_ids) - request.num_promised)
        while (request.num_published + 1) * size <= num_valid:
            i = request.num_published
            tokens = tuple(request.token_ids[i * size : (i + 1) * size])
            own = request.block_ids[i]
            node = self.prefix_cache.extend(node, tokens, own)
            if node.block_id not in (own, NO_BLOCK):
                self.pool.share([node.block_id])
                self.pool.release([own])
                request.block_ids[i] = node.block_id
                request.num_table_blocks = min(request.num_table_blocks, i)
            request.num_published += 1
        request.cache_node = node

    def _preempt(self, request: Request) -> None:
        """Take a running request's blocks; it waits, oldest first, and is recomputed with the same tokens."""
        self.counters.num_preemptions += 1
        self.running.remove(request)
        self._release_blocks(request)
        request.status = RequestStatus.WAITING
        age = _age(request)  # of those that wait, few are older
        position = next((i for i, each in enumerate(self.waiting) if _age(each) > age), len(self.waiting))
        self.waiting.insert(position, request)

    def _release_blocks(self, request: Request) -> None:
        self.pool.release(reversed(request.block_ids))
        if request.cache_node is not None:
            self.prefix_cache.release(request.cache_node)
        if request.slot >= 0:
            self._free_slots.append(request.slot)
        request.slot = -1
        request.num_table_blocks = 0
        request.block_ids = []
        request.num_computed_tokens = 0
        request.num_published = 0
        request.cache_node = None

    def _num_blocks_for(self, num_tokens: int) -> int:
        return -(-min(num_tokens, self.limits.max_model_len) // self.limits.block_size)


def _age(request: Request) -> tuple[float, str, int]:
    """Sorts the oldest first; requests of one arrival keep the order of their names."""
    return request.arrival_time_s, request.request_id, request.index


def check_invariants(scheduler: Scheduler) -> None:
    """Raise AssertionError if a block is lost, owned twice without being shared, or counted wrongly. For tests."""
    references: dict[int, int] = {}
    for request in scheduler.running:
        assert len(set(request.block_ids)) == len(request.block_ids), "a request holds a block twice"
        for block_id in request.block_ids:
            references[block_id] = references.get(block_id, 0) + 1
    pool = scheduler.pool
    for block_id in range(pool.num_blocks):
        assert pool.num_references(block_id) == references.get(block_id, 0), f"block {block_id}"
    retained = [node.block_id for node in scheduler.prefix_cache.nodes()]
    assert len(set(retained)) == len(retained), "two nodes hold one block"
    candidates = {node.block_id for node in scheduler.prefix_cache.candidates()}
    for node in scheduler.prefix_cache.nodes():
        is_above = all(parent in references for parent in _blocks_above(node))
        assert is_above or node.block_id not in references, f"block {node.block_id} is in use below one that is not"
        is_lost = not node.children and node.block_id not in references and node.block_id not in candidates
        assert not is_lost, f"cached block {node.block_id} cannot be evicted"
    _check_counts(scheduler, references, retained)
    slots = [request.slot for request in scheduler.running]
    assert sorted(slots + scheduler._free_slots) == list(range(scheduler.limits.max_num_seqs)), "a slot is lost"


def _blocks_above(node: Node) -> Iterator[int]:
    while node.parent is not None and node.parent.parent is not None:
        node = node.parent
        yield node.block_id


def _check_counts(scheduler: Scheduler, references: dict[int, int], retained: Iterable[int]) -> None:
    pool = scheduler.pool
    assert pool.num_used == len(references)
    assert pool.num_cached == sum(block_id not in references for block_id in retained)
    assert pool.num_free + pool.num_used + pool.num_cached == pool.num_blocks
    assert all(not request.block_ids for request in scheduler.waiting)
