"""Draws results as SVG files that change only when the figures do."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from octavo_engine.bench.allocation import AllocationResult
from octavo_engine.bench.batching import BatchingResult

_OURS, _BASELINE, _FORESIGHT = "#1b6ca8", "#c4572e", "#8a8a8a"


def plot_allocation(
    path: Path, blocks: AllocationResult, reserved: AllocationResult, foreseen: AllocationResult, title: str
) -> None:
    """Requests in the cache over the steps of the engine, until no request waits any more."""
    figure, axes = _figure()
    for result, colour, label in (
        (blocks, _OURS, "blocks on demand (Octavo)"),
        (foreseen, _FORESIGHT, "reservation of the final length (an oracle)"),
        (reserved, _BASELINE, "reservation of the maximum length"),
    ):
        running = [each.num_running for each in result.timeline if each.num_waiting]
        label = f"{label}: mean {result.mean_running:.0f}, {result.wasted_share:.1%} wasted"
        axes.plot(range(len(running)), running, color=colour, label=label)
    axes.set_xlim(0, sum(bool(each.num_waiting) for each in foreseen.timeline))
    axes.set_ylim(0, None)
    axes.set_xlabel("steps of the engine while requests wait")
    axes.set_ylabel("requests running at once")
    _save(figure, axes, path, title)


def plot_batching(
    path: Path, continuous: BatchingResult, padded: BatchingResult, shrinking: BatchingResult, title: str
) -> None:
    """A point per request: the length of its answer against how long it took in the batch."""
    figure, axes = _figure()
    for result, colour, label in (
        (padded, _BASELINE, "static, padded"),
        (shrinking, _FORESIGHT, "static, shrinking"),
        (continuous, _OURS, "continuous (Octavo)"),
    ):
        axes.scatter(
            [each.num_output_tokens for each in result.served],
            [each.latency_s for each in result.served],
            s=18,
            alpha=0.75,
            color=colour,
            label=f"{label}: {result.output_tokens_per_s:.0f} output tokens/s",
        )
    axes.set_xlim(0, None)
    axes.set_ylim(0, math.ceil(max(each.latency_s for each in padded.served + continuous.served) * 1.05))
    axes.set_xlabel("tokens of the answer")
    axes.set_ylabel("seconds from start to answer")
    _save(figure, axes, path, title)


def plot_percentages(
    path: Path, groups: Sequence[str], series: Mapping[str, Sequence[float]], ylabel: str, title: str
) -> None:
    """Bars side by side, with their values above them. series: label -> a value for each group; NaN: no bar."""
    figure, axes = _figure()
    width = 0.8 / len(series)
    for index, (label, values) in enumerate(series.items()):
        places = [group + (index - (len(series) - 1) / 2) * width for group in range(len(groups))]
        bars = axes.bar(places, values, width * 0.92, label=label, color=(_OURS, _BASELINE, _FORESIGHT)[index % 3])
        axes.bar_label(bars, ["" if math.isnan(value) else f"{value:.0f}" for value in values], fontsize=8, padding=1)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylim(0, 105)
    axes.set_ylabel(ylabel)
    _save(figure, axes, path, title)


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.8), layout="constrained")
    return figure, figure.subplots()


def _save(figure: Any, axes: Any, path: Path, title: str) -> None:
    """Write without date and with fixed ids, so that equal figures make equal files."""
    import matplotlib

    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "octavo", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(path, format="svg", metadata={"Date": None}, facecolor="white")
