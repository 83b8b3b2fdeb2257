"""What the routes share: the engine, the tokenizer, the metrics, and whether requests are taken at present."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Annotated, Final, TypeVar, cast

from fastapi import Depends, Request
from starlette.types import Receive

from octavo_engine.async_engine import AsyncEngine, Generation
from octavo_engine.config import EngineConfig
from octavo_engine.protocol import EngineReady
from octavo_engine.server.errors import model_not_found, unavailable
from octavo_engine.server.logprobs import TokenTexts
from octavo_engine.server.metrics import Metrics
from octavo_engine.server.text import Tokenizer

TOKENIZER_THREADS: Final = 2
# Shorter texts are tokenised faster than a thread wakes up.
INLINE_CHARACTERS: Final = 1000

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Admission:
    """What a request that is taken works with.

    arrival_s: on the engine's clock; created_s: the time of day, as replies state it
    """

    arrival_s: float
    created_s: int
    limits: EngineReady
    model: str
    tokenizer: Tokenizer
    token_texts: TokenTexts


class Serving:
    """One server's state. Belongs to one event loop."""

    def __init__(self, config: EngineConfig, engine: AsyncEngine, metrics: Metrics) -> None:
        self.config = config
        self.engine = engine
        self.metrics = metrics
        self.created_s = self.now_s()
        self.is_draining = False
        self.tokenizer: Tokenizer | None = None
        self.token_texts: TokenTexts | None = None
        self.num_open_requests = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._threads = ThreadPoolExecutor(TOKENIZER_THREADS, thread_name_prefix="tokenizer")

    def now_s(self) -> int:
        """The time of day, as replies state it."""
        return int(time.time())

    def use_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Take the model's tokenizer, once it is loaded."""
        self.tokenizer = tokenizer
        self.token_texts = TokenTexts(tokenizer)

    @property
    def is_loaded(self) -> bool:
        """Whether start-up is over. Only node 0 of an engine needs a tokenizer."""
        return self.engine.ready is not None and (self.tokenizer is not None or self.config.node_rank > 0)

    @property
    def is_ready(self) -> bool:
        """Whether a request would be answered now, or a rank of another node's engine runs here."""
        return self.is_loaded and not self.engine.is_dead and not self.is_draining

    def require_ready(self) -> EngineReady:
        """The engine's limits. Raises ApiError 503, with Retry-After, where no request is taken."""
        if self.is_draining:
            raise unavailable("the server is shutting down", "draining")
        if self.engine.is_dead:
            raise unavailable("the engine has stopped", "engine_unavailable")
        if self.engine.ready is None or self.tokenizer is None:
            raise unavailable(f"the model is loading ({self.engine.phase.phase})", "model_loading")
        return self.engine.ready

    def admit(self, model: str | None) -> Admission:
        """Take a request for `model`. Raises ApiError where none is taken, or where another model is served."""
        arrival_s = self.engine.now_s()
        limits = self.require_ready()
        name = self.require_model(model)
        assert self.tokenizer is not None
        assert self.token_texts is not None
        return Admission(arrival_s, self.now_s(), limits, name, self.tokenizer, self.token_texts)

    def require_model(self, name: str | None) -> str:
        """The served model's name. Raises ApiError 404 if the request names another."""
        served = self.config.model_name
        if name is not None and name != served:
            raise model_not_found(name, served)
        return served

    async def off_loop(self, num_characters: int, work: Callable[[], Value]) -> Value:
        """Run tokenizer work: here if it is short, else in a thread, so that running streams do not wait for it."""
        if num_characters <= INLINE_CHARACTERS:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    @contextmanager
    def open_request(self) -> Iterator[None]:
        """Count a request that draining has to wait for."""
        self.num_open_requests += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.num_open_requests -= 1
            if self.num_open_requests == 0:
                self._idle.set()

    async def wait_idle(self) -> None:
        """Wait until no request is open. A stream is counted anew when its handler is done, hence the loop."""
        while self.num_open_requests:
            await self._idle.wait()

    def close(self) -> None:
        """Free the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _serving_of(request: Request) -> Serving:
    return cast("Serving", request.app.state.serving)


ServingOfApp = Annotated[Serving, Depends(_serving_of)]


@asynccontextmanager
async def cancel_on_disconnect(receive: Receive, generation: Generation) -> AsyncIterator[None]:
    """End the generation as soon as its client leaves. `receive` is the request's, with its body read."""
    watcher = asyncio.create_task(_watch(receive, generation))
    try:
        yield
    finally:
        watcher.cancel()


async def _watch(receive: Callable[[], Awaitable[object]], generation: Generation) -> None:
    while cast("dict[str, str]", await receive())["type"] != "http.disconnect":
        pass
    generation.cancel()
