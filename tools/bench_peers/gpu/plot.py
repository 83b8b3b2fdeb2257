"""Draws what the offline comparison on a GPU came to: how near each engine came to the roofline.

    python tools/bench_peers/gpu/plot.py results.jsonl FOLDER

reads the comparison's lines and writes FOLDER/gpu-MODEL.svg for each model in them. An engine that was measured more
than once for a workload, with other settings or in another order, is shown at its best.
"""

import json
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from octavo_engine.bench.plots import plot_percentages

_TITLES = {"llama8b": "LLaMA 3.1 8B shape", "llama1b": "LLaMA 3.2 1B shape"}
_ENGINES = {"Octavo": "octavo", "vLLM 0.26.0": "vllm", "SGLang 0.5.17": "sglang"}


def main(results: Path, folder: Path) -> None:
    """One plot a model."""
    rows = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if "pct_serial" in row]
    for model in sorted({row["model"] for row in rows}):
        of_model = [row for row in rows if row["model"] == model]
        groups = sorted({row["workload"] for row in of_model})
        series = {label: [_best(of_model, engine, group) for group in groups] for label, engine in _ENGINES.items()}
        series = {label: values for label, values in series.items() if not all(map(math.isnan, values))}
        what = {row["workload"]: f"{row['workload']}: {row['n']} x {row['inp']}/{row['out']}" for row in of_model}
        title = f"{_TITLES.get(model, model)}, bfloat16, offline, one H100"
        labels = [what[group] for group in groups]
        plot_percentages(folder / f"gpu-{model}.svg", labels, series, "percent of the serial roofline", title)


def _best(rows: Iterable[Mapping[str, Any]], engine: str, workload: str) -> float:
    values = [
        float(row["pct_serial"])
        for row in rows
        if row["workload"] == workload and engine in row["engine"].lower().rpartition(".")[2]
    ]
    return max(values, default=math.nan)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
