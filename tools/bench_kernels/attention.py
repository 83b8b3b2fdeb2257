"""Checks and times paged attention on one GPU: TB/s of keys and values for decodes, TFLOP/s for chunks.

    PYTHONPATH=kernels python3 tools/bench_kernels/attention.py [--sweep] [--only decode|prefill] [--float8]

Each batch is checked against float32 on some of its rows, then timed: the median over replays of a CUDA graph that goes
through layers of one cache, laid out as the engine's, large enough together that the L2 cache is of no help. Bytes are
those of the keys and values that are seen, operations those of the scores and weights that are not masked.
`--sweep` tries other launch parameters and ranks them by the geometric mean of their gains over the shipped ones.
`--dry-run` does it all on a CPU in Triton's interpreter, with tiny batches and meaningless times.
"""
# mypy: disable-error-code="no-untyped-call"

import argparse
import itertools
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

if "--dry-run" in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
from octavo_kernels.launch import variant_of
from octavo_kernels.ops import paged_decode, paged_prefill
from octavo_kernels.ops.attention_metadata import AttentionMetadata, Scoring
from triton import OutOfResources

_BLOCK_SIZE: Final = 16
# Layers together hold several times the L2 cache, and a graph has enough calls for launching it not to count.
_CACHE_BYTES: Final = 512 << 20
_MAX_LAYERS: Final = 32
_NUM_REPLAYS: Final = 7
_TOLERANCE: Final = 2e-2
_CHECKED_SEQS, _CHECKED_ROWS = 6, 16

Launch = paged_decode.Launch | paged_prefill.Launch

DECODE_LAUNCHES: Final = tuple(
    paged_decode.Launch(tile_bytes, min_tiles, workers, num_warps=4, num_stages=num_stages)
    for (tile_bytes, num_stages, workers), min_tiles in itertools.product(
        ((16_384, 3, 2), (16_384, 4, 2), (8_192, 4, 2), (8_192, 5, 2), (32_768, 3, 1), (16_384, 5, 1)), (1, 2, 4)
    )
)
PREFILL_LAUNCHES: Final = (
    paged_prefill.Launch(128, 16_384, num_warps=8, num_stages=3),
    paged_prefill.Launch(128, 16_384, num_warps=8, num_stages=2),
    paged_prefill.Launch(128, 32_768, num_warps=8, num_stages=2),
    paged_prefill.Launch(128, 8_192, num_warps=4, num_stages=3),
    paged_prefill.Launch(64, 16_384, num_warps=4, num_stages=2),
    paged_prefill.Launch(64, 16_384, num_warps=4, num_stages=3),
    paged_prefill.Launch(64, 8_192, num_warps=4, num_stages=3),
)


@dataclass(frozen=True, slots=True)
class Shape:
    """Heads of a model."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Requests of a step, either all decodes or all chunks."""

    name: str
    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]

    @property
    def is_decode(self) -> bool:
        """Whether each request has one query token."""
        return max(self.query_lens) == 1


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """A batch with its tensors. cache: [num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim]."""

    batch: Batch
    shape: Shape
    query: torch.Tensor
    cache: torch.Tensor
    metadata: AttentionMetadata
    scoring: Scoring


SHAPES: Final = (Shape(32, 8, 128), Shape(32, 8, 64))


def decode_batches(*, tiny: bool) -> list[Batch]:
    """Uniform batches from one short request to many, and one of very mixed lengths."""
    if tiny:
        return [Batch("decode 3 mixed", (1,) * 3, (1, 40, 300))]
    random = torch.Generator().manual_seed(0)
    mixed = (1024 * 64 ** torch.rand(32, generator=random)).int().tolist()
    uniform = ((1, 1024), (1, 8192), (8, 32_768), (64, 4096), (256, 300))
    batches = [Batch(f"decode {count} x {context}", (1,) * count, (context,) * count) for count, context in uniform]
    return [*batches, Batch("decode 32 x 1k..64k", (1,) * 32, tuple(mixed))]


def prefill_batches(*, tiny: bool) -> list[Batch]:
    """Long prompts, several prompts, chunks behind a cached prefix, short prompts."""
    if tiny:
        return [Batch("prefill 2 + prefix", (40, 5), (40, 90))]
    sizes = ((1, 8192, 0), (4, 2048, 0), (8, 512, 2048), (32, 64, 0))
    return [
        Batch(f"prefill {count} x {chunk}" + f" + {prefix}" * bool(prefix), (chunk,) * count, (chunk + prefix,) * count)
        for count, chunk, prefix in sizes
    ]


