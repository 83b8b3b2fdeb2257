"""Batches to tune attention on, with their tensors, and what their output should be.

The cache is laid out as the engine's, its blocks scattered; on a GPU it has as many layers as it takes to be several
times the L2 cache.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

from octavo_kernels.ops.attention_metadata import AttentionMetadata, Scoring
from octavo_kernels.tuning.targets import Heads

_BLOCK_SIZE: Final = 16
_CACHE_BYTES: Final = 512 << 20
_MAX_LAYERS: Final = 32
_CHECKED_SEQS, _CHECKED_ROWS = 6, 16


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
    heads: Heads
    query: torch.Tensor
    cache: torch.Tensor
    metadata: AttentionMetadata
    scoring: Scoring


# (output, cache layer): attention of one layer over a plan made before.
Run = Callable[[torch.Tensor, torch.Tensor], None]


def decode_batches() -> list[Batch]:
    """Uniform batches from one short request to many, and one of very mixed lengths."""
    random = torch.Generator().manual_seed(0)
    mixed = (1024 * 64 ** torch.rand(32, generator=random)).int().tolist()
    uniform = ((1, 1024), (1, 8192), (8, 32_768), (64, 4096), (256, 300))
    batches = [Batch(f"decode {count} x {context}", (1,) * count, (context,) * count) for count, context in uniform]
    return [*batches, Batch("decode 32 x 1k..64k", (1,) * 32, tuple(mixed))]


def prefill_batches() -> list[Batch]:
    """Long prompts, several prompts, chunks behind a cached prefix, short prompts."""
    sizes = ((1, 8192, 0), (4, 2048, 0), (8, 512, 2048), (32, 64, 0))
    return [
        Batch(f"prefill {count} x {chunk}" + f" + {prefix}" * bool(prefix), (chunk,) * count, (chunk + prefix,) * count)
        for count, chunk, prefix in sizes
    ]


def make_example(batch: Batch, heads: Heads, cache_dtype: torch.dtype, device: torch.device) -> Example:
    """Random queries and a random cache whose blocks lie scattered."""
    num_blocks_of = [-(-context // _BLOCK_SIZE) for context in batch.context_lens]
    tables = torch.zeros(len(num_blocks_of), max(num_blocks_of), dtype=torch.int64)
    free = torch.randperm(sum(num_blocks_of))
    for seq, count in enumerate(num_blocks_of):
        tables[seq, :count], free = free[:count], free[count:]
    layer_shape = (2, _BLOCK_SIZE, heads.num_kv_heads, heads.head_dim)
    layer_bytes = sum(num_blocks_of) * math.prod(layer_shape) * cache_dtype.itemsize
    num_layers = min(-(-_CACHE_BYTES // layer_bytes), _MAX_LAYERS) if device.type == "cuda" else 2
    cache = torch.empty(sum(num_blocks_of), num_layers, *layer_shape, dtype=cache_dtype, device=device)
    for layer in cache.unbind(1):
        layer.copy_(torch.randn(layer.shape, dtype=torch.bfloat16, device=device))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    query = torch.randn(sum(batch.query_lens), heads.num_heads, heads.head_dim, dtype=dtype, device=device)
    metadata = AttentionMetadata(
        block_tables=tables.to(device),
        seq_lens=torch.tensor(batch.context_lens, device=device),
        query_start_loc=torch.tensor([0, *batch.query_lens], device=device).cumsum(0),
        slot_mapping=torch.empty(0, dtype=torch.int64, device=device),
        num_decodes=len(batch.query_lens) if batch.is_decode else 0,
        query_lens=batch.query_lens,
        context_lens=batch.context_lens,
    )
    return Example(batch, heads, query, cache, metadata, Scoring(heads.head_dim**-0.5))


def largest_error(example: Example, run: Run) -> float:
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


def speed(example: Example, us: float) -> str:
    """TB/s of the keys and values that decodes read, TFLOP/s of the pairs of chunks that are not masked."""
    batch, heads = example.batch, example.heads
    if batch.is_decode:
        row_bytes = 2 * heads.num_kv_heads * heads.head_dim * example.cache.element_size()
        return f"{sum(batch.context_lens) * row_bytes / us / 1e6:7.3f} TB/s"
    pairs = sum(
        query_len * context - query_len * (query_len - 1) // 2
        for query_len, context in zip(batch.query_lens, batch.context_lens, strict=True)
    )
    return f"{4 * pairs * heads.num_heads * heads.head_dim / us / 1e6:7.1f} TFLOP/s"


def _attend_in_float32(
    example: Example, layer: torch.Tensor, seq: int, rows: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """[num_rows, num_heads, head_dim] for rows of one request at these positions of its context."""
    heads, context = example.heads, example.batch.context_lens[seq]
    tokens = torch.arange(context, device=layer.device)
    blocks = example.metadata.block_tables[seq, tokens // _BLOCK_SIZE]
    keys, values = layer[blocks, :, tokens % _BLOCK_SIZE].float().unbind(1)
    queries = example.query[rows].float().view(len(rows), heads.num_kv_heads, -1, heads.head_dim)
    scores = torch.einsum("qhgd,khd->hgqk", queries, keys) * example.scoring.scale
    scores = scores.masked_fill(tokens > positions[:, None], -torch.inf)
    output = torch.einsum("hgqk,khd->qhgd", torch.softmax(scores, dim=-1), values)
    return output.reshape(len(rows), heads.num_heads, heads.head_dim)
