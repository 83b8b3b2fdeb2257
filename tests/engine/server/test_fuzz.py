"""Random requests made from the server's own OpenAPI document: whatever comes in, a user gets no 500."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from engine.server.server_process import ServerProcess, running_server
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis.checks import content_type_conformance, response_schema_conformance, status_code_conformance
from schemathesis.generation import GenerationMode

# The document says which statuses, content types and bodies there are; the server keeps to it.
CHECKS = [content_type_conformance, response_schema_conformance, status_code_conformance]

# Whether their values are right depends on other fields, the vocabulary or the context: no schema can say. Half of
# the requests leave them out, so that enough are valid.
DEPENDENT_FIELDS = {
    "model", "logit_bias", "stop_token_ids", "min_tokens", "max_tokens", "max_completion_tokens", "stream_options",
    "top_logprobs", "continue_final_message", "n", "chat_template_kwargs", "echo",
}  # fmt: skip

NUM_REQUESTS = {
    ("POST", "/v1/completions"): 500,
    ("POST", "/v1/chat/completions"): 500,
    ("GET", "/v1/models/{model}"): 20,
}


def tamed(body: dict[str, Any]) -> dict[str, Any]:
    """The body without what no schema can get right."""
    body = {name: value for name, value in body.items() if name not in DEPENDENT_FIELDS}
    messages = body.get("messages")
    for message in messages if isinstance(messages, list) else []:
        if isinstance(message, dict) and message.get("content") is None:
            message["content"] = "text"
    return body


@pytest.fixture(scope="module")
def small_server() -> Iterator[ServerProcess]:
    """Its context is short, since a chat's answer fills it."""
    with running_server("EchoCore", "--max-model-len", "128") as server:
        yield server


@pytest.mark.parametrize(("method", "path"), list(NUM_REQUESTS), ids=["completions", "chat", "model"])
def test_random_requests_get_no_500(small_server: ServerProcess, method: str, path: str) -> None:
    document = schemathesis.openapi.from_dict(small_server.get("/openapi.json").json())
    document.config.update(base_url=small_server.url)
    operation = document[path][method]
    modes = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]
    strategy = operation.as_strategy(generation_mode=modes[0]) | operation.as_strategy(generation_mode=modes[1])
    statuses: Counter[int] = Counter()

    @seed(20260101)
    @settings(
        max_examples=NUM_REQUESTS[method, path],
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=strategy, is_tame=st.booleans())
    def send(case: schemathesis.Case, is_tame: bool) -> None:
        if is_tame and isinstance(case.body, dict):
            case.body = tamed(case.body)
        response = case.call(timeout=30)
        statuses[response.status_code] += 1
        assert response.status_code < 500, response.text
        case.validate_response(response, checks=CHECKS)
        if response.status_code != 200:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}

    send()
    assert statuses.total() >= NUM_REQUESTS[method, path]
    if method == "POST":
        assert statuses[200] > 40, statuses
        assert statuses[400] > 60, statuses
    assert small_server.get("/livez").status_code == 200
