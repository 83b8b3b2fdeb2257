"""One container of a pod as a local process: started, probed, restarted with back-off, stopped in time."""

import asyncio
import contextlib
import datetime
import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guard import Guard, signal_group
from kube_client import Manifest
from pod_environment import ContainerConfigError
from probes import Probe, ProbeTarget, run_handler

logger = logging.getLogger(__name__)

# After this long without a crash, a container's next back-off starts from the base again (as in the kubelet).
_BACK_OFF_RESET_S = 600.0
_CONFIG_RETRY_S = 1.0
_TERMINATION_MESSAGE_BYTES = 4096
_FALLBACK_LOG_BYTES = 2048


@dataclass(frozen=True, slots=True)
class BackOff:
    """Seconds to wait before a restart: none at first, then `base_s`, doubling up to `limit_s`."""

    base_s: float = 10.0
    limit_s: float = 300.0

    def delay(self, num_crashes: int) -> float:
        return 0.0 if num_crashes < 2 else min(self.base_s * 2.0 ** (num_crashes - 2), self.limit_s)


@dataclass(frozen=True, slots=True)
class Launch:
    """Everything that it takes to start the process once."""

    command: list[str]
    environment: Mapping[str, str]
    folder: Path
    target: ProbeTarget


@dataclass(frozen=True, slots=True)
class ContainerSetting:
    """What a container knows of its pod and node."""

    restart_policy: str
    grace_s: float
    back_off: BackOff
    guard: Guard
    log: Path
    termination_log: Path
    prepare: Callable[[Manifest], Awaitable[Launch]]
    on_change: Callable[[], None]
    on_event: Callable[[str, str, str], None]


