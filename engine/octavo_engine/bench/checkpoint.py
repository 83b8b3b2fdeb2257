"""Writes a checkpoint with random weights: any engine can load it, none has an advantage from its values.

The files are those of a published model: config.json, generation_config.json, safetensors in shards with their index,
and a tokenizer with a word for each id. A tensor's values follow from the seed and its name alone. Tensors are drawn
and written piece by piece, several files at once: no more than a piece of each is in memory, however large the model.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from octavo_engine.errors import ConfigError

if TYPE_CHECKING:
    import torch

SHARD_BYTES: Final = 2 << 30
_PIECE_ELEMENTS: Final = 1 << 24  # 64 MiB while it is drawn in float32
_STORED_NAMES: Final[Mapping[str, str]] = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_ITEMSIZE: Final[Mapping[str, int]] = {"bfloat16": 2, "float16": 2, "float32": 4}
_TOKENIZER_FIELDS: Final = ("bos_token", "eos_token")

# (share of the bytes that are written, the file that is done)
ProgressCallback = Callable[[float, str], None]


@dataclass(frozen=True, slots=True)
class TensorShape:
    """A tensor of a checkpoint under the name that it has in the file."""

    name: str
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        """Of the whole tensor."""
        return prod(self.shape)


def write_configuration(config: Mapping[str, Any], folder: Path) -> None:
    """Write what describes the model: all that engines need that draw weights of their own, and a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = {name: config[name] for name in ("bos_token_id", "eos_token_id") if config.get(name) is not None}
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")
    _write_tokenizer(config, folder)


def write_weights(
    config: Mapping[str, Any], folder: Path, *, seed: int, dtype: str, on_progress: ProgressCallback
) -> None:
    """Write the weights of a model whose configuration is in `folder`: matrices N(0, 0.02), norms 1, biases 0.

    dtype: bfloat16, float16 or float32. Raises ConfigError if transformers knows no such model.
    """
    shards = _shards(tensor_shapes(config), _ITEMSIZE[dtype])
    total_bytes = sum(tensor.num_elements for shard in shards for tensor in shard) * _ITEMSIZE[dtype]
    files = [folder / f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    weight_map = {tensor.name: file.name for file, shard in zip(files, shards, strict=True) for tensor in shard}
    num_written = 0
    # torch draws each tensor in one thread, and lets others run meanwhile.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        tasks = {
            pool.submit(write_safetensors, file, shard, seed=seed, dtype=dtype): (file, shard)
            for file, shard in zip(files, shards, strict=True)
        }
        for task in as_completed(tasks):
            task.result()
            file, shard = tasks[task]
            num_written += sum(tensor.num_elements for tensor in shard) * _ITEMSIZE[dtype]
            on_progress(num_written / total_bytes, file.name)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def tensor_shapes(config: Mapping[str, Any]) -> list[TensorShape]:
    """The tensors that transformers saves for a model of this configuration; no memory is taken for them.

    Raises ConfigError if transformers knows no such model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    fields = {key: value for key, value in config.items() if key != "model_type"}
    try:
        known = AutoConfig.for_model(config.get("model_type"), **fields)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(known)
    except (ValueError, KeyError) as error:
        raise ConfigError(f"transformers makes no model of this configuration: {error}") from None
    saved = revert_weight_conversion(model, model.state_dict())
    return [
        TensorShape(name, tuple(tensor.shape))
        for name, tensor in saved.items()
        if name not in model.all_tied_weights_keys
    ]


def write_safetensors(file: Path, tensors: Sequence[TensorShape], *, seed: int, dtype: str) -> None:
    """One file with random tensors. Format: the length of a JSON header (u64, little endian), the header, the data.

    Source: https://github.com/huggingface/safetensors#format
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.num_elements * _ITEMSIZE[dtype]
        entry = {"dtype": _STORED_NAMES[dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        header[tensor.name], offset = entry, end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with file.open("wb") as output:
        output.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors:
            _write_values(output, tensor, seed, dtype)


def _write_values(output: BinaryIO, tensor: TensorShape, seed: int, dtype: str) -> None:
    import torch

    for piece in _draw(tensor, seed):
        output.write(piece.to(getattr(torch, dtype)).view(torch.uint8).numpy().data)


def _draw(tensor: TensorShape, seed: int) -> "Iterator[torch.Tensor]":
    """The tensor's values in float32, flat, in pieces."""
    import torch

    from octavo_engine.loading.dummy_weights import INITIALIZER_RANGE, generator_for, vector_value

    generator = generator_for(tensor.name, seed, torch.device("cpu"))
    for start in range(0, tensor.num_elements, _PIECE_ELEMENTS):
        piece = torch.empty(min(_PIECE_ELEMENTS, tensor.num_elements - start))
        if len(tensor.shape) > 1:
            yield piece.normal_(0.0, INITIALIZER_RANGE, generator=generator)
        else:
            yield piece.fill_(vector_value(tensor.name))


def _shards(tensors: Sequence[TensorShape], itemsize: int) -> list[list[TensorShape]]:
    """Consecutive tensors in files of up to SHARD_BYTES; a larger tensor has a file of its own."""
    shards: list[list[TensorShape]] = []
    num_bytes = SHARD_BYTES
    for tensor in tensors:
        size = tensor.num_elements * itemsize
        if num_bytes + size > SHARD_BYTES:
            shards.append([])
            num_bytes = 0
        shards[-1].append(tensor)
        num_bytes += size
    return shards


def _write_tokenizer(config: Mapping[str, Any], folder: Path) -> None:
    """Token i is the word w<i>, in both directions: text goes in and comes out, and a chunk's tokens can be counted."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = {_word(i): i for i in range(config["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=_word(0)))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {name: config.get(f"{name}_id") for name in _TOKENIZER_FIELDS}
    special = {name: _word(token_id) for name, token_id in ids.items() if isinstance(token_id, int)}
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config["max_position_embeddings"]}
    (folder / "tokenizer_config.json").write_text(json.dumps({**fields, **special}, indent=2) + "\n")


def _word(token_id: int) -> str:
    """How a byte-level tokenizer spells a word with the space before it."""
    return f"\u0120w{token_id}"
