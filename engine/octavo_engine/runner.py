"""Runs a scheduler's steps on the device: prepare -> forward -> sample. The engine's core says when, and what of it.

`launch` hands a step to the device; its result can be waited for later, after the next one was launched. On a CPU the
result is there at once. On a GPU steps of decodes are CUDA graphs, and everything that the host does not need to know
stays on the device.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from octavo_kernels.launch import runs_triton
from octavo_kernels.ops import prompt_attention
from torch.nn import functional

from octavo_engine.batch import copies_on, prepare
from octavo_engine.capacity import decode_graph_sizes
from octavo_engine.decode_graphs import DecodeGraphs
from octavo_engine.gpu_sampler import GpuSampler
from octavo_engine.graph_capture import graph_pool
from octavo_engine.mixed_graphs import MixedGraphs
from octavo_engine.protocol import TokenLogprobs
from octavo_engine.request import Request
from octavo_engine.sampler import LogprobRows, Sampler, is_greedy, pick_logprobs
from octavo_engine.scheduler import ScheduledRequest, Step
from octavo_engine.slot_tables import SlotTables
from octavo_engine.staging import upload
from octavo_engine.start import Started

# Rows of logits that prompt log probabilities hold at once: a long prompt's would not fit beside the KV cache. On a
# GPU always as many, since kernels for few rows are compiled for each number of them.
PROMPT_LOGPROBS_ROWS = 128
# Of blocks that are copied at once, if a layer of them is no more.
COPIED_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class PromptRows:
    """Log probabilities of a part of a request's prompt, the first of which is that of token `first`."""

    request: Request
    first: int
    rows: LogprobRows

    def read(self) -> None:
        """Give them to the request. A preempted prompt starts again."""
        logprobs = self.request.prompt_logprobs
        if logprobs is not None:
            num_rows, num_top = len(self.rows.token_ids), self.request.params.prompt_logprobs or 0
            logprobs[self.first :] = self.rows.read([num_top] * num_rows)


@dataclass(slots=True, eq=False)
class Launched:
    """A step under way. What it brings is on its way to the host, and valid after `wait`.

    sampled:       its sequences that get tokens
    token_ids:     [num_rounds, len(sampled)] int64
    logprob_rows:  of the sequences in `logprobs_of` (indices into `sampled`), or None
    prompt_rows:   of prompts
    started, ended: on a GPU, events around it
    """

    step: Step
    sampled: list[Request]
    token_ids: torch.Tensor
    launched_s: float
    logprobs_of: list[int] = field(default_factory=list)
    logprob_rows: LogprobRows | None = None
    prompt_rows: list[PromptRows] = field(default_factory=list)
    started: torch.cuda.Event | None = None
    ended: torch.cuda.Event | None = None
    duration_s: float = 0.0

    def wait(self) -> list[list[int]]:
        """The tokens of each sequence, in order; prompts' log probabilities go to their requests."""
        if self.started and self.ended:
            self.ended.synchronize()
            self.duration_s = self.started.elapsed_time(self.ended) / 1e3
        else:
            self.duration_s = time.perf_counter() - self.launched_s
        for part in self.prompt_rows:
            part.read()
        token_ids: list[list[int]] = self.token_ids.T.tolist()
        return token_ids

    def logprobs(self) -> list[TokenLogprobs | None]:
        """Of each sequence's token, where they were asked for. After `wait`."""
        logprobs: list[TokenLogprobs | None] = [None] * len(self.sampled)
        if self.logprob_rows is not None:
            num_top = [self.sampled[i].params.logprobs or 0 for i in self.logprobs_of]
            for i, each in zip(self.logprobs_of, self.logprob_rows.read(num_top), strict=True):
                logprobs[i] = each
        return logprobs


