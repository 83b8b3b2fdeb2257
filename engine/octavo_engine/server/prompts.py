"""From a request to the prompt's tokens. Conversations are rendered by the model's chat template first; what takes long
runs off the event loop.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, cast

from octavo_engine.errors import InvalidRequestError
from octavo_engine.server.schemas import ChatCompletionRequest, CompletionRequest
from octavo_engine.server.serving import Serving
from octavo_engine.server.text import Tokenizer

RESERVED_VARIABLES: Final = frozenset({"self", "messages", "add_generation_prompt", "continue_final_message"})


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as the engine reads it, and as `echo` shows it."""

    token_ids: list[int]
    text: str


async def completion_prompts(request: CompletionRequest, tokenizer: Tokenizer, serving: Serving) -> list[Prompt]:
    """The prompts of a completion."""
    prompt = request.prompt
    if isinstance(prompt, str):
        return await _tokenise([prompt], request, tokenizer, serving)
    if isinstance(prompt[0], str):
        return await _tokenise(prompt, request, tokenizer, serving)
    token_lists = cast("list[list[int]]", [prompt] if isinstance(prompt[0], int) else prompt)
    texts = _decode_known(token_lists, tokenizer) if request.echo else [""] * len(token_lists)
    return [Prompt(token_ids, text) for token_ids, text in zip(token_lists, texts, strict=True)]


async def chat_prompt(request: ChatCompletionRequest, tokenizer: Tokenizer, serving: Serving) -> list[int]:
    """The conversation's tokens. Raises InvalidRequestError if the model's chat template refuses it."""
    text = _render(request, tokenizer)
    add_special_tokens = request.add_special_tokens
    token_ids = await serving.off_loop(len(text), lambda: tokenizer.encode(text, add_special_tokens=add_special_tokens))
    if not token_ids:
        raise InvalidRequestError("the model's chat template makes an empty prompt of this", param="messages")
    return token_ids


def _render(request: ChatCompletionRequest, tokenizer: Tokenizer) -> str:
    """The conversation as text. Raises InvalidRequestError where the template, or a variable for it, makes trouble."""
    variables = request.chat_template_kwargs or {}
    if reserved := RESERVED_VARIABLES & variables.keys():
        message = f"chat_template_kwargs must not hold {min(reserved)}: the request has a field for it"
        raise InvalidRequestError(message, param="chat_template_kwargs")
    try:
        text = tokenizer.apply_chat_template(
            [message.as_template_input() for message in request.messages],
            add_generation_prompt=request.add_generation_prompt and not request.continue_final_message,
            continue_final_message=request.continue_final_message,
            **variables,
        )
    except (ArithmeticError, RecursionError) as error:
        message = f"the model's chat template cannot work with chat_template_kwargs: {error}"
        raise InvalidRequestError(message, param="chat_template_kwargs") from None
    if not _is_utf8(text):
        raise InvalidRequestError("messages: half of a surrogate pair is no character", param="messages")
    return text


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


async def _tokenise(
    texts: Sequence[str], request: CompletionRequest, tokenizer: Tokenizer, serving: Serving
) -> list[Prompt]:
    add_special_tokens = request.add_special_tokens

    def encode() -> list[list[int]]:
        if len(texts) == 1:
            return [tokenizer.encode(texts[0], add_special_tokens=add_special_tokens)]
        return tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)

    token_lists = await serving.off_loop(sum(len(text) for text in texts), encode)
    return [Prompt(token_ids, text) for token_ids, text in zip(token_lists, texts, strict=True)]


def _decode_known(token_lists: Sequence[list[int]], tokenizer: Tokenizer) -> list[str]:
    """The texts of token ids. Ids beyond the vocabulary are left to the check that names them."""
    vocab_size = tokenizer.vocab_size
    return [
        tokenizer.decode([token_id for token_id in token_ids if token_id < vocab_size], skip_special_tokens=False)
        for token_ids in token_lists
    ]