class Container:
    """Owns one process at a time. `run` ends when the container will not be started again."""

    def __init__(self, spec: Manifest, setting: ContainerSetting, restart_count: int = 0) -> None:
        self.spec = spec
        self.name: str = spec["name"]
        self.restart_count = restart_count
        self.state: Manifest = {"waiting": {"reason": "ContainerCreating"}}
        self.last_state: Manifest = {}
        self.is_ready = False
        self.is_started = False
        self.is_finished = False
        self.exit_code: int | None = None
        self._setting = setting
        self._process: asyncio.subprocess.Process | None = None
        self._process_id = 0
        self._launch: Launch | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._is_ending = False

    async def run(self) -> int:
        """Start the process, again and again as the restart policy says; return its last exit code."""
        num_crashes = 0
        while True:
            started = time.monotonic()
            self.exit_code = await self._run_once()
            num_crashes = 1 if time.monotonic() - started > _BACK_OFF_RESET_S else num_crashes + 1
            if self._is_ending or not self._restarts(self.exit_code):
                self.is_finished = True
                self._setting.on_change()
                return self.exit_code
            self.last_state = self.state
            await self._wait_before_restart(self._setting.back_off.delay(num_crashes))
            self.restart_count += 1

    async def end(self, grace_s: float) -> None:
        """Stop for good: the preStop hook, SIGTERM, and SIGKILL `grace_s` seconds after the start of it all."""
        self._is_ending = True
        await self._stop(grace_s)

    def kill(self) -> None:
        """Stop for good at once."""
        self._is_ending = True
        # Not by the id that the status still shows: that may be another process's by now.
        if self._process is not None:
            signal_group(self._process.pid, signal.SIGKILL)

    def status(self) -> Manifest:
        """The entry of containerStatuses."""
        return {
            "name": self.name,
            "image": self.spec.get("image", ""),
            "imageID": "",
            "containerID": f"process://{self._process_id}" if self._process_id else "",
            "ready": self.is_ready,
            "started": self.is_started,
            "restartCount": self.restart_count,
            "state": self.state,
            "lastState": self.last_state,
        }

    def _restarts(self, exit_code: int) -> bool:
        policy = self._setting.restart_policy
        return policy == "Always" or (policy == "OnFailure" and exit_code != 0)

    async def _run_once(self) -> int:
        launch = self._launch = await self._prepare()
        self._setting.termination_log.write_bytes(b"")
        started_at = timestamp()
        log_start = self._setting.log.stat().st_size if self._setting.log.exists() else 0
        try:
            process = await self._start_process(launch)
        except OSError as error:
            return self._terminated(128, started_at, "StartError", str(error))
        self._setting.guard.watch(process.pid)
        self._process, self._process_id = process, process.pid
        self.state = {"running": {"startedAt": started_at}}
        self._setting.on_event("Normal", "Started", f"Started container {self.name}")
        self._setting.on_change()
        tending = asyncio.create_task(self._tend(launch.target))
        try:
            return_code = await process.wait()
        finally:
            await self._bury(process, tending)
        exit_code = return_code if return_code >= 0 else 128 - return_code
        reason = "Completed" if exit_code == 0 else "Error"
        return self._terminated(exit_code, started_at, reason, self._message(exit_code, log_start))

    async def _prepare(self) -> Launch:
        """Wait until everything that the container refers to is there."""
        while True:
            try:
                return await self._setting.prepare(self.spec)
            except ContainerConfigError as error:
                self._set_waiting("CreateContainerConfigError", str(error))
            await asyncio.sleep(_CONFIG_RETRY_S)

    async def _start_process(self, launch: Launch) -> asyncio.subprocess.Process:
        with self._setting.log.open("ab") as log:
            return await asyncio.create_subprocess_exec(
                *launch.command,
                env=launch.environment,
                cwd=launch.folder,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    async def _bury(self, process: asyncio.subprocess.Process, tending: asyncio.Task[None]) -> None:
        """The main process is gone (or we are cancelled): nothing that it started may outlive it."""
        signal_group(process.pid, signal.SIGKILL)
        tending.cancel()
        (outcome,) = await asyncio.gather(tending, return_exceptions=True)
        if isinstance(outcome, Exception):
            logger.error("container=%s: probing failed", self.name, exc_info=outcome)
        if process.returncode is None:
            await process.wait()
        self._setting.guard.forget(process.pid)
        self._process = None
        self.is_ready = self.is_started = False

    async def _tend(self, target: ProbeTarget) -> None:
        """postStart, then the startup probe, then liveness and readiness side by side, until cancelled."""
        hook = self.spec.get("lifecycle", {}).get("postStart")
        if hook:
            outcome = await run_handler(hook, target, self._setting.grace_s)
            if not outcome.is_success:
                await self._fail("FailedPostStartHook", outcome.message, self._setting.grace_s)
        if "startupProbe" in self.spec:
            startup = self.spec["startupProbe"]
            await Probe(startup, target).until_success(self._killer("Startup", startup))
        self.is_started = True
        self.is_ready = "readinessProbe" not in self.spec
        self._setting.on_change()
        async with asyncio.TaskGroup() as group:
            if "livenessProbe" in self.spec:
                liveness = self.spec["livenessProbe"]
                group.create_task(Probe(liveness, target).run(self._killer("Liveness", liveness)))
            if "readinessProbe" in self.spec:
                group.create_task(Probe(self.spec["readinessProbe"], target).run(self._set_ready))

    def _killer(self, title: str, probe: Manifest) -> Callable[[bool, str], Awaitable[None]]:
        grace_s = probe.get("terminationGracePeriodSeconds", self._setting.grace_s)

        async def on_verdict(is_success: bool, message: str) -> None:
            if not is_success and not self._is_ending:
                self._setting.on_event("Warning", "Unhealthy", f"{title} probe failed: {message}")
                await self._fail("Killing", f"Container {self.name} failed {title.lower()} probe", grace_s)

        return on_verdict

    async def _fail(self, reason: str, message: str, grace_s: float) -> None:
        """Stop this start of the container; `run` decides about the next one."""
        self._setting.on_event("Warning" if reason != "Killing" else "Normal", reason, message)
        await self._stop(grace_s)
        # The process is gone, and whoever waits for it will cancel us.
        await asyncio.Event().wait()

    async def _set_ready(self, is_ready: bool, message: str) -> None:
        if not is_ready:
            self._setting.on_event("Warning", "Unhealthy", f"Readiness probe failed: {message}")
        if is_ready != self.is_ready:
            self.is_ready = is_ready
            self._setting.on_change()

    async def _stop(self, grace_s: float) -> None:
        """Stop the running process. A second caller waits for the first one's stop."""
        if self._process is None:
            return
        if self._stopping is None or self._stopping.done():
            self._stopping = asyncio.create_task(self._stop_process(self._process, grace_s))
        await asyncio.shield(self._stopping)

    async def _stop_process(self, process: asyncio.subprocess.Process, grace_s: float) -> None:
        deadline = time.monotonic() + grace_s
        hook = self.spec.get("lifecycle", {}).get("preStop")
        if hook and self._launch is not None and grace_s > 0:
            outcome = await run_handler(hook, self._launch.target, grace_s)
            if not outcome.is_success:
                self._setting.on_event("Warning", "FailedPreStopHook", outcome.message)
        # Only the main process hears SIGTERM, as in a container; what it started ends with it.
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                await process.wait()
        if process.returncode is None:
            signal_group(process.pid, signal.SIGKILL)
            await process.wait()

    async def _wait_before_restart(self, delay_s: float) -> None:
        if delay_s == 0.0:
            return
        message = f"back-off {delay_s:g}s restarting failed container={self.name}"
        self._setting.on_event("Warning", "BackOff", message)
        self._set_waiting("CrashLoopBackOff", message)
        await asyncio.sleep(delay_s)

    def _set_waiting(self, reason: str, message: str) -> None:
        waiting = {"waiting": {"reason": reason, "message": message}}
        if waiting != self.state:
            self.state = waiting
            self._setting.on_change()

    def _terminated(self, exit_code: int, started_at: str, reason: str, message: str) -> int:
        terminated: dict[str, Any] = {
            "exitCode": exit_code,
            "reason": reason,
            "startedAt": started_at,
            "finishedAt": timestamp(),
            "containerID": f"process://{self._process_id}",
        }
        if message:
            terminated["message"] = message
        if exit_code > 128 and reason == "Error":
            terminated["signal"] = exit_code - 128
        self.state = {"terminated": terminated}
        self._setting.on_change()
        return exit_code

    def _message(self, exit_code: int, log_start: int) -> str:
        """What the process wrote to its termination log, else (if asked for) the end of its output."""
        written = self._setting.termination_log.read_bytes()[-_TERMINATION_MESSAGE_BYTES:]
        falls_back = self.spec.get("terminationMessagePolicy") == "FallbackToLogsOnError"
        if not written and falls_back and exit_code != 0:
            written = _tail(self._setting.log, log_start)
        return written.decode(errors="replace")


def timestamp() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _tail(log: Path, start: int) -> bytes:
    with log.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(start, end - _FALLBACK_LOG_BYTES))
        return file.read()
