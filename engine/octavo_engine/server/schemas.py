"""What `/v1/completions` and `/v1/chat/completions` take, with ranges; the OpenAPI document is made from it.

Fields that would change the answer and are not served are refused by name, and so are unknown ones: a parameter that
silently does nothing is a lie. Fields without influence on the answer are dropped.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from octavo_engine.errors import InvalidRequestError
from octavo_engine.protocol import MAX_LOGPROBS

MAX_N: Final = 128
MAX_STOP_STRINGS: Final = 16
MAX_PROMPTS: Final = 1024
MAX_TOKEN_ID: Final = 2**31 - 1

# OpenAI's and its clients' bookkeeping.
WITHOUT_INFLUENCE: Final = frozenset(
    {
        "user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
        "parallel_tool_calls", "prediction", "request_id", "priority",
    }
)  # fmt: skip

# Field -> values that ask for nothing; any other value would change the answer, and this server has no such feature.
NOT_SERVED: Final[Mapping[str, tuple[Any, ...]]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "function_call": (None, "none"),
    "functions": (None, []),
    "modalities": (None, ["text"]),
    "reasoning_effort": (None,),
    "response_format": (None, {"type": "text"}),
    "structured_outputs": (None,),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "truncate_prompt_tokens": (None,),
    "use_beam_search": (None, False),
    "verbosity": (None,),
    "web_search_options": (None,),
}

Text = Annotated[str, Field(strict=True)]
Switch = Annotated[bool, Field(strict=True)]
Count = Annotated[int, Field(strict=True, ge=1, le=MAX_TOKEN_ID)]
TokenId = Annotated[int, Field(strict=True, ge=0, le=MAX_TOKEN_ID)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Penalty = Annotated[float, Field(strict=True, ge=-2, le=2, allow_inf_nan=False)]
Bias = Annotated[float, Field(strict=True, ge=-100, le=100, allow_inf_nan=False)]
TokenIdText = Annotated[str, StringConstraints(strict=True, pattern=r"^[0-9]{1,10}$")]
# Lists end at their first fault: a list of a million would keep the server busy with reporting them.
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
StopString = Annotated[str, StringConstraints(strict=True, min_length=1)]


class _Fields(BaseModel):
    """Known fields only. `null` means that a field is absent: clients' libraries write it for what was not set."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _drop_null(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None}


class StreamOptions(_Fields):
    """What a stream carries beside the text."""

    include_usage: Switch = Field(False, description="Send one more chunk, with the token counts, at the end.")
    continuous_usage_stats: Switch = Field(False, description="Put the token counts so far into every chunk.")
    include_obfuscation: Switch = Field(False, description="Accepted for OpenAI's clients; nothing is padded.")


class SamplingFields(_Fields):
    """What both endpoints take."""

    model: Text | None = Field(None, description="Name of the served model, as `/v1/models` lists it.")
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = Field(
        None, description="0 takes the likeliest token; default 1."
    )
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = Field(
        None, description="Sample from the likeliest tokens that together have this probability; default 1: all."
    )
    top_k: Annotated[int, Field(strict=True, ge=-1, le=MAX_TOKEN_ID)] | None = Field(
        None, description="Sample from this many likeliest tokens; 0 or -1, the default: all."
    )
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = Field(
        None, description="Leave out tokens below this share of the likeliest one's probability; default 0: none."
    )
    presence_penalty: Penalty | None = Field(None, description="Against tokens that the answer already has.")
    frequency_penalty: Penalty | None = Field(None, description="Against tokens, by how often the answer has them.")
    repetition_penalty: Annotated[Number, Field(gt=0, le=100)] | None = Field(
        None, description="Divides the logits of tokens that prompt or answer already have; default 1."
    )
    logit_bias: dict[TokenIdText, Bias] | None = Field(None, description="Token id -> what is added to its logit.")
    seed: Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)] | None = Field(
        None, description="The same seed and request give the same answer, whatever else runs."
    )
    n: Annotated[int, Field(strict=True, ge=1, le=MAX_N)] | None = Field(
        None, description="Answers per prompt; default 1."
    )
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS, fail_fast=True)] | None = Field(
        None, description="The answer ends before the first of these strings."
    )
    include_stop_str_in_output: Switch = Field(False, description="Keep the stop string, or stop token, in the text.")
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1024, fail_fast=True)] | None = Field(
        None, description="Tokens that end the answer, beside the model's own end tokens."
    )
    ignore_eos: Switch = Field(False, description="Go on after the model's end tokens.")
    min_tokens: Annotated[int, Field(strict=True, ge=0, le=MAX_TOKEN_ID)] = Field(
        0, description="No end token and no stop string counts before this many tokens."
    )
    skip_special_tokens: Switch = Field(True, description="Leave special tokens out of the text.")
    return_token_ids: Switch = Field(False, description="Add `token_ids` and `prompt_token_ids` to the answer.")
    stream: Switch | None = Field(None, description="Send the answer as server-sent events while it is made.")
    stream_options: StreamOptions | None = Field(None, description="Only with `stream`.")

    @model_validator(mode="before")
    @classmethod
    def _drop_or_refuse(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for name, neutral in NOT_SERVED.items():
            if name == "best_of":  # the best n of n are all of them
                neutral = (*neutral, values.get("n"))
            if name in values and not any(_is_same(values[name], value) for value in neutral):
                raise InvalidRequestError(
                    f"{name} is not supported by this server; leave it out", param=name, code="unsupported_parameter"
                )
        dropped = WITHOUT_INFLUENCE | NOT_SERVED.keys()
        return {name: value for name, value in values.items() if name not in dropped}

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("stream_options is only allowed with stream: true", param="stream_options")
        return self

    @property
    def stop_strings(self) -> list[str]:
        """The stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


def _is_same(left: object, right: object) -> bool:
    """Equality in which JSON's `true` is not 1."""
    return left == right and isinstance(left, bool) == isinstance(right, bool)


class CompletionRequest(SamplingFields):
    """Continue a text."""

    prompt: (
        Annotated[str, Field(strict=True, min_length=1)]
        | Annotated[
            list[Annotated[str, Field(strict=True, min_length=1)]],
            Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True),
        ]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    ) = Field(description="One text or several, as text or as token ids.")
    max_tokens: Annotated[int, Field(strict=True, ge=0, le=MAX_TOKEN_ID)] | None = Field(
        None, description="Most tokens of the answer; default 16. 0 is allowed with `echo`."
    )
    logprobs: Annotated[int, Field(strict=True, ge=0, le=MAX_LOGPROBS)] | None = Field(
        None, description="Log probabilities of the tokens, and of this many likeliest at each place."
    )
    echo: Switch | None = Field(None, description="Put the prompt in front of the answer.")
    add_special_tokens: Switch = Field(True, description="Begin a text as the model's tokenizer does, with BOS say.")


