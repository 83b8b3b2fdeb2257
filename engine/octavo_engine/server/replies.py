"""What the OpenAI endpoints answer, as typed dictionaries: pydantic makes the OpenAPI document from them, and msgspec
encodes them in microseconds.
"""

from typing import Literal, NotRequired

from typing_extensions import TypedDict  # pydantic reads the standard library's only from Python 3.12 on

Finish = Literal["stop", "length"]


class PromptTokensDetails(TypedDict):
    """Where prompt tokens came from."""

    cached_tokens: int


class Usage(TypedDict):
    """Tokens that a request read and wrote."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(TypedDict):
    """Log probabilities, one entry per token; `text_offset` counts characters of `text`."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    """One answer to one prompt; `stop_reason` is the stop string or token that ended it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish | None
    stop_reason: str | int | None
    token_ids: NotRequired[list[int]]
    prompt_token_ids: NotRequired[list[int]]


class Completion(TypedDict):
    """An answer of `/v1/completions`, or a chunk of one."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: NotRequired[Usage | None]


class TopLogprob(TypedDict):
    """A token that could have stood there."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token of the answer."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    """Log probabilities of an answer's tokens."""

    content: list[TokenLogprob]


class AnswerMessage(TypedDict):
    """The assistant's turn."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(TypedDict):
    """One answer; `stop_reason` is the stop string or token that ended it."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish
    stop_reason: str | int | None
    token_ids: NotRequired[list[int]]


class ChatCompletion(TypedDict):
    """An answer of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: NotRequired[list[int]]


class ChatDelta(TypedDict):
    """What a chunk adds to the assistant's turn."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]


class ChatChunkChoice(TypedDict):
    """What a chunk adds to one answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Finish | None
    stop_reason: NotRequired[str | int | None]
    token_ids: NotRequired[list[int]]


class ChatCompletionChunk(TypedDict):
    """One event of a streamed `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: NotRequired[Usage | None]
    prompt_token_ids: NotRequired[list[int]]


class Model(TypedDict):
    """A model that can be named in requests."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: Literal["octavo"]
    root: str
    max_model_len: int | None


class ModelList(TypedDict):
    """All models of this server."""

    object: Literal["list"]
    data: list[Model]
