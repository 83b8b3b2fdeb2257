import json
from typing import Any

import httpx
import openai
import pytest
from engine.server.server_process import ServerProcess

HELLO = [{"role": "user", "content": "hi"}]
COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"


def case_id(value: object) -> str:
    return json.dumps(value)[:60] if isinstance(value, dict) else ""


def assert_error(response: httpx.Response, status: int, param: str | None, words: str) -> dict[str, Any]:
    """OpenAI's body and nothing else."""
    body = response.json()
    assert response.status_code == status, body
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param, error
    assert words in error["message"], error
    return dict(error)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"temperature": -0.1}, "temperature", "greater than or equal to 0"),
        ({"temperature": 2.1}, "temperature", "less than or equal to 2"),
        ({"temperature": "hot"}, "temperature", "valid number"),
        ({"temperature": True}, "temperature", "valid number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"top_p": 1.5}, "top_p", "less than or equal to 1"),
        ({"top_k": -2}, "top_k", "greater than or equal to -1"),
        ({"top_k": 1.5}, "top_k", "valid integer"),
        ({"min_p": 1.1}, "min_p", "less than or equal to 1"),
        ({"presence_penalty": 3}, "presence_penalty", "less than or equal to 2"),
        ({"frequency_penalty": -3}, "frequency_penalty", "greater than or equal to -2"),
        ({"repetition_penalty": 0}, "repetition_penalty", "greater than 0"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 129}, "n", "less than or equal to 128"),
        ({"n": 65}, "n", "at most 64"),
        ({"seed": 2**63}, "seed", "less than"),
        ({"seed": 2**70}, "seed", "less than"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"stop": ""}, "stop", "at least 1 character"),
        ({"stop": 5}, "stop", "valid string"),
        ({"stop_token_ids": [300]}, "stop_token_ids", "300"),
        ({"stop_token_ids": [-1]}, "stop_token_ids.0", "greater than or equal to 0"),
        ({"logit_bias": {"257": 1}}, "logit_bias", "257"),
        ({"logit_bias": {"a": 1}}, "logit_bias.a", "pattern"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1", "less than or equal to 100"),
        ({"logit_bias": [1]}, "logit_bias", "dictionary"),
        ({"min_tokens": -1}, "min_tokens", "greater than or equal to 0"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens", "more than the answer may have"),
        ({"max_tokens": -1}, "max_tokens", "greater than or equal to"),
        ({"max_tokens": 10**12}, "max_tokens", "less than or equal to"),
        ({"stream": "yes"}, "stream", "boolean"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "only allowed with stream"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unrecognized"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format", "not supported"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"tool_choice": "required"}, "tool_choice", "not supported"),
        ({"best_of": 3}, "best_of", "not supported"),
        ({"suffix": "x"}, "suffix", "not supported"),
        ({"guided_json": {}}, "guided_json", "unrecognized"),
        ({"model": 5}, "model", "valid string"),
    ],
    ids=case_id,
)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT], ids=["completions", "chat"])
def test_wrong_fields_are_named(
    echo_server: ServerProcess, path: str, fields: dict[str, object], param: str, words: str
) -> None:
    base: dict[str, object] = {"prompt": "a"} if path == COMPLETIONS else {"messages": HELLO, "max_tokens": 5}
    assert_error(echo_server.post(path, {**base, **fields}), 400, param, words)


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "prompt", "required"),
        ({"prompt": ""}, "prompt", "at least 1 character"),
        ({"prompt": []}, "prompt", "at least 1 item"),
        ({"prompt": [[]]}, "prompt.0", "at least 1 item"),
        ({"prompt": [""]}, "prompt.0", "at least 1 character"),
        ({"prompt": ["a", 1]}, "prompt", "valid"),
        ({"prompt": None}, "prompt", "required"),
        ({"prompt": [257]}, "prompt", "257"),
        ({"prompt": [-1]}, "prompt", "greater than or equal to 0"),
        ({"prompt": [2**80]}, "prompt", "less than or equal to"),
        ({"prompt": "a", "logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"prompt": "a", "logprobs": True}, "logprobs", "integer"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", "at least 1"),
        ({"prompt": "a", "echo": True, "stream": True, "logprobs": 0, "n": 2}, "stream", "cannot be streamed"),
        ({"prompt": "a", "messages": HELLO}, "messages", "unrecognized"),
    ],
    ids=case_id,
)
def test_wrong_completions(echo_server: ServerProcess, body: dict[str, object], param: str, words: str) -> None:
    response = echo_server.post(COMPLETIONS, body)
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["param"].startswith(param.split(".")[0])
    assert words in error["message"]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": "hi"}, "messages", "valid list"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages.0.role", "should be 'system'"),
        ({"messages": [{"role": "user"}]}, "messages", "needs content"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages.0.content", "valid string"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content", "valid string"),
        ({"messages": HELLO, "top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"messages": HELLO, "logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"messages": HELLO, "max_completion_tokens": 0}, "max_completion_tokens", "greater than or equal to 1"),
        ({"messages": HELLO, "modalities": ["audio"]}, "modalities", "not supported"),
        (
            {"messages": HELLO, "continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
            "exclude each other",
        ),
        ({"messages": HELLO, "chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "must not hold"),
        ({"messages": HELLO, "chat_template_kwargs": 1}, "chat_template_kwargs", "dictionary"),
    ],
    ids=case_id,
)
def test_wrong_chats(echo_server: ServerProcess, fields: dict[str, object], param: str, words: str) -> None:
    assert_error(echo_server.post(CHAT, fields), 400, param, words)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT], ids=["completions", "chat"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "not JSON"),
        (b"", "JSON object"),
        (b"[]", "JSON object"),
        (b"null", "JSON object"),
        (b'"text"', "JSON object"),
        (b'{"\xff\xfe', "error parsing the body"),
        (b"[" * 100_000, "error parsing the body"),
        (b"1" * 10_000, "error parsing the body"),
    ],
    ids=["broken", "empty", "list", "null", "string", "no-utf8", "deep", "long-number"],
)
def test_bodies_that_are_no_json_object(echo_server: ServerProcess, path: str, content: bytes, words: str) -> None:
    headers = {"Content-Type": "application/json"}
    assert_error(httpx.post(echo_server.url + path, content=content, headers=headers), 400, None, words)