class Runner:
    """The model, its KV cache and its sampler on one device."""

    def __init__(self, started: Started, on_progress: Callable[[float], None]) -> None:
        """Make what steps reuse; on a GPU, capture the graphs."""
        limits = started.scheduler_limits
        self._model, self._kv_cache = started.model, started.kv_cache
        self._device = started.device.torch_device
        self._block_size = limits.block_size
        self._pipeline = started.ranks.pipeline if started.ranks else None
        self._is_one_of_many = started.ranks is not None
        eos_token_ids = sorted(started.eos_token_ids)
        self._sampler: Sampler | GpuSampler = Sampler(eos_token_ids)
        self._tables: SlotTables | None = None
        self._graphs: DecodeGraphs | None = None
        self._mixed_graphs: MixedGraphs | None = None
        self._last_ended: torch.cuda.Event | None = None
        # On a GPU those of decode steps: kernels for few rows are compiled for each number of them.
        self._numbers_of_logits: Sequence[int] = ()
        if self._device.type == "cuda":
            geometry = started.geometry
            heads = torch.zeros(
                limits.max_num_batched_tokens, geometry.num_heads + 2 * geometry.num_kv_heads, geometry.head_dim,
                dtype=self._kv_cache.dtype, device=self._device,
            )  # fmt: skip
            prompt_attention.warm_up(heads, geometry.num_heads, geometry.num_kv_heads, self._kv_cache[:, 0])
        if self.is_asynchronous:
            self._sampler = GpuSampler(eos_token_ids, limits.max_num_seqs, self._device)
            self._numbers_of_logits = decode_graph_sizes(limits.max_num_seqs)
            max_blocks = -(-limits.max_model_len // limits.block_size)
            self._tables = SlotTables(limits.max_num_seqs, max_blocks, self._device)
            if started.enable_cuda_graphs:
                pool = graph_pool(self._device)
                self._mixed_graphs = MixedGraphs(
                    self._model, self._kv_cache, self._tables.block_tables,
                    limits.max_num_seqs, limits.max_num_batched_tokens, started.capacity.launch_bound_tokens, pool,
                    lambda fraction: on_progress(fraction / 2),
                )  # fmt: skip
                self._graphs = DecodeGraphs(
                    self._model, self._kv_cache, self._tables, self._pipeline, limits.max_num_seqs, pool,
                    lambda fraction: on_progress((1 + fraction) / 2),
                )  # fmt: skip

    @property
    def is_asynchronous(self) -> bool:
        """Whether the device works while the host goes on."""
        return runs_triton(self._kv_cache)

    def can_repeat(self, requests: Sequence[Request]) -> bool:
        """Whether a step of these decodes may bring several tokens at once."""
        return self._graphs is not None and all(is_greedy(request) for request in requests)

    @torch.inference_mode()
    def launch(self, step: Step) -> Launched:
        """Hand a step to the device."""
        launched_s = time.perf_counter()
        started = self._record_event()
        if self._tables is not None:
            self._tables.update([each.request for each in step.scheduled])
            self._tables.update(step.sampled)
        launched = self._launch_graph(step) if self._graphs and step.is_decode else self._launch_eagerly(step)
        self._last_ended = self._record_event()
        launched.launched_s, launched.started, launched.ended = launched_s, started, self._last_ended
        return launched

    def _launch_graph(self, step: Step) -> Launched:
        assert self._graphs is not None
        sampled = step.sampled
        self._copy_blocks(copies_on(self._device, step))
        graph = self._graphs.begin(sampled, [each.first_token for each in step.scheduled], step.num_rounds)
        host = self._empty_tokens(step.num_rounds, len(sampled))
        for i in range(step.num_rounds):
            graph.replay()
            host[i].copy_(graph.token_ids[: len(sampled)], non_blocking=True)
        launched = Launched(step, sampled, host, 0.0)
        if not all(is_greedy(request) for request in sampled):
            assert step.num_rounds == 1, "only greedy tokens follow one another on the device"
            self._sample(launched, graph.logits[: len(sampled)])
        return launched

    def _launch_eagerly(self, step: Step) -> Launched:
        if self._graphs:
            self._graphs.interrupt()
        batch = prepare(step, self._block_size, self._device, self._tables, self._numbers_of_logits)
        self._copy_blocks(batch.block_copies)
        if self._mixed_graphs and self._mixed_graphs.suits(batch, is_device_idle=self._is_idle()):
            hidden = self._mixed_graphs.run(batch)
        else:
            hidden = self._model.forward(batch.input_ids, batch.positions, self._kv_cache, batch.metadata)
        sampled = step.sampled
        launched = Launched(step, sampled, torch.empty(1, len(sampled), dtype=torch.int64), 0.0)
        launched.prompt_rows = self._prompt_rows(step, hidden)
        if sampled:
            self._sample(launched, self._model.compute_logits(hidden[batch.sampled_rows])[: len(sampled)])
        return launched

    def _is_idle(self) -> bool:
        """Whether the device has nothing to do. Ranks of one model, which must all decide alike, say yes."""
        if self._is_one_of_many or self._last_ended is None:
            return True
        return bool(self._last_ended.query())  # type: ignore[no-untyped-call]

    def _sample(self, launched: Launched, logits: torch.Tensor) -> None:
        """Sample a token for each sequence: for the host, and for the next step on the device."""
        sampled = launched.sampled
        launched.logprobs_of = [i for i, request in enumerate(sampled) if request.params.logprobs is not None]
        if launched.logprobs_of:
            rows = upload(np.array(launched.logprobs_of), self._device)
            logprobs = logits[rows].float().log_softmax(dim=-1)  # before sampling changes rows in place
        token_ids = self._sampler.sample(logits.float(), sampled)
        if self._pipeline:
            self._pipeline.share_tokens(token_ids)
        if launched.logprobs_of:
            num_top = max(sampled[i].params.logprobs or 0 for i in launched.logprobs_of)
            launched.logprob_rows = pick_logprobs(logprobs, token_ids[rows], num_top)
        if self._tables is None:
            launched.token_ids = token_ids[None]
            return
        slots = np.fromiter((request.slot for request in sampled), np.int64, len(sampled))
        self._tables.last_tokens[upload(slots, self._device)] = token_ids
        launched.token_ids = self._empty_tokens(1, len(sampled))
        launched.token_ids[0].copy_(token_ids, non_blocking=True)

    def _empty_tokens(self, num_rounds: int, num_sampled: int) -> torch.Tensor:
        """Host memory that the device can write to while the host goes on."""
        is_pinned = self._device.type == "cuda"
        return torch.empty(num_rounds, num_sampled, dtype=torch.int64, pin_memory=is_pinned)

    def _copy_blocks(self, block_copies: torch.Tensor | None) -> None:
        """Copy on write, before the step writes: all sources are read before any destination is written.

        Some layers at a time, since what is read waits in memory of its own: forks of one prompt copy a block each.
        """
        if block_copies is None:
            return
        sources, destinations = block_copies
        # 8-bit floats as bytes, which torch indexes on every device.
        cache = self._kv_cache.view(torch.uint8) if self._kv_cache.itemsize == 1 else self._kv_cache
        layer_bytes = len(sources) * cache[0, 0].nbytes
        num_layers = max(1, COPIED_BYTES // layer_bytes)
        for first_layer in range(0, cache.shape[1], num_layers):
            layers = cache[:, first_layer : first_layer + num_layers]
            layers[destinations] = layers[sources]

    def _record_event(self) -> torch.cuda.Event | None:
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _prompt_rows(self, step: Step, hidden: torch.Tensor) -> list[PromptRows]:
        """For those who ask: the log probability of each prompt token, from the hidden state before it."""
        parts: list[PromptRows] = []
        row = 0
        for each in step.scheduled:
            if each.request.wants_prompt_logprobs:
                parts += self._parts_of_prompt(each, hidden[row : row + each.num_tokens])
            row += each.num_tokens
        return parts

    def _parts_of_prompt(self, scheduled: ScheduledRequest, hidden: torch.Tensor) -> Iterator[PromptRows]:
        request, first = scheduled.request, scheduled.first_token + 1
        targets = request.token_ids[first : min(first + len(hidden), request.num_prompt_tokens)]
        for start in range(0, len(targets), PROMPT_LOGPROBS_ROWS):
            part = targets[start : start + PROMPT_LOGPROBS_ROWS]
            rows = hidden[start : start + len(part)]
            if self.is_asynchronous:
                rows = functional.pad(rows, (0, 0, 0, PROMPT_LOGPROBS_ROWS - len(part)))
            logprobs = self._model.compute_logits(rows)[: len(part)].float().log_softmax(dim=-1)
            token_ids = upload(np.array(part), self._device)
            yield PromptRows(
                request, first + start, pick_logprobs(logprobs, token_ids, request.params.prompt_logprobs or 0)
            )