def make_example(batch: Batch, shape: Shape, cache_dtype: torch.dtype, device: torch.device) -> Example:
    """Random queries and a random cache whose blocks lie scattered."""
    num_blocks_of = [-(-context // _BLOCK_SIZE) for context in batch.context_lens]
    tables = torch.zeros(len(num_blocks_of), max(num_blocks_of), dtype=torch.int64)
    free = torch.randperm(sum(num_blocks_of))
    for seq, count in enumerate(num_blocks_of):
        tables[seq, :count], free = free[:count], free[count:]
    layer_shape = (2, _BLOCK_SIZE, shape.num_kv_heads, shape.head_dim)
    layer_bytes = sum(num_blocks_of) * math.prod(layer_shape) * cache_dtype.itemsize
    num_layers = min(-(-_CACHE_BYTES // layer_bytes), _MAX_LAYERS) if device.type == "cuda" else 2
    cache = torch.empty(sum(num_blocks_of), num_layers, *layer_shape, dtype=cache_dtype, device=device)
    for layer in cache.unbind(1):
        layer.copy_(torch.randn(layer.shape, dtype=torch.bfloat16, device=device))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    query = torch.randn(sum(batch.query_lens), shape.num_heads, shape.head_dim, dtype=dtype, device=device)
    metadata = AttentionMetadata(
        block_tables=tables.to(device),
        seq_lens=torch.tensor(batch.context_lens, device=device),
        query_start_loc=torch.tensor([0, *batch.query_lens], device=device).cumsum(0),
        slot_mapping=torch.empty(0, dtype=torch.int64, device=device),
        num_decodes=len(batch.query_lens) if batch.is_decode else 0,
        query_lens=batch.query_lens,
        context_lens=batch.context_lens,
    )
    return Example(batch, shape, query, cache, metadata, Scoring(shape.head_dim**-0.5))


def runner(example: Example, launch: Launch) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """Attention of one layer, (output, cache layer), over a plan made once."""
    layer, dtype = example.cache[:, 0], example.query.dtype
    if isinstance(launch, paged_decode.Launch):
        decodes = paged_decode.plan_decodes(example.metadata, layer, dtype, launch=launch)
        return lambda output, cache: paged_decode.run_decodes(output, example.query, cache, decodes, example.scoring)
    chunks = paged_prefill.plan_chunks(example.metadata, layer, dtype, launch=launch)
    return lambda output, cache: paged_prefill.run_chunks(output, example.query, cache, chunks, example.scoring)


def largest_error(example: Example, run: Callable[[torch.Tensor, torch.Tensor], None]) -> float:
    """Against attention in float32, over some rows of some requests and the last layer."""
    layer = example.cache[:, -1]
    output = torch.full_like(example.query, torch.nan)
    run(output, layer)
    errors: list[float] = []
    starts = example.metadata.query_start_loc.tolist()
    num_seqs = len(example.batch.query_lens)
    for seq in sorted({round(seq) for seq in torch.linspace(0, num_seqs - 1, _CHECKED_SEQS).tolist()}):
        query_len, context = example.batch.query_lens[seq], example.batch.context_lens[seq]
        indices = torch.linspace(0, query_len - 1, min(query_len, _CHECKED_ROWS)).long().to(layer.device)
        rows = starts[seq] + indices
        expected = _attend_in_float32(example, layer, seq, rows, context - query_len + indices)
        errors.append((output[rows].float() - expected).abs().max().item())
    # The maximum of NaN and a number depends on their order.
    return math.inf if any(map(math.isnan, errors)) else max(errors)


def _attend_in_float32(
    example: Example, layer: torch.Tensor, seq: int, rows: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """[num_rows, num_heads, head_dim] for rows of one request at these positions of its context."""
    shape, context = example.shape, example.batch.context_lens[seq]
    tokens = torch.arange(context, device=layer.device)
    blocks = example.metadata.block_tables[seq, tokens // _BLOCK_SIZE]
    keys, values = layer[blocks, :, tokens % _BLOCK_SIZE].float().unbind(1)
    queries = example.query[rows].float().view(len(rows), shape.num_kv_heads, -1, shape.head_dim)
    scores = torch.einsum("qhgd,khd->hgqk", queries, keys) * example.scoring.scale
    scores = scores.masked_fill(tokens > positions[:, None], -torch.inf)
    output = torch.einsum("hgqk,khd->qhgd", torch.softmax(scores, dim=-1), values)
    return output.reshape(len(rows), shape.num_heads, shape.head_dim)


def seconds_per_call(example: Example, run: Callable[[torch.Tensor, torch.Tensor], None]) -> float:
    """Of one layer."""
    layers = example.cache.unbind(1)
    output = torch.empty_like(example.query)
    if example.query.device.type != "cuda":
        start = time.perf_counter()
        for layer in layers:
            run(output, layer)
        return (time.perf_counter() - start) / len(layers)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in layers:
            run(output, layer)
    graph.replay()
    times: list[float] = []
    for _ in range(_NUM_REPLAYS):
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start_event.record()
        graph.replay()
        end_event.record()
        end_event.synchronize()
        times.append(start_event.elapsed_time(end_event) / 1000 / len(layers))
    return statistics.median(times)


def speed(example: Example, seconds: float) -> str:
    """TB/s of keys and values read by decodes, TFLOP/s of chunks."""
    batch, shape = example.batch, example.shape
    if batch.is_decode:
        row_bytes = 2 * shape.num_kv_heads * shape.head_dim * example.cache.element_size()
        return f"{sum(batch.context_lens) * row_bytes / seconds / 1e12:7.3f} TB/s"
    pairs = sum(
        query_len * context - query_len * (query_len - 1) // 2
        for query_len, context in zip(batch.query_lens, batch.context_lens, strict=True)
    )
    return f"{4 * pairs * shape.num_heads * shape.head_dim / seconds / 1e12:7.1f} TFLOP/s"


def measure(example: Example, launch: Launch) -> float | None:
    """Print a row and return seconds of one call; None if the kernel does not fit or is wrong."""
    try:
        run = runner(example, launch)
        error = largest_error(example, run)
        seconds = seconds_per_call(example, run)
    except OutOfResources as reason:
        print(f"{'':24}  does not fit: {launch}: {reason}", flush=True)
        return None
    shape = example.shape
    title = f"{example.batch.name} ({shape.num_heads}/{shape.num_kv_heads}/{shape.head_dim})"
    verdict = "" if error < _TOLERANCE else "  WRONG"
    print(
        f"{title:36} {seconds * 1e6:9.1f} us {speed(example, seconds)}  error {error:.1e}{verdict}  {launch}",
        flush=True,
    )
    return None if verdict else seconds


def sweep(examples: Sequence[Example], shipped: Launch, others: Sequence[Launch]) -> None:
    """Measure all launch parameters, then print them from best to worst."""
    baseline = [measure(example, shipped) for example in examples]
    gains: dict[Launch, float] = {}
    for launch in others:
        times = [measure(example, launch) for example in examples]
        pairs = [(before, after) for before, after in zip(baseline, times, strict=True) if before and after]
        if len(pairs) == len(examples):
            gains[launch] = statistics.geometric_mean(before / after for before, after in pairs)
    for launch, gain in sorted(gains.items(), key=lambda item: -item[1]):
        print(f"{gain:6.3f} x the shipped speed: {launch}")


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("decode", "prefill"))
    parser.add_argument("--float8", action="store_true", help="an 8-bit cache instead of a bfloat16 one")
    parser.add_argument("--sweep", action="store_true", help="try other launch parameters")
    parser.add_argument("--dry-run", action="store_true", help="tiny batches on the CPU, in Triton's interpreter")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cpu" if arguments.dry_run else "cuda")
    cache_dtype = torch.float8_e4m3fn if arguments.float8 else torch.bfloat16
    shapes = (Shape(4, 1, 16),) if arguments.dry_run else SHAPES
    print(
        f"{'CPU' if arguments.dry_run else torch.cuda.get_device_name()}, torch {torch.__version__}, "
        f"{cache_dtype} cache"
    )
    variant = variant_of(device)
    for kind, shape in itertools.product(("decode", "prefill"), shapes):
        if arguments.only in (None, kind):
            shipped: Launch
            others: Sequence[Launch]
            if kind == "decode":
                batches, others = decode_batches(tiny=arguments.dry_run), DECODE_LAUNCHES
                shipped = paged_decode.LAUNCH[variant]
            else:
                batches, others = prefill_batches(tiny=arguments.dry_run), PREFILL_LAUNCHES
                shipped = paged_prefill.launch_for(variant, shape.head_dim)
            examples = [make_example(batch, shape, cache_dtype, device) for batch in batches]
            if arguments.sweep:
                sweep(examples, shipped, others)
            else:
                for example in examples:
                    measure(example, shipped)


if __name__ == "__main__":
    main()
