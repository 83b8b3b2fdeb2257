import pytest
from engine.server.fake_core import VOCAB_SIZE
from engine.server.fake_tokenizer import ADDED_TEXT
from engine.server.server_process import ServerProcess

HELLO = [{"role": "user", "content": "hi"}]
RENDERED = "user: hi\nassistant: "


def test_answers_a_conversation(echo_server: ServerProcess) -> None:
    answer = echo_server.client.chat.completions.create(model="fake", messages=HELLO, max_tokens=8)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == "user: hi"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(RENDERED)
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 16


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_token_that_the_model_does_not_have_is_refused(echo_server: ServerProcess, path: str) -> None:
    text = f"hi {ADDED_TEXT}"
    is_chat = "chat" in path
    reply = echo_server.post(path, {"messages": [{"role": "user", "content": text}]} if is_chat else {"prompt": text})
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["param"] == ("messages" if is_chat else "prompt")
    assert f"token id {VOCAB_SIZE} is not below {VOCAB_SIZE}" in error["message"]


def test_bytes_of_log_probabilities_join_to_the_text(echo_server: ServerProcess) -> None:
    answer = echo_server.client.chat.completions.create(
        model="fake", messages=[{"role": "user", "content": "é🎉"}], max_tokens=12, logprobs=True
    )
    assert answer.choices[0].message.content == "user: é🎉"
    tokens = answer.choices[0].logprobs.content
    assert bytes(byte for token in tokens for byte in token.bytes).decode() == "user: é🎉"
    assert tokens[6].token == "\N{REPLACEMENT CHARACTER}"


def test_fills_the_context_unless_told(echo_server: ServerProcess) -> None:
    answer = echo_server.client.chat.completions.create(model="fake", messages=HELLO)
    assert answer.usage is not None
    assert answer.usage.total_tokens == 2048


def test_max_completion_tokens_wins_over_its_older_name(echo_server: ServerProcess) -> None:
    answer = echo_server.client.chat.completions.create(
        model="fake", messages=HELLO, max_tokens=3, max_completion_tokens=5
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5


def test_every_role_and_text_parts(echo_server: ServerProcess) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "t", "tool_call_id": "1"},
        {"role": "developer", "content": "d"},
    ]
    body = {"messages": messages, "max_tokens": 1, "return_token_ids": True}
    reply = echo_server.post("/v1/chat/completions", body).json()
    rendered = "system: s\nuser: a\nb\nassistant: \ntool: t\ndeveloper: d\nassistant: "
    assert bytes(reply["prompt_token_ids"]).decode() == rendered
    assert reply["choices"][0]["token_ids"] == [ord("s")]


@pytest.mark.parametrize(
    ("options", "rendered"),
    [
        ({}, "user: q\nassistant: a\nassistant: "),
        ({"add_generation_prompt": False}, "user: q\nassistant: a\n"),
        ({"continue_final_message": True}, "user: q\nassistant: a"),
        ({"continue_final_message": True, "add_generation_prompt": False}, "user: q\nassistant: a"),
    ],
    ids=["answer", "no-prompt", "continue", "continue-spelled-out"],
)
def test_end_of_the_prompt(echo_server: ServerProcess, options: dict[str, object], rendered: str) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    body = {"messages": messages, "max_tokens": 1, "return_token_ids": True, **options}
    reply = echo_server.post("/v1/chat/completions", body).json()
    assert bytes(reply["prompt_token_ids"]).decode() == rendered


def test_logprobs_have_bytes_and_alternatives(echo_server: ServerProcess) -> None:
    answer = echo_server.client.chat.completions.create(
        model="fake", messages=HELLO, max_tokens=2, logprobs=True, top_logprobs=2
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    first = logprobs.content[0]
    assert (first.token, first.bytes, first.logprob) == ("u", [117], -0.5)
    assert [(top.token, top.logprob) for top in first.top_logprobs] == [("u", -0.5), ("v", -1.0)]
    assert len(logprobs.content) == 2


def test_stream_tells_the_role_first_and_adds_up(echo_server: ServerProcess) -> None:
    chunks = list(
        echo_server.client.chat.completions.create(
            model="fake", messages=HELLO, n=2, max_tokens=8, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 16
    for index, text in enumerate(["user: hi", "ser: hi\n"]):
        deltas = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == index]
        assert deltas[0].delta.role == "assistant"
        assert all(delta.delta.role is None for delta in deltas[1:])
        assert "".join(delta.delta.content or "" for delta in deltas) == text
        assert [delta.finish_reason for delta in deltas if delta.finish_reason] == ["length"]


def test_stream_ends_before_a_stop_string(slow_server: ServerProcess) -> None:
    chunks = slow_server.client.chat.completions.create(
        model="fake", messages=HELLO, max_tokens=100, stream=True, stop=["i\nass"], logprobs=True
    )
    choices = [chunk.choices[0] for chunk in chunks]
    assert "".join(choice.delta.content or "" for choice in choices) == "user: h"
    assert choices[-1].finish_reason == "stop"
    tokens = [entry.token for choice in choices if choice.logprobs for entry in choice.logprobs.content or []]
    assert "".join(tokens) == "user: hi\nass"


def test_template_variables_reach_the_template(echo_server: ServerProcess) -> None:
    body = {"messages": HELLO, "chat_template_kwargs": {"refuse": True}}
    response = echo_server.post("/v1/chat/completions", body)
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "the chat template refuses this"
