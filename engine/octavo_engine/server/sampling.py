"""From a request's fields to the engine's sampling parameters, checked against what this engine can do."""

from collections.abc import Sequence
from typing import Final

from octavo_engine.errors import InvalidRequestError
from octavo_engine.protocol import EngineReady, SamplingParams
from octavo_engine.server.schemas import ChatCompletionRequest, CompletionRequest, SamplingFields
from octavo_engine.server.text import TextOptions

DEFAULT_COMPLETION_TOKENS: Final = 16


def completion_params(
    request: CompletionRequest, prompts: Sequence[Sequence[int]], engine: EngineReady, vocab_size: int
) -> SamplingParams:
    """Parameters for all prompts of a completion. Raises InvalidRequestError."""
    _check_prompts(prompts, vocab_size)
    if request.max_tokens == 0 and not request.echo:
        raise InvalidRequestError("max_tokens must be at least 1, or 0 with echo", param="max_tokens")
    if request.stream and request.echo and request.logprobs is not None and (request.n or 1) > 1:
        raise InvalidRequestError("echo with logprobs and n > 1 cannot be streamed", param="stream")
    # A prompt alone is scored by generating one token that nobody sees.
    wanted = None if request.max_tokens is None else max(1, request.max_tokens)
    rest = _check_context(prompts, wanted, engine, "prompt", "max_tokens")
    max_tokens = min(DEFAULT_COMPLETION_TOKENS, rest) if wanted is None else wanted
    prompt_logprobs = request.logprobs if request.echo else None
    return _params(request, engine, vocab_size, max_tokens, request.logprobs, prompt_logprobs)


def chat_params(
    request: ChatCompletionRequest, prompt: Sequence[int], engine: EngineReady, vocab_size: int
) -> SamplingParams:
    """Parameters for a chat answer. Raises InvalidRequestError."""
    limit = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
    wanted: int | None = getattr(request, limit)
    # A tokenizer may know tokens that the model's embedding has no row for, and a message can spell them.
    _check_token_ids(prompt, vocab_size, "messages")
    rest = _check_context([prompt], wanted, engine, "messages", limit)
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    return _params(request, engine, vocab_size, rest if wanted is None else wanted, logprobs, None)


def text_options(request: SamplingFields) -> TextOptions:
    """How the answer's tokens become text."""
    return TextOptions(
        stop_strings=request.stop_strings,
        stop_token_ids=request.stop_token_ids or (),
        include_stop=request.include_stop_str_in_output,
        min_tokens=request.min_tokens,
        skip_special_tokens=request.skip_special_tokens,
    )


def _params(
    request: SamplingFields,
    engine: EngineReady,
    vocab_size: int,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> SamplingParams:
    n = request.n or 1
    if n > engine.max_num_seqs:
        raise InvalidRequestError(f"n must be at most {engine.max_num_seqs}, which run at once here", param="n")
    if request.min_tokens > max_tokens:
        raise InvalidRequestError(
            f"min_tokens={request.min_tokens} is more than the answer may have: {max_tokens}", param="min_tokens"
        )
    stop_token_ids = tuple(request.stop_token_ids or ())
    _check_token_ids(stop_token_ids, vocab_size, "stop_token_ids")
    logit_bias = {int(token_id): bias for token_id, bias in (request.logit_bias or {}).items()}
    _check_token_ids(tuple(logit_bias), vocab_size, "logit_bias")
    return SamplingParams(
        temperature=1.0 if request.temperature is None else request.temperature,
        top_k=max(0, request.top_k or 0),
        top_p=1.0 if request.top_p is None else request.top_p,
        min_p=request.min_p or 0.0,
        repetition_penalty=1.0 if request.repetition_penalty is None else request.repetition_penalty,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        seed=request.seed,
        n=n,
        max_tokens=max_tokens,
        min_tokens=request.min_tokens,
        stop_token_ids=stop_token_ids,
        ignore_eos=request.ignore_eos,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        logit_bias=logit_bias,
    )


def _check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    for prompt in prompts:
        if not prompt:
            raise InvalidRequestError("the prompt is empty: it needs at least one token", param="prompt")
        _check_token_ids(prompt, vocab_size, "prompt")


def _check_token_ids(token_ids: Sequence[int], vocab_size: int, param: str) -> None:
    largest = max(token_ids, default=0)
    if largest >= vocab_size:
        raise InvalidRequestError(f"{param}: token id {largest} is not below {vocab_size}, the vocabulary", param=param)


def _check_context(
    prompts: Sequence[Sequence[int]], wanted: int | None, engine: EngineReady, param: str, limit: str
) -> int:
    """The tokens that the context has left after the longest prompt.

    param, limit: names of the fields that hold the prompts and `wanted`
    """
    num_prompt_tokens = max(len(prompt) for prompt in prompts)
    rest = engine.max_model_len - num_prompt_tokens
    if rest < 1 or (wanted is not None and wanted > rest):
        asked = f"{num_prompt_tokens} in the {param} and {wanted or 'at least 1'} for the answer"
        raise InvalidRequestError(
            f"this model's context is {engine.max_model_len} tokens, and the request needs {asked}",
            param=param if rest < 1 else limit,
            code="context_length_exceeded",
        )
    return rest
