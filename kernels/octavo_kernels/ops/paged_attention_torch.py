"""Attention over a paged KV cache in torch: the reference op, which is also the CPU kernel.

Requests with the same number of query tokens and about the same context are computed together: their blocks are
gathered through the block table and handed to torch's fused attention. Which requests, which blocks and which mask is
the same for every layer, so it is planned once per step.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from octavo_kernels.native import HEAD_DIM_MULTIPLE, MAX_BLOCK_SIZE, MAX_HEAD_DIM, CpuKernels, kernels_for
from octavo_kernels.ops.attention_metadata import AttentionMetadata, Scoring, check_query
from octavo_kernels.ops.kv_write import check_blocks

# Requests share a call while gathering the padding costs less than another call does.
MAX_PADDING = 2.0


@dataclass(frozen=True, slots=True, eq=False)
class AttentionGroup:
    """Requests of one call.

    rows:      [num_seqs * query_len] rows of the step's tokens, or a slice where they are adjacent
    row_ids:   [2 * num_seqs * num_blocks] what to gather: the keys of each block, then the values, with a layer seen as
               rows that each hold the keys or the values of one block
    num_keys:  keys to use of those gathered
    key_lens:  [num_seqs] those of each request; its last query token is at the last of them
    mask:      added to the scores, broadcastable to [num_seqs, 1, query_len, num_keys]; None: nothing is masked, except
               the future if `is_causal`
    stale:     gathered (row, offset) slots that belong to nobody, set to zero since they may hold NaN
    """

    rows: torch.Tensor | slice
    num_seqs: int
    query_len: int
    row_ids: torch.Tensor
    num_keys: int
    key_lens: torch.Tensor
    mask: torch.Tensor | None
    is_causal: bool
    stale: tuple[torch.Tensor, torch.Tensor] | None


@dataclass(frozen=True, slots=True, eq=False)
class Decodes:
    """The step's first requests, one query token each, for the C kernel, which reads blocks where they lie.

    block_tables, seq_lens: as in `AttentionMetadata`, of these requests; window: 0 for none
    as_groups: the same requests for torch, planned at the first call: for scores that the C kernel does not know, and
               queries whose heads lie apart
    """

    kernels: CpuKernels
    block_tables: torch.Tensor
    seq_lens: torch.Tensor
    window: int
    as_groups: Callable[[], tuple[AttentionGroup, ...]]


@dataclass(frozen=True, slots=True, eq=False)
class TorchPlan:
    """What one step's attention consists of."""

    decodes: Decodes | None
    groups: tuple[AttentionGroup, ...]

    def run(
        self,
        query: torch.Tensor,
        kv_cache_layer: torch.Tensor,
        scoring: Scoring,
        new_kv: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """As `AttentionPlan.run`; all keys and values come from the cache."""
        check_query(query, kv_cache_layer, scoring)
        groups, decodes = self.groups, self.decodes
        if decodes and not (scoring.is_plain and query[:1].is_contiguous()):
            groups, decodes = decodes.as_groups() + groups, None
        if decodes is None and len(groups) == 1 and isinstance(groups[0].rows, slice):
            return _attend(query, kv_cache_layer, groups[0], scoring)
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        if decodes:
            decodes.kernels.paged_decode(
                output[: len(decodes.seq_lens)], query, kv_cache_layer, decodes.block_tables, decodes.seq_lens,
                decodes.window, scoring.scale,
            )  # fmt: skip
        for group in groups:
            output[group.rows] = _attend(query[group.rows], kv_cache_layer, group, scoring)
        return output


def plan_torch_attention(
    metadata: AttentionMetadata,
    kv_cache_layer: torch.Tensor,
    dtype: torch.dtype,
    sliding_window: int | None = None,
) -> TorchPlan:
    """What one step needs, for every layer with this window. kv_cache_layer: any layer's; dtype: the query's.

    Raises ValueError if the cache's blocks are not each in one piece.
    """
    check_blocks(kv_cache_layer)
    starts = [0]
    for query_len in metadata.query_lens:
        starts.append(starts[-1] + query_len)

    def plan_groups(seqs: range) -> tuple[AttentionGroup, ...]:
        return tuple(
            _plan_group(metadata, group, starts, kv_cache_layer, dtype, sliding_window)
            for group in _groups(metadata.query_lens, metadata.context_lens, seqs)
        )

    num_seqs, num_decodes = len(metadata.query_lens), metadata.num_decodes
    kernels = _decode_kernels(kv_cache_layer, dtype)
    if kernels is None or not num_decodes:
        return TorchPlan(None, plan_groups(range(num_seqs)))
    decodes = Decodes(
        kernels,
        metadata.block_tables[:num_decodes].to(torch.int64).contiguous(),
        metadata.seq_lens[:num_decodes].to(torch.int64).contiguous(),
        sliding_window or 0,
        functools.cache(lambda: plan_groups(range(num_decodes))),
    )
    return TorchPlan(decodes, plan_groups(range(num_decodes, num_seqs)))


def _decode_kernels(kv_cache_layer: torch.Tensor, dtype: torch.dtype) -> CpuKernels | None:
    """The C kernels, if their paged decode takes this cache and queries of this type."""
    _, _, block_size, _, head_dim = kv_cache_layer.shape
    has_size = block_size <= MAX_BLOCK_SIZE and head_dim <= MAX_HEAD_DIM and head_dim % HEAD_DIM_MULTIPLE == 0
    return kernels_for(kv_cache_layer) if has_size and dtype == torch.float32 else None


def _groups(query_lens: Sequence[int], context_lens: Sequence[int], seqs: range) -> Iterator[list[int]]:
    """Which of these requests to compute together: decodes, until padding to the longest costs too much."""
    decodes = sorted((seq for seq in seqs if query_lens[seq] == 1), key=lambda seq: context_lens[seq])
    while decodes:
        group, total = [decodes[-1]], context_lens[decodes[-1]]
        longest = total
        for seq in reversed(decodes[:-1]):
            total += context_lens[seq]
            if longest * (len(group) + 1) > MAX_PADDING * total:
                break
            group.append(seq)
        del decodes[-len(group) :]
        yield sorted(group)
    yield from ([seq] for seq in seqs if query_lens[seq] > 1)


def _plan_group(
    metadata: AttentionMetadata,
    seqs: list[int],
    starts: list[int],
    kv_cache_layer: torch.Tensor,
    dtype: torch.dtype,
    sliding_window: int | None,
) -> AttentionGroup:
    device, block_size = metadata.block_tables.device, kv_cache_layer.shape[2]
    query_len = metadata.query_lens[seqs[0]]
    contexts = [metadata.context_lens[seq] for seq in seqs]
    # Keys that the first query token of a request cannot see any more are not even gathered.
    first_blocks = [_first_key(context, query_len, sliding_window) // block_size for context in contexts]
    key_lens = [context - first * block_size for context, first in zip(contexts, first_blocks, strict=True)]
    num_blocks = -(-max(key_lens) // block_size)
    block_ids = _gather_ids(metadata.block_tables, seqs, first_blocks, num_blocks).reshape(-1)
    key_rows = block_ids * (kv_cache_layer.stride(0) // kv_cache_layer.stride(1))
    num_keys = max(key_lens)
    is_ragged = min(key_lens) < num_keys
    offsets = [_first_key(context, query_len, sliding_window) for context in contexts]
    starts_mid_block = any(offset > first * block_size for offset, first in zip(offsets, first_blocks, strict=True))
    is_first_chunk = query_len == num_keys and len(seqs) == 1
    is_causal = query_len > 1 and is_first_chunk and not (sliding_window and query_len > sliding_window)
    needs_mask = is_ragged or starts_mid_block or (query_len > 1 and not is_causal)
    lens = torch.tensor(key_lens, device=device)
    return AttentionGroup(
        rows=_rows(seqs, starts, query_len, device),
        num_seqs=len(seqs),
        query_len=query_len,
        row_ids=torch.cat((key_rows, key_rows + 1)),
        num_keys=num_keys,
        key_lens=lens,
        mask=_mask(lens, query_len, num_keys, sliding_window, dtype) if needs_mask else None,
        is_causal=is_causal,
        stale=_stale_slots(lens, num_blocks, block_size, num_keys) if is_ragged else None,
    )


def _first_key(context_len: int, query_len: int, sliding_window: int | None) -> int:
    """The earliest key that the first of the query tokens sees."""
    return max(0, context_len - query_len + 1 - sliding_window) if sliding_window else 0


def _gather_ids(block_tables: torch.Tensor, seqs: list[int], first_blocks: list[int], num_blocks: int) -> torch.Tensor:
    """[num_seqs, num_blocks] block ids from each request's first block on; past the table's end, any block."""
    device = block_tables.device
    columns = torch.tensor(first_blocks, device=device)[:, None] + torch.arange(num_blocks, device=device)
    columns.clamp_(max=block_tables.shape[1] - 1)
    return block_tables[torch.tensor(seqs, device=device)[:, None], columns]


def _rows(seqs: list[int], starts: list[int], query_len: int, device: torch.device) -> torch.Tensor | slice:
    if seqs[-1] - seqs[0] + 1 == len(seqs):
        return slice(starts[seqs[0]], starts[seqs[-1] + 1])
    first_rows = torch.tensor([starts[seq] for seq in seqs], device=device)
    return (first_rows[:, None] + torch.arange(query_len, device=device)).reshape(-1)


def _mask(
    key_lens: torch.Tensor, query_len: int, num_keys: int, sliding_window: int | None, dtype: torch.dtype
) -> torch.Tensor:
    """[num_seqs, 1, query_len, num_keys], -inf where a query token must not look."""
    keys = torch.arange(num_keys, device=key_lens.device)
    queries = key_lens[:, None, None] - query_len + torch.arange(query_len, device=key_lens.device)[:, None]
    hidden = keys > queries
    if sliding_window:
        hidden |= keys <= queries - sliding_window
    mask = torch.zeros(hidden.shape, dtype=dtype, device=key_lens.device)
    return mask.masked_fill_(hidden, -torch.inf).unsqueeze(1)


def _stale_slots(
    key_lens: torch.Tensor, num_blocks: int, block_size: int, num_keys: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices (gathered row, offset) of the slots between a request's length and `num_keys`."""
    keys = torch.arange(num_keys, device=key_lens.device)
    seqs, stale = (keys >= key_lens[:, None]).nonzero(as_tuple=True)
    blocks = torch.div(stale, block_size, rounding_mode="floor")
    key_rows, offsets = seqs * num_blocks + blocks, stale - blocks * block_size
    value_rows = key_rows + len(key_lens) * num_blocks
    return torch.cat((key_rows, value_rows)), torch.cat((offsets, offsets))


def _attend(query: torch.Tensor, kv_cache_layer: torch.Tensor, group: AttentionGroup, scoring: Scoring) -> torch.Tensor:
    """[num_seqs * query_len, num_heads, head_dim] for the rows of one group."""
    num_seqs, query_len = group.num_seqs, group.query_len
    num_heads, head_dim = query.shape[1:]
    num_kv_heads = kv_cache_layer.shape[3]
    keys, values = _gather(kv_cache_layer, group, query.dtype)
    if not scoring.is_plain:
        queries = query.reshape(num_seqs, query_len, num_kv_heads, num_heads // num_kv_heads, head_dim)
        return _attend_by_scores(queries, keys, values, group, scoring).reshape(-1, num_heads, head_dim)
    if query_len == 1:
        # The query heads of one KV head become its query rows, so that each key is read once for all of them.
        grouped = query.reshape(num_seqs, num_kv_heads, num_heads // num_kv_heads, head_dim)
        output = scaled_dot_product_attention(grouped, keys, values, attn_mask=group.mask, scale=scoring.scale)
        return output.reshape(num_seqs, num_heads, head_dim)
    queries = query.reshape(num_seqs, query_len, num_heads, head_dim).transpose(1, 2)
    output = scaled_dot_product_attention(
        queries, keys, values, attn_mask=group.mask, is_causal=group.is_causal, scale=scoring.scale,
        enable_gqa=num_heads != num_kv_heads,
    )  # fmt: skip
    return output.transpose(1, 2).reshape(num_seqs * query_len, num_heads, head_dim)


def _attend_by_scores(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, group: AttentionGroup, scoring: Scoring
) -> torch.Tensor:
    """Attention by the definition of `Scoring`, in float32.

    queries: [num_seqs, query_len, num_kv_heads, group_size, head_dim]; Returns the same
    keys, values: [num_seqs, num_kv_heads, num_keys, head_dim]
    """
    scores = torch.einsum("sqhgd,shkd->shgqk", queries.float(), keys.float()) * (scoring.scale * scoring.k_scale)
    if scoring.softcap:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    if scoring.alibi_slopes is not None:
        slopes = scoring.alibi_slopes.view(*queries.shape[2:4], 1, 1)
        scores = scores + slopes * _distances(group)[:, None, None]
    mask = group.mask
    if group.is_causal:
        mask = _mask(group.key_lens, group.query_len, group.num_keys, None, torch.float32)
    if mask is not None:
        scores = scores + mask.unsqueeze(1)
    weights = torch.softmax(scores, dim=-1)
    output = torch.einsum("shgqk,shkd->sqhgd", weights, values.float()) * scoring.v_scale
    return output.to(queries.dtype)


def _distances(group: AttentionGroup) -> torch.Tensor:
    """[num_seqs, query_len, num_keys], key position - query position."""
    device = group.key_lens.device
    queries = group.key_lens[:, None, None] - group.query_len + torch.arange(group.query_len, device=device)[:, None]
    return torch.arange(group.num_keys, device=device) - queries


def _gather(
    kv_cache_layer: torch.Tensor, group: AttentionGroup, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a group, each [num_seqs, num_kv_heads, num_keys, head_dim], a strided view of one copy."""
    num_blocks, _, *shape = kv_cache_layer.shape
    width = kv_cache_layer.stride(1)
    num_rows = (num_blocks - 1) * (kv_cache_layer.stride(0) // width) + 2
    # As a contiguous matrix, whatever lies between two blocks of this layer: torch gathers from one much faster.
    matrix = kv_cache_layer.as_strided((num_rows, width), (width, 1))
    blocks = matrix.index_select(0, group.row_ids).view(-1, *shape)
    if group.stale is not None:
        blocks[group.stale] = 0
    tokens = blocks.to(dtype).view(2, group.num_seqs, -1, *shape[1:])
    keys, values = tokens[:, :, : group.num_keys].transpose(2, 3)
    return keys, values
