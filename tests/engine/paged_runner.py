"""Runs a model of the engine through its paged KV cache, without scheduler or engine, and `transformers` beside it."""

from collections.abc import Sequence
from pathlib import Path

import torch
from octavo_engine.geometry import read_geometry
from octavo_engine.loading.loader import LoadedModel, load_model
from octavo_engine.model_source import ModelFiles
from octavo_engine.models import Model
from octavo_kernels.ops.attention_metadata import AttentionMetadata

CPU = torch.device("cpu")


def load(
    path: Path, quantization: str = "none", dtype: torch.dtype = torch.float32, device: torch.device = CPU
) -> LoadedModel:
    files = ModelFiles(str(path), path)
    return load_model(files, read_geometry(path), dtype, device, quantization, lambda fraction, text: None)


class PagedRunner:
    """Runs prompts through a model in chunks, every request with blocks of its own, scattered over the cache."""

    def __init__(
        self,
        model: Model,
        prompts: Sequence[Sequence[int]],
        block_size: int = 4,
        dtype: torch.dtype = torch.float32,
        device: torch.device = CPU,
    ) -> None:
        geometry = model.geometry
        self.model, self.prompts, self.block_size, self.device = model, prompts, block_size, device
        self.num_computed = [0] * len(prompts)
        num_blocks = [-(-len(prompt) // block_size) for prompt in prompts]
        free = iter((torch.randperm(sum(num_blocks)) + 1).tolist())
        self.blocks = [[next(free) for _ in range(count)] for count in num_blocks]
        shape = (sum(num_blocks) + 1, geometry.num_layers, 2, block_size, geometry.num_kv_heads, geometry.head_dim)
        self.kv_cache = torch.full(shape, torch.nan, dtype=dtype, device=device)

    def run(self, chunk_sizes: Sequence[int]) -> list[torch.Tensor]:
        """All logits of each prompt; step i computes at most chunk_sizes[i % len] tokens of each request."""
        logits: list[list[torch.Tensor]] = [[] for _ in self.prompts]
        step = 0
        with torch.inference_mode():
            while any(done < len(prompt) for done, prompt in zip(self.num_computed, self.prompts, strict=True)):
                size = chunk_sizes[step % len(chunk_sizes)]
                step += 1
                for seq, rows in self._step(size):
                    logits[seq].append(rows)
        return [torch.cat(rows) for rows in logits]

    def _step(self, size: int) -> list[tuple[int, torch.Tensor]]:
        chunks = {
            seq: range(done, min(done + size, len(prompt)))
            for seq, (done, prompt) in enumerate(zip(self.num_computed, self.prompts, strict=True))
            if done < len(prompt)
        }
        order = sorted(chunks, key=lambda seq: len(chunks[seq]) > 1)
        tokens = [self.prompts[seq][position] for seq in order for position in chunks[seq]]
        positions = self._tensor([position for seq in order for position in chunks[seq]])
        metadata = self._metadata(order, chunks)
        hidden = self.model(self._tensor(tokens), positions, self.kv_cache, metadata)
        results = []
        for seq, rows in zip(order, hidden.split(list(metadata.query_lens)), strict=True):
            results.append((seq, self.model.compute_logits(rows).float().cpu()))
            self.num_computed[seq] = chunks[seq].stop
        return results

    def _tensor(self, values: Sequence[int] | Sequence[Sequence[int]]) -> torch.Tensor:
        return torch.tensor(values, device=self.device)

    def _metadata(self, order: Sequence[int], chunks: dict[int, range]) -> AttentionMetadata:
        width = max(len(self.blocks[seq]) for seq in order)
        tables = self._tensor([self.blocks[seq] + [0] * (width - len(self.blocks[seq])) for seq in order])
        slots = [
            self.blocks[seq][position // self.block_size] * self.block_size + position % self.block_size
            for seq in order
            for position in chunks[seq]
        ]
        query_lens = [len(chunks[seq]) for seq in order]
        return AttentionMetadata(
            block_tables=tables,
            seq_lens=self._tensor([chunks[seq].stop for seq in order]),
            query_start_loc=self._tensor([0, *query_lens]).cumsum(0),
            slot_mapping=self._tensor(slots),
            num_decodes=query_lens.count(1),
            query_lens=tuple(query_lens),
            context_lens=tuple(chunks[seq].stop for seq in order),
        )


def reference_logits(
    folder: Path, prompts: Sequence[Sequence[int]], dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.inference_mode():
        return [model(torch.tensor([list(prompt)])).logits[0].float() for prompt in prompts]


def random_prompts(vocab_size: int, lengths: Sequence[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]
