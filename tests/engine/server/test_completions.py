import math

import pytest
from engine.server.fake_core import END_TOKEN_ID
from engine.server.server_process import ServerProcess


def test_continues_a_text(echo_server: ServerProcess) -> None:
    answer = echo_server.client.completions.create(model="fake", prompt="abc", max_tokens=7)
    assert answer.object == "text_completion"
    assert answer.choices[0].text == "abcabca"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 7, 10)


def test_sixteen_tokens_unless_told(echo_server: ServerProcess) -> None:
    answer = echo_server.client.completions.create(model="fake", prompt="a")
    assert answer.choices[0].text == "a" * 16


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("ab", ["abab"]),
        (["ab", "c"], ["abab", "cccc"]),
        ([97, 98], ["abab"]),
        ([[97, 98], [99]], ["abab", "cccc"]),
    ],
    ids=["text", "texts", "token-ids", "lists-of-token-ids"],
)
def test_takes_every_kind_of_prompt(echo_server: ServerProcess, prompt: object, texts: list[str]) -> None:
    reply = echo_server.post("/v1/completions", {"prompt": prompt, "max_tokens": 4}).json()
    assert [choice["text"] for choice in reply["choices"]] == texts
    assert [choice["index"] for choice in reply["choices"]] == list(range(len(texts)))


def test_n_answers_for_each_prompt_are_numbered_prompt_by_prompt(echo_server: ServerProcess) -> None:
    answer = echo_server.client.completions.create(model="fake", prompt=["ab", "cd"], n=2, max_tokens=2)
    assert [(choice.index, choice.text) for choice in answer.choices] == [(0, "ab"), (1, "ba"), (2, "cd"), (3, "dc")]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 8)


