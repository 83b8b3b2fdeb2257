"""The operator's HTTP side: /healthz, /readyz, /metrics."""

import os
from collections.abc import Callable

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from octavo_operator.errors import OperatorError

# Empty while all is well, else what is wrong, in a sentence.
Check = Callable[[], str]


async def serve_probes(
    host: str, port: int, registry: CollectorRegistry, is_healthy: Check, is_ready: Check
) -> tuple[web.AppRunner, int]:
    """Start listening. Returns what to clean up, and the port, which the system chose if `port` is 0.

    Raises OperatorError if the port cannot be had.
    """

    def probe(check: Check) -> Callable[[web.Request], object]:
        async def answer(_: web.Request) -> web.Response:
            problem = check()
            return web.Response(text=f"{problem or 'ok'}\n", status=503 if problem else 200)

        return answer

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application()
    app.router.add_get("/healthz", probe(is_healthy))  # type: ignore[arg-type]
    app.router.add_get("/readyz", probe(is_ready))  # type: ignore[arg-type]
    app.router.add_get("/metrics", metrics)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as error:
        await runner.cleanup()
        raise OperatorError(f"cannot listen on {host}:{port}: {os.strerror(error.errno or 0)}") from None
    return runner, int(runner.addresses[0][1])
