"""How the engine's start-up looks: a progress bar on a terminal, log lines elsewhere."""

import asyncio
import logging
import sys
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

from octavo_engine.async_engine import AsyncEngine
from octavo_engine.protocol import EnginePhase

logger = logging.getLogger(__name__)

POLL_S: Final = 0.1
LOGGED_FRACTION: Final = 0.25
TITLES: Final = {
    "starting": "Starting", "downloading": "Downloading", "loading": "Loading weights", "warming_up": "Warming up",
    "ready": "Ready",
}  # fmt: skip


async def show_start_up(engine: AsyncEngine) -> None:
    """Show how far the engine is until it is ready; cancel it to end earlier."""
    if sys.stderr.isatty():
        await _show_bar(engine)
    else:
        await _log(engine)


async def _show_bar(engine: AsyncEngine) -> None:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[message]}", style="dim"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(TITLES["starting"], total=1.0, message="")
        while engine.ready is None:
            phase = engine.phase
            progress.update(task, description=TITLES[phase.phase], completed=phase.fraction, message=phase.message)
            await asyncio.sleep(POLL_S)


async def _log(engine: AsyncEngine) -> None:
    logged: EnginePhase | None = None
    while engine.ready is None:
        phase = engine.phase
        if logged is None or phase.phase != logged.phase or phase.fraction - logged.fraction >= LOGGED_FRACTION:
            logged = phase
            logger.info("%s: %.0f %% %s", TITLES[phase.phase], phase.fraction * 100, phase.message)
        await asyncio.sleep(POLL_S)