@pytest.mark.parametrize(
    "content",
    [
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "top_p": Infinity}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "stop": "\\udfff"}',
        b'{"prompt": "a", "logit_bias": {"1": -Infinity}}',
    ],
    ids=["nan", "infinity", "surrogate-prompt", "surrogate-stop", "infinite-bias"],
)
def test_values_that_json_or_text_cannot_hold(echo_server: ServerProcess, content: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    response = httpx.post(echo_server.url + COMPLETIONS, content=content, headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["param"] in {"temperature", "top_p", "prompt", "stop", "logit_bias.1"}


def test_surrogate_in_a_message(echo_server: ServerProcess) -> None:
    content = b'{"messages": [{"role": "user", "content": "\\ud800"}]}'
    headers = {"Content-Type": "application/json"}
    response = httpx.post(echo_server.url + CHAT, content=content, headers=headers)
    assert_error(response, 400, "messages", "surrogate")


def test_surrogate_in_a_name(echo_server: ServerProcess) -> None:
    headers = {"Content-Type": "application/json"}
    for field, status in ((b'"\\ud800": 1', 400), (b'"logit_bias": {"\\ud800": 1}', 400), (b'"model": "\\ud800"', 404)):
        content = b'{"prompt": "a", ' + field + b"}"
        response = httpx.post(echo_server.url + COMPLETIONS, content=content, headers=headers)
        assert response.status_code == status, response.text


def test_form_bodies_are_told_to_be_json(echo_server: ServerProcess) -> None:
    response = httpx.post(echo_server.url + COMPLETIONS, data={"prompt": "a"})
    assert_error(response, 400, None, "Content-Type: application/json")


def test_a_limit_is_named_as_it_was_given(echo_server: ServerProcess) -> None:
    for limit in ("max_tokens", "max_completion_tokens"):
        response = echo_server.post(CHAT, {"messages": HELLO, limit: 100_000})
        assert_error(response, 400, limit, "context is 2048 tokens")


def test_context_length_is_told_with_its_numbers(echo_server: ServerProcess) -> None:
    error = assert_error(echo_server.post(COMPLETIONS, {"prompt": "a" * 3000}), 400, "prompt", "2048")
    assert error["code"] == "context_length_exceeded"
    assert "3000" in error["message"]
    body = {"prompt": "a" * 1000, "max_tokens": 1049}
    error = assert_error(echo_server.post(COMPLETIONS, body), 400, "max_tokens", "1049")
    assert error["code"] == "context_length_exceeded"
    body = {"messages": [{"role": "user", "content": "a" * 3000}]}
    assert_error(echo_server.post(CHAT, body), 400, "messages", "2048")


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT], ids=["completions", "chat"])
def test_unknown_model(echo_server: ServerProcess, path: str) -> None:
    body = {"model": "gpt", **({"prompt": "a"} if path == COMPLETIONS else {"messages": HELLO})}
    error = assert_error(echo_server.post(path, body), 404, "model", "'gpt' does not exist")
    assert error["code"] == "model_not_found"


def test_unknown_paths_and_methods(echo_server: ServerProcess) -> None:
    assert_error(echo_server.get("/v1/nothing"), 404, None, "/v1/nothing")
    assert_error(echo_server.get("/v1/models/gpt"), 404, "model", "does not exist")
    response = echo_server.get(COMPLETIONS)
    assert_error(response, 405, None, "does not take GET")
    assert response.headers["allow"] == "POST"
    assert_error(httpx.delete(echo_server.url + "/livez"), 405, None, "does not take DELETE")


def test_huge_bodies_are_refused(echo_server: ServerProcess) -> None:
    content = b'{"prompt": "' + b"a" * (17 << 20) + b'"}'
    headers = {"Content-Type": "application/json"}
    response = httpx.post(echo_server.url + COMPLETIONS, content=content, headers=headers, timeout=60)
    assert_error(response, 413, None, "16 MiB")


def test_huge_bodies_of_undeclared_length_are_refused(echo_server: ServerProcess) -> None:
    headers = {"Content-Type": "application/json"}
    pieces = (b"a" * (1 << 20) for _ in range(17))
    response = httpx.post(echo_server.url + COMPLETIONS, content=pieces, headers=headers, timeout=60)
    assert_error(response, 413, None, "16 MiB")


def test_openai_client_raises_its_own_errors(echo_server: ServerProcess) -> None:
    with pytest.raises(openai.NotFoundError) as not_found:
        echo_server.client.completions.create(model="gpt", prompt="a")
    assert not_found.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad_request:
        echo_server.client.completions.create(model="fake", prompt="a", temperature=9)
    assert bad_request.value.param == "temperature"
