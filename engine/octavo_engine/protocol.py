"""What the API front end and the engine process say to each other, and the values both understand.

Messages are msgspec structs, encoded as msgpack and sent over ZeroMQ: typed, without code execution. One message
carries the outputs of a whole step. This module is torch-free.
"""

from typing import Final, Literal

import msgspec

FinishReason = Literal["stop", "length", "abort", "error"]

MAX_LOGPROBS: Final = 20


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """How one request turns logits into tokens. The front end has checked every range already.

    `temperature` 0 is greedy. `top_k` 0 and `top_p` 1 and `min_p` 0 switch the filter off. Penalties are OpenAI's
    (`presence`, `frequency`: over generated tokens) and Hugging Face's (`repetition`: over prompt and generated ones).
    `seed` None draws one at admission. `logprobs` None: none; N: the chosen token and the N likeliest.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    n: int = 1
    max_tokens: int = 16
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: dict[int, float] = {}

    @property
    def has_penalties(self) -> bool:
        """Whether the tokens so far count against themselves."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


class AddRequest(msgspec.Struct, frozen=True, tag=True):
    """Start `params.n` sequences from one prompt. Outputs name them by (`request_id`, `index`), 0 <= index < n."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    arrival_time_s: float  # time.monotonic() of this host, which both processes share


class AbortRequests(msgspec.Struct, frozen=True, tag=True):
    """End these requests and free their blocks. Each answers once more, with finish reason `abort`, unless it ended.

    With `index`, only that sequence of each request ends (a stop string matched one of n).
    """

    request_ids: list[str]
    index: int | None = None


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """End the engine process, now. (Draining is the front end's: it stops admitting and waits.)"""


class TokenLogprobs(msgspec.Struct, frozen=True, omit_defaults=True):
    """Log probability of one token, and of the likeliest: `top` holds (token id, logprob), best first.

    Taken from the raw logits, before penalties, temperature and filters.
    """

    token_id: int
    logprob: float
    top: list[tuple[int, float]] = []


class SequenceOutput(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one sequence gained in one step; the last one has a `finish_reason`."""

    request_id: str
    index: int
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None  # the token in `token_ids` that ended it, if it was a stop token
    logprobs: list[TokenLogprobs] | None = None
    num_cached_tokens: int = 0  # prompt tokens that the prefix cache supplied
    queue_time_s: float | None = None  # once, with the first output of index 0: from arrival to the first step
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # once, with the first output of index 0
    error: str | None = None


class EngineStats(msgspec.Struct, frozen=True):
    """A snapshot of the engine after a step, and counters since its start. Feeds /metrics and /livez."""

    num_waiting: int = 0
    num_running: int = 0
    num_kv_blocks: int = 0
    num_used_kv_blocks: int = 0  # referenced by a running request
    num_cached_kv_blocks: int = 0  # unreferenced, kept for prefix hits, evictable
    num_steps: int = 0
    num_prompt_tokens: int = 0  # computed, not counting cached ones
    num_generation_tokens: int = 0
    num_preemptions: int = 0
    num_prefix_cache_queries: int = 0  # prompt tokens looked up
    num_prefix_cache_hits: int = 0  # prompt tokens found
    last_step_time_s: float = 0.0  # duration
    last_step_roofline_ratio: float = 0.0  # predicted limit over measured time
    last_progress_s: float = 0.0  # time.monotonic() of the last finished step


class StepOutputs(msgspec.Struct, frozen=True, tag=True):
    """Everything that one step produced."""

    outputs: list[SequenceOutput]
    stats: EngineStats


class EnginePhase(msgspec.Struct, frozen=True, tag=True):
    """Where the engine's start-up stands; `/startupz` and the progress bar show it."""

    phase: Literal["starting", "downloading", "loading", "warming_up", "ready"]
    fraction: float = 0.0  # of this phase
    message: str = ""


class EngineReady(msgspec.Struct, frozen=True, tag=True):
    """Sent once, when requests can be answered."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    num_kv_blocks: int
    block_size: int
    memory: dict[str, dict[str, int]]  # "weights" | "kv_cache" -> {"predicted": bytes, "actual": bytes}
    hardware: str  # row of the hardware table
    kernels: dict[str, str]  # op -> implementation that was chosen


class Seat(msgspec.Struct, frozen=True):
    """One process's place among the ranks of an engine, each with its own device, and where they all meet.

    local_rank: its place among those on its node, and the number of its GPU
    store_host, store_port: of the key-value store that rank 0 keeps; store_fd: its listening socket, rank 0's alone
    """

    rank: int
    num_ranks: int
    local_rank: int
    num_local_ranks: int
    store_host: str
    store_port: int
    store_fd: int | None = None


class Turn(msgspec.Struct, frozen=True):
    """What rank 0 tells the others before each step, so that all take the same one.

    messages:   of the front end since the last step
    max_rounds: as many tokens as a sequence may get; 0: there is no further step
    digest:     of the tokens that the step before brought, which must be the same on all ranks
    """

    messages: list[AddRequest | AbortRequests]
    max_rounds: int
    digest: int


class EngineFailed(msgspec.Struct, frozen=True, tag=True):
    """The engine cannot start or go on; the process ends after this. `is_user_error`: `message` is for the user."""

    message: str
    is_user_error: bool


FrontEndMessage = AddRequest | AbortRequests | Shutdown
EngineMessage = StepOutputs | EnginePhase | EngineReady | EngineFailed
