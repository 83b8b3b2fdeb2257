"""Reach a Service of the test cluster from this machine: what kube-proxy or `kubectl port-forward` would do.

Listens on loopback and pipes each connection to a Ready pod that the Service selects, one after the other.

    python tests/cluster/forward.py --kubeconfig FILE --namespace NAME SERVICE [--port 8000] [--listen 18000]
"""

import argparse
import asyncio
import contextlib
import itertools
import logging
import signal
import threading
import time
from pathlib import Path
from typing import Self

from addresses import reachable_address
from kube_client import UNREACHABLE, ApiError, KubeClient, Manifest
from loop_thread import LoopThread

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 16
# Endpoints are looked up anew after this long, and at once when one of them refuses a connection.
_LOOKUP_VALID_S = 0.5


class Endpoints:
    """The reachable addresses behind one port of a Service."""

    def __init__(self, client: KubeClient, namespace: str, service: str, port: int | str | None) -> None:
        self._client = client
        self._namespace = namespace
        self._service = service
        self._port = port
        self._found: list[tuple[str, int]] = []
        self._found_at = float("-inf")
        self._turn = itertools.count()

    async def in_turn(self) -> list[tuple[str, int]]:
        """All of them, each time starting with the next one."""
        if time.monotonic() - self._found_at > _LOOKUP_VALID_S:
            self._found = await self._look_up()
            self._found_at = time.monotonic()
        if not self._found:
            return []
        first = next(self._turn) % len(self._found)
        return self._found[first:] + self._found[:first]

    def doubt(self) -> None:
        self._found_at = float("-inf")

    async def _look_up(self) -> list[tuple[str, int]]:
        path = f"/api/v1/namespaces/{self._namespace}"
        service = await self._client.get(f"{path}/services/{self._service}")
        selector = ",".join(f"{key}={value}" for key, value in service["spec"].get("selector", {}).items())
        pods = await self._client.get(f"{path}/pods", labelSelector=selector)
        target = _target_port(service, self._port)
        return [
            (reachable_address(pod["status"]["podIP"]), number)
            for pod in sorted(pods["items"], key=lambda pod: str(pod["metadata"]["name"]))
            if _is_ready(pod) and (number := _port_number(pod, target)) is not None
        ]


class Forward:
    """Listens from `start` to `stop`, on a thread of its own; `port` is where.

    `service_port` is a number or name of the Service's ports, the first one if not given.
    """

    def __init__(
        self,
        service: str,
        namespace: str,
        kubeconfig: Path,
        *,
        service_port: int | str | None = None,
        listen_port: int = 0,
    ) -> None:
        self.port = listen_port
        self._client = KubeClient(kubeconfig)
        self._endpoints = Endpoints(self._client, namespace, service, service_port)
        self._connections: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._loop = LoopThread("forward")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self._loop.start()
        self._loop.run(self._listen())

    def stop(self) -> None:
        self._loop.run(self._close())
        self._loop.stop()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    async def _listen(self) -> None:
        await self._client.__aenter__()
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        self._server.close()
        connections = dict(self._connections)
        for connection, writer in connections.items():
            writer.transport.abort()  # also of one whose task has not run yet, or whose caller reads nothing
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)
        await self._client.__aexit__()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._connections[task] = writer
        task.add_done_callback(self._connections.pop)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            upstream = await self._connect()
            if upstream is not None:
                await _pipe_both(reader, writer, *upstream)
        finally:
            await _close(writer)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        """A connection to a Ready pod; None if there is none, upon which the caller's is closed."""
        try:
            endpoints = await self._endpoints.in_turn()
        except (ApiError, *UNREACHABLE) as error:
            logger.warning("endpoints cannot be looked up: %s", error)
            return None
        for address, port in endpoints:
            try:
                return await asyncio.open_connection(address, port)
            except OSError as error:
                logger.debug("%s:%d: %s", address, port, error)
                self._endpoints.doubt()
        logger.debug("no ready pod takes connections")
        return None


async def _pipe_both(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    upstream_reader: asyncio.StreamReader,
    upstream_writer: asyncio.StreamWriter,
) -> None:
    """Pipe until either side is done; a caller that leaves closes the pod's connection, too.

    A caller that closes only its sending half counts as gone: TCP shows no difference, HTTP clients do not do
    it, and an engine must learn at once that nobody reads its stream.
    """
    pipes = [
        asyncio.create_task(_pipe(reader, upstream_writer)),
        asyncio.create_task(_pipe(upstream_reader, writer)),
    ]
    try:
        await asyncio.wait(pipes, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for pipe in pipes:
            pipe.cancel()
        await asyncio.gather(*pipes, return_exceptions=True)
        await _close(upstream_writer)


async def _pipe(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while chunk := await source.read(_CHUNK_BYTES):
            sink.write(chunk)
            await sink.drain()


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


def _target_port(service: Manifest, wanted: int | str | None) -> int | str:
    ports = service["spec"]["ports"]
    for port in ports:
        if wanted in {None, port["port"], port.get("name")}:
            target: int | str = port.get("targetPort", port["port"])
            return target
    raise ApiError(404, f"service {service['metadata']['name']} has no port {wanted}")


def _port_number(pod: Manifest, target: int | str) -> int | None:
    if isinstance(target, int):
        return target
    for container in pod["spec"]["containers"]:
        for port in container.get("ports", ()):
            if port.get("name") == target:
                return int(port["containerPort"])
    return None


def _is_ready(pod: Manifest) -> bool:
    if "deletionTimestamp" in pod["metadata"] or not pod.get("status", {}).get("podIP"):
        return False
    conditions = pod["status"].get("conditions", ())
    return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)


def main() -> None:
    parser = argparse.ArgumentParser(description="Forward a loopback port to the Ready pods of a Service.")
    parser.add_argument("service")
    parser.add_argument("--namespace", "-n", default="default")
    parser.add_argument("--kubeconfig", type=Path, required=True)
    parser.add_argument("--port", help="port of the Service, by number or name; its first one by default")
    parser.add_argument("--listen", type=int, default=0, help="port to listen on; a free one by default")
    options = parser.parse_args()
    port = int(options.port) if options.port and options.port.isdigit() else options.port
    is_over = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: is_over.set())
    with Forward(
        options.service, options.namespace, options.kubeconfig, service_port=port, listen_port=options.listen
    ) as forward:
        print(f"{forward.url} -> service {options.namespace}/{options.service}", flush=True)
        is_over.wait()


if __name__ == "__main__":
    main()
