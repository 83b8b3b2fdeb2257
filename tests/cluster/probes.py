"""Probes and lifecycle hooks: one check of a container, and the counting that turns checks into a verdict."""

import asyncio
import contextlib
import logging
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import aiohttp
from guard import signal_group
from kube_client import Manifest

logger = logging.getLogger(__name__)

Check: TypeAlias = Callable[[], Awaitable["Outcome"]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one check: whether it passed, and what the event says if it did not."""

    is_success: bool
    message: str = ""


@dataclass(frozen=True, slots=True)
class ProbeTarget:
    """What the handlers of one running container need to know."""

    address: str
    ports: Mapping[str, int]
    environment: Mapping[str, str]
    folder: Path
    command_of: Callable[[Sequence[str]], list[str]]

    def port(self, port: int | str) -> int:
        if isinstance(port, int) or port.isdigit():
            return int(port)
        return self.ports[port]


async def run_handler(handler: Manifest, target: ProbeTarget, timeout_s: float) -> Outcome:
    """Run an httpGet, tcpSocket, exec or sleep handler once."""
    try:
        async with asyncio.timeout(timeout_s):
            if "httpGet" in handler:
                return await _http_get(handler["httpGet"], target)
            if "tcpSocket" in handler:
                return await _tcp_socket(handler["tcpSocket"], target)
            if "exec" in handler:
                return await _exec(handler["exec"]["command"], target)
            if "sleep" in handler:
                await asyncio.sleep(handler["sleep"]["seconds"])
                return Outcome(True)
    except TimeoutError:
        return Outcome(False, f"timed out after {timeout_s:g} s")
    except (OSError, aiohttp.ClientError) as error:
        return Outcome(False, str(error) or type(error).__name__)
    except KeyError as error:
        return Outcome(False, f"the container has no port named {error}")
    return Outcome(False, f"the process node has no {', '.join(handler)} handler")


class Probe:
    """Calls `on_verdict` each time that a probe's threshold is met: True for success, False for failure."""

    def __init__(self, spec: Manifest, target: ProbeTarget) -> None:
        self._spec = spec
        self._target = target

    async def run(self, on_verdict: Callable[[bool, str], Awaitable[None]]) -> None:
        """Probe until cancelled."""
        await asyncio.sleep(self._spec.get("initialDelaySeconds", 0))
        successes = failures = 0
        while True:
            outcome = await run_handler(self._spec, self._target, self._spec.get("timeoutSeconds", 1))
            successes = successes + 1 if outcome.is_success else 0
            failures = 0 if outcome.is_success else failures + 1
            if successes >= self._spec.get("successThreshold", 1):
                await on_verdict(True, "")
            if failures >= self._spec.get("failureThreshold", 3):
                await on_verdict(False, outcome.message)
            await asyncio.sleep(self._spec.get("periodSeconds", 10))

    async def until_success(self, on_failure: Callable[[bool, str], Awaitable[None]]) -> None:
        """Probe until the first success; `on_failure` hears of each failed threshold before it."""
        is_successful = asyncio.Event()

        async def verdict(is_success: bool, message: str) -> None:
            if is_success:
                is_successful.set()
            else:
                await on_failure(is_success, message)

        async with asyncio.TaskGroup() as group:
            probing = group.create_task(self.run(verdict))
            await is_successful.wait()
            probing.cancel()


async def _http_get(handler: Manifest, target: ProbeTarget) -> Outcome:
    host = handler.get("host") or target.address
    scheme = handler.get("scheme", "HTTP").lower()
    url = f"{scheme}://{host}:{target.port(handler['port'])}/{handler.get('path', '/').lstrip('/')}"
    headers = {header["name"]: header["value"] for header in handler.get("httpHeaders", ())}
    async with (
        aiohttp.ClientSession(headers={"User-Agent": "kube-probe/1.34", "Connection": "close"} | headers) as session,
        session.get(url, ssl=False, allow_redirects=False) as response,
    ):
        if 200 <= response.status < 400:
            return Outcome(True)
        return Outcome(False, f"HTTP probe failed with statuscode: {response.status}")


async def _tcp_socket(handler: Manifest, target: ProbeTarget) -> Outcome:
    _, writer = await asyncio.open_connection(handler.get("host") or target.address, target.port(handler["port"]))
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return Outcome(True)


async def _exec(command: Sequence[str], target: ProbeTarget) -> Outcome:
    process = await asyncio.create_subprocess_exec(
        *target.command_of(command),
        env=target.environment,
        cwd=target.folder,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = await process.communicate()
    finally:
        signal_group(process.pid, signal.SIGKILL)
        if process.returncode is None:
            await process.wait()
    return Outcome(process.returncode == 0, output.decode(errors="replace")[-500:].strip())
