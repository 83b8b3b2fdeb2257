"""A server's life: listen, load, serve, drain, end.

HTTP answers first, so that probes work while the model loads. SIGTERM or SIGINT drains; a second one ends at once. The
engine's death ends the server after every request has its answer.
"""

import asyncio
import gc
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import uvicorn
import uvloop

from octavo_engine.async_engine import AsyncEngine
from octavo_engine.config import EngineConfig
from octavo_engine.engine_process import DEFAULT_CORE
from octavo_engine.errors import ConfigError, EngineDeadError, OctavoError
from octavo_engine.protocol import EnginePhase
from octavo_engine.server.app import create_app
from octavo_engine.server.metrics import Metrics
from octavo_engine.server.nodes import make_node
from octavo_engine.server.progress import show_start_up
from octavo_engine.server.serving import Serving
from octavo_engine.server.text import Tokenizer

logger = logging.getLogger(__name__)

# How long answers that are already decided may take to reach their clients.
ANSWER_S: Final = 2
BACKLOG: Final = 2048
# Longer than the idle time of the usual gateways, so that it is they who close a connection.
KEEP_ALIVE_S: Final = 75
SIGNAL_EXIT: Final = 128

TokenizerLoader = Callable[[EngineConfig], Tokenizer]


def load_model_tokenizer(config: EngineConfig) -> Tokenizer:
    """The tokenizer of the configured model."""
    from octavo_engine.loading.tokenizer import load_tokenizer
    from octavo_engine.model_source import resolve_model

    template = Path(config.chat_template) if config.chat_template else None
    return load_tokenizer(resolve_model(config.model), template)


def run_server(
    config: EngineConfig, *, core: str = DEFAULT_CORE, load_tokenizer: TokenizerLoader = load_model_tokenizer
) -> int:
    """Serve until told to stop; the process's exit code. Raises OctavoError where the user can mend it."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_Life(config, core, load_tokenizer).run())


class _HttpServer(uvicorn.Server):
    """Uvicorn without its signal handlers: draining is this module's affair."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone."""
        yield


class _Life:
    """One server from start to end."""

    def __init__(self, config: EngineConfig, core: str, load_tokenizer: TokenizerLoader) -> None:
        self._config = config
        self._load_tokenizer = load_tokenizer
        metrics = Metrics(config.model_name)
        self._engine = AsyncEngine(config, core=core, observer=metrics)
        metrics.watch(self._engine)
        self._serving = Serving(config, self._engine, metrics)
        self._node = make_node(config, self._engine.give_up, self._report_wait)
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._last_signal = 0

    async def run(self) -> int:
        """The whole life; the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        listener = listen(self._config.host, self._config.port)
        host, port = listener.getsockname()[:2]
        logger.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
        http = self._http_server()
        serving = asyncio.create_task(http.serve(sockets=[listener]))
        try:
            return await self._until_end()
        finally:
            http.should_exit = True
            http.force_exit = self._hurry.is_set()
            await serving
            await self._node.close(self._engine.failure.message if self._engine.failure else None)
            await self._engine.close()
            self._serving.close()

    def _http_server(self) -> _HttpServer:
        return _HttpServer(
            uvicorn.Config(
                create_app(self._serving),
                http="httptools",
                ws="none",
                lifespan="off",
                access_log=self._config.log_level == "debug",
                log_config=None,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=ANSWER_S,
                backlog=BACKLOG,
            )
        )

    async def _until_end(self) -> int:
        start_up = asyncio.create_task(self._start_up())
        stop = asyncio.create_task(self._stop.wait())
        dead = asyncio.create_task(self._engine.wait_dead())
        ended = asyncio.create_task(self._node.wait_end())
        try:
            done, _ = await asyncio.wait({start_up, stop, dead, ended}, return_when=asyncio.FIRST_COMPLETED)
            if start_up in done:
                await start_up
                await asyncio.wait({stop, dead, ended}, return_when=asyncio.FIRST_COMPLETED)
            if stop.done() and self._config.node_rank and self._engine.pids:
                # Node 0 drains, and needs this node's ranks until it is done.
                await asyncio.wait({dead, ended}, timeout=self._config.drain_timeout_s)
            return await (self._drain() if stop.done() or ended.done() else self._mourn())
        finally:
            for task in (start_up, stop, dead, ended):
                task.cancel()

    async def _start_up(self) -> None:
        progress = asyncio.create_task(show_start_up(self._engine))
        try:
            self._engine.start(await self._node.meet())
            if self._config.node_rank == 0:
                tokenizer = await _in_daemon_thread(lambda: self._load_tokenizer(self._config))
                self._serving.use_tokenizer(tokenizer)
            await self._engine.wait_ready()
        except EngineDeadError:
            return  # `wait_dead` tells the same, and `_mourn` says it
        finally:
            progress.cancel()
        # What start-up made lives as long as the process: later collections need not look at it.
        gc.collect()
        gc.freeze()
        phases = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self._engine.phase_seconds().items())
        logger.info(
            "model=%s is ready after %.1f s (%s)", self._config.model_name, self._engine.startup_elapsed_s(), phases
        )

    def _report_wait(self, message: str) -> None:
        self._engine.enter_phase(EnginePhase("starting", message=message))

    async def _mourn(self) -> int:
        """The engine is dead: let every request have its answer, and say why."""
        failure = self._engine.failure
        await self._node.close(failure.message if failure else None)
        await self._wait_for_answers(ANSWER_S)
        if failure is not None and failure.is_user_error:
            raise OctavoError(failure.message)
        logger.error("the engine died: %s", failure.message if failure else "it left no word")
        return 1

    async def _drain(self) -> int:
        """Let running requests finish, for as long as the configuration gives them."""
        logger.info("draining: %d requests are open", self._serving.num_open_requests)
        await self._wait_for_answers(self._config.drain_timeout_s)
        if self._serving.num_open_requests:
            logger.warning("ending %d requests that are not finished", self._serving.num_open_requests)
            self._engine.abort_all("the server is shutting down")
            await self._wait_for_answers(ANSWER_S)
        return SIGNAL_EXIT + self._last_signal if self._hurry.is_set() else 0

    async def _wait_for_answers(self, timeout_s: float) -> None:
        """Until no request is open, time is up, or a second signal says to hurry."""
        waits = {asyncio.create_task(self._serving.wait_idle()), asyncio.create_task(self._hurry.wait())}
        await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()

    def _on_signal(self, number: int) -> None:
        self._last_signal = number
        self._serving.is_draining = True
        (self._hurry if self._stop.is_set() else self._stop).set()


async def _in_daemon_thread(load: Callable[[], Tokenizer]) -> Tokenizer:
    """`asyncio.to_thread` with a thread that the process's end does not wait for: it may download for an hour."""
    future: Future[Tokenizer] = Future()

    def run() -> None:
        future.set_running_or_notify_cancel()
        try:
            future.set_result(load())
        except Exception as error:  # noqa: BLE001 - whoever waits gets it
            future.set_exception(error)

    threading.Thread(target=run, name="tokenizer", daemon=True).start()
    return await asyncio.wrap_future(future)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ConfigError where the address is wrong or taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None
    listener.setblocking(False)
    return listener