def test_logprobs_come_in_parallel_lists(echo_server: ServerProcess) -> None:
    answer = echo_server.client.completions.create(model="fake", prompt="ab", max_tokens=3, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["a", "b", "a"]
    assert logprobs.token_logprobs == [-0.5] * 3
    assert logprobs.top_logprobs == [{"a": -0.5, "b": -1.0}, {"b": -0.5, "c": -1.0}, {"a": -0.5, "b": -1.0}]
    assert logprobs.text_offset == [0, 1, 2]


def test_logprobs_zero_gives_the_chosen_token_alone(echo_server: ServerProcess) -> None:
    answer = echo_server.client.completions.create(model="fake", prompt="a", max_tokens=1, logprobs=0)
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.top_logprobs == [{"a": -0.5}]


def test_echo_puts_the_prompt_and_its_logprobs_in_front(echo_server: ServerProcess) -> None:
    answer = echo_server.client.completions.create(model="fake", prompt="ab", max_tokens=1, echo=True, logprobs=0)
    choice = answer.choices[0]
    assert choice.text == "aba"
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == ["a", "b", "a"]
    assert choice.logprobs.token_logprobs == [None, -0.5, -0.5]
    assert choice.logprobs.text_offset == [0, 1, 2]


def test_echo_with_max_tokens_zero_scores_the_prompt_alone(echo_server: ServerProcess) -> None:
    answer = echo_server.client.completions.create(model="fake", prompt=[97, 98], max_tokens=0, echo=True, logprobs=1)
    choice = answer.choices[0]
    assert choice.text == "ab"
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs == [None, -0.5]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0


def test_return_token_ids(echo_server: ServerProcess) -> None:
    body = {"prompt": "ab", "max_tokens": 3, "return_token_ids": True}
    choice = echo_server.post("/v1/completions", body).json()["choices"][0]
    assert choice["token_ids"] == [97, 98, 97]
    assert choice["prompt_token_ids"] == [97, 98]


@pytest.mark.parametrize(
    ("options", "text", "finish_reason", "stop_reason"),
    [
        ({"stop": "cd"}, "ab", "stop", "cd"),
        ({"stop": ["x", "d"]}, "abc", "stop", "d"),
        ({"stop": "cd", "include_stop_str_in_output": True}, "abcd", "stop", "cd"),
        ({"stop": "ab", "min_tokens": 5}, "abcdab"[:4], "stop", "ab"),
        ({"stop_token_ids": [100]}, "abc", "stop", 100),
        ({"stop_token_ids": [100], "include_stop_str_in_output": True}, "abcd", "stop", 100),
        ({"stop": []}, "abcdabcd", "length", None),
    ],
    ids=["string", "list", "included", "after-min-tokens", "token", "token-included", "none"],
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_stops(
    echo_server: ServerProcess,
    options: dict[str, object],
    text: str,
    finish_reason: str,
    stop_reason: object,
    stream: bool,
) -> None:
    body = {"prompt": "abcd", "max_tokens": 8, **options}
    if stream:
        chunks = list(
            echo_server.client.completions.create(
                model="fake", prompt="abcd", max_tokens=8, stream=True, extra_body=options
            )
        )
        assert "".join(chunk.choices[0].text for chunk in chunks) == text
        last = chunks[-1].choices[0].model_dump()
    else:
        last = echo_server.post("/v1/completions", body).json()["choices"][0]
        assert last["text"] == text
    assert (last["finish_reason"], last["stop_reason"]) == (finish_reason, stop_reason)


def test_stop_string_frees_the_sequence_in_the_engine(slow_server: ServerProcess) -> None:
    before = slow_server.metric("octavo_generation_tokens_total")
    answer = slow_server.client.completions.create(model="fake", prompt="abcd", max_tokens=2000, stop="cd")
    assert answer.choices[0].text == "ab"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 4
    assert slow_server.metric("octavo_generation_tokens_total") - before < 100


def test_end_token_ends_unless_ignored(echo_server: ServerProcess) -> None:
    body = {"prompt": [97, END_TOKEN_ID], "max_tokens": 4}
    choice = echo_server.post("/v1/completions", body).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("a", "stop", None)
    choice = echo_server.post("/v1/completions", {**body, "ignore_eos": True}).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("aa", "length")


def test_stream_gives_what_the_whole_answer_gives(echo_server: ServerProcess) -> None:
    options = {"model": "fake", "prompt": ["héllo", "x"], "n": 2, "max_tokens": 9, "logprobs": 1}
    whole = echo_server.client.completions.create(**options)
    chunks = list(echo_server.client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    for choice in whole.choices:
        own = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == choice.index]
        assert "".join(each.text for each in own) == choice.text
        assert own[-1].finish_reason == "length"
        assert all(each.finish_reason is None for each in own[:-1])
        offsets = [offset for each in own if each.logprobs for offset in each.logprobs.text_offset or []]
        assert choice.logprobs is not None
        assert offsets == choice.logprobs.text_offset


def test_stream_with_echo_begins_with_the_prompt(echo_server: ServerProcess) -> None:
    chunks = list(
        echo_server.client.completions.create(
            model="fake", prompt="ab", max_tokens=3, echo=True, logprobs=0, stream=True
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == "ababa"
    assert chunks[0].choices[0].text.startswith("ab")
    logprobs = [entry for chunk in chunks for entry in chunk.choices[0].logprobs.token_logprobs]
    assert logprobs == [None, -0.5, -0.5, -0.5, -0.5]


def test_continuous_usage_counts_up(echo_server: ServerProcess) -> None:
    chunks = list(
        echo_server.client.completions.create(
            model="fake",
            prompt="ab",
            max_tokens=5,
            stream=True,
            stream_options={"include_usage": True, "continuous_usage_stats": True},
        )
    )
    counts = [chunk.usage.completion_tokens for chunk in chunks if chunk.usage]
    assert len(counts) == len(chunks)
    assert counts == sorted(counts)
    assert counts[-1] == 5


def test_default_length_shrinks_to_what_the_context_has_left(echo_server: ServerProcess) -> None:
    answer = echo_server.client.completions.create(model="fake", prompt=[97] * 2040)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8


def test_long_texts_are_tokenised_beside_the_loop(echo_server: ServerProcess) -> None:
    answer = echo_server.client.completions.create(model="fake", prompt=["a" * 1500, "b" * 1500], max_tokens=2)
    assert [choice.text for choice in answer.choices] == ["aa", "bb"]


def test_unlikely_logprobs_stay_json(echo_server: ServerProcess) -> None:
    answer = echo_server.client.completions.create(model="fake", prompt="a", max_tokens=1, logprobs=20)
    assert answer.choices[0].logprobs is not None
    assert all(math.isfinite(value) for value in answer.choices[0].logprobs.top_logprobs[0].values())


def test_fields_without_influence_are_taken(echo_server: ServerProcess) -> None:
    body = {"prompt": "a", "user": "me", "store": True, "metadata": {"a": "b"}, "best_of": 2, "n": 2, "suffix": None}
    assert echo_server.post("/v1/completions", body).status_code == 200