class TextPart(_Fields):
    """A piece of a message's content."""

    type: Literal["text"] = Field(description="Only text is served.")
    text: Text


class FunctionCall(_Fields):
    """Which function the assistant called in an earlier turn."""

    name: Text
    arguments: Text = Field(description="A JSON object, as the model wrote it.")

    @model_validator(mode="after")
    def _check_arguments(self) -> Self:
        try:
            is_object = isinstance(self.parsed_arguments, dict)
        except (ValueError, RecursionError):
            is_object = False
        if not is_object:
            raise ValueError("arguments hold no JSON object")
        return self

    @property
    def parsed_arguments(self) -> Any:
        """What chat templates read, and write as their model wants it."""
        return json.loads(self.arguments or "{}")


class ToolCall(_Fields):
    """A call that the assistant made in an earlier turn."""

    id: Text
    type: Literal["function"] = "function"
    function: FunctionCall

    def as_template_input(self) -> dict[str, Any]:
        """The call as chat templates expect it: arguments are an object."""
        function = {"name": self.function.name, "arguments": self.function.parsed_arguments}
        return {"id": self.id, "type": self.type, "function": function}


class ChatMessage(_Fields):
    """One turn of the conversation. The model's chat template says which fields it reads."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, fail_fast=True)] | None = Field(
        None, description="Text; several parts are joined by line breaks. Only an assistant's may be empty."
    )
    name: Text | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = Field(
        None, description="Of an assistant's earlier turn."
    )
    tool_call_id: Text | None = Field(None, description="Which call a tool's turn answers.")
    refusal: Text | None = Field(None, description="Accepted from OpenAI's clients; templates do not read it.")
    annotations: Annotated[list[Any], Field(max_length=0)] | None = Field(None, description="The same.")

    @model_validator(mode="after")
    def _check_content(self) -> Self:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise InvalidRequestError(f"a message of role {self.role} needs content", param="messages")
        return self

    def as_template_input(self) -> dict[str, Any]:
        """The message as chat templates expect it: content is one string."""
        content = self.content
        if isinstance(content, list):
            content = "\n".join(part.text for part in content)
        message: dict[str, Any] = {"role": self.role, "content": content or ""}
        if self.name is not None:
            message["name"] = self.name
        if self.tool_calls:
            message["tool_calls"] = [call.as_template_input() for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


class ChatCompletionRequest(SamplingFields):
    """Answer a conversation."""

    messages: list[ChatMessage] = Field(min_length=1, fail_fast=True, description="The conversation so far.")
    max_tokens: Count | None = Field(None, description="Older name of `max_completion_tokens`.")
    max_completion_tokens: Count | None = Field(
        None, description="Most tokens of the answer; default: what the context has left."
    )
    logprobs: Switch | None = Field(None, description="Whether to give log probabilities of the tokens.")
    top_logprobs: Annotated[int, Field(strict=True, ge=0, le=MAX_LOGPROBS)] | None = Field(
        None, description="How many likeliest tokens to give at each place; only with `logprobs`."
    )
    add_generation_prompt: Switch = Field(True, description="End the prompt with the beginning of an answer.")
    continue_final_message: Switch = Field(False, description="Continue the last message instead of answering it.")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Variables for the model's chat template.")
    add_special_tokens: Switch = Field(False, description="Let the tokenizer add BOS beside the template's own.")

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequestError("top_logprobs needs logprobs: true", param="top_logprobs")
        asks_for_both = self.add_generation_prompt and "add_generation_prompt" in self.model_fields_set
        if self.continue_final_message and asks_for_both:
            raise InvalidRequestError(
                "continue_final_message and add_generation_prompt exclude each other", param="continue_final_message"
            )
        return self
