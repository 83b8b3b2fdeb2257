"""A sequence on its way through the engine: its tokens, how many of them are computed, and the blocks it holds."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from octavo_engine.prefix_cache import Node
from octavo_engine.protocol import SamplingParams, TokenLogprobs


class RequestStatus(Enum):
    """A request waits (also after a preemption), runs, or has ended."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


PROMISED: Final = -1


@dataclass(slots=True, eq=False)
class Request:
    """One sequence. A client's request with n > 1 starts as one and is forked when its prompt is computed.

    There are no phases: `num_computed_tokens` catches up with `num_tokens`, by chunks for a prompt, one by one after.

    token_ids:       prompt, then generated tokens; of the last `num_promised` only the number is known: a step that
                     computes them is under way, and PROMISED stands in for each
    block_ids:       its KV blocks in order; block i holds tokens [i * block_size, (i + 1) * block_size)
    num_published:   how many of them the prefix cache has been told of; `cache_node` is the deepest of these
    num_forks:       sequences to fork off when the prompt is computed (n - 1)
    max_num_tokens:  when it ends at the latest, prompt included
    may_share_tail:  whether another sequence may hold the block that its next token goes to
    queue_time_s:    from its arrival until it first ran; None before that
    slot:            its row in the device's tables of running sequences; -1 while it does not run
    num_table_blocks: how many of `block_ids` the device's table has
    """

    request_id: str
    index: int
    token_ids: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    seed: int
    arrival_time_s: float
    num_forks: int = 0
    max_num_tokens: int = 0
    status: RequestStatus = RequestStatus.WAITING
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    num_promised: int = 0
    queue_time_s: float | None = None
    block_ids: list[int] = field(default_factory=list)
    may_share_tail: bool = False
    slot: int = -1
    num_table_blocks: int = 0
    num_published: int = 0
    cache_node: Node | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt and generated ones, promised ones included."""
        return len(self.token_ids)

    @property
    def num_known_tokens(self) -> int:
        """Tokens whose values are known."""
        return len(self.token_ids) - self.num_promised

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far, promised ones included."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens whose KV no step has been given to compute."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def output_token_ids(self) -> Sequence[int]:
        """The generated tokens."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether every prompt token's logits are needed, so that none may come from the prefix cache."""
        return self.params.prompt_logprobs is not None and self.prompt_logprobs is not None

    def promise(self, num_tokens: int) -> None:
        """Count tokens that a step under way will bring."""
        self.token_ids += [PROMISED] * num_tokens
        self.num_promised += num_tokens

    def keep_promise(self, token_ids: Sequence[int]) -> None:
        """Fill in the values of the oldest promised tokens."""
        first = self.num_known_tokens
        self.token_ids[first : first + len(token_ids)] = token_ids
        self.num_promised -= len(token_ids)

    def fork(self, index: int) -> "Request":
        """A sequence that continues from this one's tokens. The caller gives it references to the blocks."""
        return Request(
            request_id=self.request_id,
            index=index,
            token_ids=list(self.token_ids),
            num_prompt_tokens=self.num_prompt_tokens,
            params=self.params,
            seed=self.seed,
            arrival_time_s=self.arrival_time_s,
            max_num_tokens=self.max_num_tokens,
            status=self.status,
            num_computed_tokens=self.num_computed_tokens,
            num_cached_tokens=self.num_cached_tokens,
            block_ids=list(self.block_ids),
            num_published=self.num_published,
            cache_node=self.cache_node,
        )
