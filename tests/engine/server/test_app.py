"""The application in this process, for states that a running server passes through too quickly."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
from engine.server.fake_tokenizer import ByteTokenizer
from octavo_engine.async_engine import AsyncEngine
from octavo_engine.config import EngineConfig
from octavo_engine.errors import EngineDeadError
from octavo_engine.protocol import SamplingParams
from octavo_engine.server.app import create_app
from octavo_engine.server.metrics import Metrics
from octavo_engine.server.serving import Serving

pytestmark = pytest.mark.usefixtures("_fake_cores_importable")

HELLO = {"messages": [{"role": "user", "content": "hi"}]}


@asynccontextmanager
async def running_app(core: str) -> AsyncIterator[tuple[httpx.AsyncClient, Serving]]:
    config = EngineConfig(model="fake")
    metrics = Metrics(config.model_name)
    engine = AsyncEngine(config, core=f"engine.server.fake_core:{core}", observer=metrics)
    metrics.watch(engine)
    serving = Serving(config, engine, metrics)
    serving.use_tokenizer(ByteTokenizer())
    engine.start()
    transport = httpx.ASGITransport(create_app(serving), raise_app_exceptions=False)
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield client, serving
    finally:
        await engine.close()
        serving.close()


async def test_dead_engine_fails_liveness_and_refuses_requests() -> None:
    async with running_app("FailingCore") as (client, serving):
        await serving.engine.wait_dead()
        for path in ("/livez", "/readyz", "/health"):
            response = await client.get(path)
            assert (response.status_code, response.json()["reason"]) == (503, "the engine process has ended")
        refused = await client.post("/v1/chat/completions", json=HELLO)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_unavailable")
        assert refused.json()["error"]["type"] == "server_error"
        assert (await client.get("/metrics")).status_code == 200


async def test_defect_of_ours_is_a_500_without_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    class BrokenTokenizer(ByteTokenizer):
        def apply_chat_template(self, *arguments: object, **variables: object) -> str:
            raise RuntimeError("a secret")

    async with running_app("EchoCore") as (client, serving):
        await serving.engine.wait_ready()
        serving.use_tokenizer(BrokenTokenizer())
        response = await client.post("/v1/chat/completions", json=HELLO)
        assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
        assert "secret" not in response.text
        assert "a secret" in caplog.text
        assert serving.num_open_requests == 0


async def test_defect_in_mid_stream_is_the_last_event() -> None:
    class BrokenTokenizer(ByteTokenizer):
        def stream(self, *, skip_special_tokens: bool = True) -> None:
            raise RuntimeError("a secret")

    async with running_app("SlowCore") as (client, serving):
        await serving.engine.wait_ready()
        serving.use_tokenizer(BrokenTokenizer())
        response = await client.post("/v1/chat/completions", json={**HELLO, "stream": True})
        assert response.status_code == 200
        first, done = response.text.strip().split("\n\n")
        assert "internal_error" in first
        assert done == "data: [DONE]"
        assert serving.engine.num_requests == 0


async def test_abort_of_all_ends_streams_and_whole_answers_with_an_error() -> None:
    async with running_app("SlowCore") as (_, serving):
        await serving.engine.wait_ready()
        with serving.engine.generate([[1], [2]], SamplingParams(max_tokens=1000)) as generation:
            await anext(generation)
            serving.engine.abort_all("the server is shutting down")
            with pytest.raises(EngineDeadError, match="shutting down"):
                async for _ in generation:
                    pass
        assert serving.engine.num_requests == 0


async def test_document_has_no_422_and_names_every_route() -> None:
    async with running_app("EchoCore") as (client, _):
        document = (await client.get("/openapi.json")).json()
    assert set(document["paths"]) == {
        "/v1/models", "/v1/models/{model}", "/v1/completions", "/v1/chat/completions", "/livez", "/readyz", "/startupz",
        "/health", "/version", "/metrics",
    }  # fmt: skip
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    assert all("422" not in operation["responses"] for operation in operations)
    assert all(operation["description"] for operation in operations)
    properties = document["components"]["schemas"]["CompletionRequest"]["properties"]
    assert all("description" in field for field in properties.values())
