"""What requests may look like, and what chat templates get to see of them."""

from typing import Any

import pytest
from octavo_engine.server.schemas import ChatCompletionRequest, CompletionRequest
from openai.types.chat import ChatCompletionMessage
from pydantic import ValidationError

HELLO = [{"role": "user", "content": "hi"}]
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"city": "Ulm"}'}}


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": [-1] * 1000},
        {"prompt": [""] * 1000},
        {"prompt": ["a", 1] * 500},
        {"prompt": [[-1]] * 1000},
        {"prompt": [[-1] * 1000]},
        {"prompt": "a", "stop": [1] * 16},
        {"prompt": "a", "stop_token_ids": [-1] * 1000},
    ],
)  # fmt: skip
def test_a_list_of_faults_is_told_of_once(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        CompletionRequest.model_validate(fields)
    assert caught.value.error_count() <= 4, "one for each kind of prompt"


@pytest.mark.parametrize(
    "messages",
    [[{}] * 1000, [{"role": "user", "content": [{}] * 1000}], [{"role": "assistant", "tool_calls": [{}] * 1000}]],
)
def test_a_conversation_of_faults_is_told_of_once(messages: list[Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        ChatCompletionRequest.model_validate({"messages": messages})
    assert caught.value.error_count() <= 4


def test_null_is_the_default_of_every_field() -> None:
    for schema, needed in ((CompletionRequest, {"prompt": "a"}), (ChatCompletionRequest, {"messages": HELLO})):
        nulls = dict.fromkeys(schema.model_fields.keys() - needed.keys())
        assert schema.model_validate({**nulls, **needed}) == schema.model_validate(needed)
    options = {"stream": True, "stream_options": {"include_usage": None}}
    assert CompletionRequest.model_validate({"prompt": "a", **options}).stream_options.include_usage is False


def test_what_the_openai_client_dumps_can_be_sent_again() -> None:
    message = ChatCompletionMessage.model_validate({"role": "assistant", "content": "a", "tool_calls": [CALL]})
    messages = [*HELLO, message.model_dump(), {**message.model_dump(), "annotations": []}]
    request = ChatCompletionRequest.model_validate({"messages": messages})
    assert [each.content for each in request.messages] == ["hi", "a", "a"]


def test_templates_see_arguments_as_objects() -> None:
    calls = [CALL, {**CALL, "function": {"name": "g", "arguments": ""}}]
    (message,) = ChatCompletionRequest.model_validate(
        {"messages": [{"role": "assistant", "content": None, "tool_calls": calls}]}
    ).messages
    assert [each["function"]["arguments"] for each in message.as_template_input()["tool_calls"]] == [
        {"city": "Ulm"},
        {},
    ]


@pytest.mark.parametrize("arguments", ["{", "[]", "1", "null", "[" * 100_000], ids=range(5))
def test_arguments_that_are_no_object_are_refused(arguments: str) -> None:
    call = {**CALL, "function": {"name": "f", "arguments": arguments}}
    with pytest.raises(ValidationError, match="JSON"):
        ChatCompletionRequest.model_validate({"messages": [{"role": "assistant", "tool_calls": [call]}]})
