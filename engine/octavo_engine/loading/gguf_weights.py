"""Weights from a GGUF file, dequantised to float32 under Hugging Face's names.

llama.cpp rotates neighbouring dimensions of LLaMA's heads where Hugging Face rotates dimensions half a head apart, so
its converter permutes the rows of the query and key projections; that is undone here.
"""

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import gguf
import numpy as np
import torch

from octavo_engine.errors import ModelSourceError, UnsupportedModelError
from octavo_engine.geometry import Geometry
from octavo_engine.gguf_file import GgufFile, GgufTensor
from octavo_engine.loading.weight_source import Part, StoredTensor

Floats = np.ndarray[Any, np.dtype[np.float32]]

# GGUF's name of a tensor without its suffix (.weight, .bias) -> Hugging Face's, for all architectures that are read.
TENSOR_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_TENSOR_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k": "self_attn.k_proj",
    "attn_k_norm": "self_attn.k_norm",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Architectures whose query and key rows are permuted.
PERMUTED = frozenset({"llama"})
# Divisors of the rotary frequencies: part of the configuration, not a weight.
FREQUENCY_FACTORS = "rope_freqs.weight"

_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


class GgufWeights:
    """The tensors of a GGUF file.

    Raises UnsupportedModelError for a quantisation that cannot be undone, before anything is read.
    """

    def __init__(self, file: GgufFile, geometry: Geometry) -> None:
        self._file = file
        self._geometry = geometry
        self._sizes = {tensor.name: _stored_bytes(file, tensor) for tensor in file.tensors.values()}

    @property
    def num_bytes(self) -> int:
        """Of the tensors, as quantised."""
        return sum(self._sizes.values())

    def __iter__(self) -> Iterator[StoredTensor]:
        for tensor in self._file.tensors.values():
            if tensor.name != FREQUENCY_FACTORS:
                name = hugging_face_name(tensor.name)
                shape = tuple(tensor.shape)
                yield StoredTensor(name, self._sizes[tensor.name], shape, partial(self._read, tensor, name))

    def _read(self, tensor: GgufTensor, name: str, part: Part = ()) -> torch.Tensor:
        """A part is cut out of the whole tensor: blocks of quantised weights do not end where a share does."""
        return self._read_whole(tensor, name)[part]

    def _read_whole(self, tensor: GgufTensor, name: str) -> torch.Tensor:
        weight = torch.from_numpy(read_tensor(self._file, tensor))
        if self._file.architecture not in PERMUTED:
            return weight
        if ".q_proj." in name:
            return _unpermute(weight, self._geometry.num_heads)
        if ".k_proj." in name:
            return _unpermute(weight, self._geometry.num_kv_heads)
        return weight


def hugging_face_name(name: str) -> str:
    """Hugging Face's name of a tensor; unknown ones keep theirs, so that the loader's complaint names them."""
    match = _LAYER_TENSOR.fullmatch(name)
    if match and match[2] in LAYER_TENSOR_NAMES:
        return f"model.layers.{match[1]}.{LAYER_TENSOR_NAMES[match[2]]}.{match[3]}"
    stem, _, suffix = name.rpartition(".")
    return f"{TENSOR_NAMES[stem]}.{suffix}" if stem in TENSOR_NAMES else name


def read_tensor(file: GgufFile, tensor: GgufTensor) -> Floats:
    """Dequantise one tensor to float32 in its own memory.

    Raises UnsupportedModelError for a type that cannot be dequantised.
    """
    kind = _type(tensor)
    stored = np.frombuffer(file.buffer, np.uint8, _stored_bytes(file, tensor), tensor.offset)
    if kind == gguf.GGMLQuantizationType.F32:
        return stored.view(np.float32).reshape(tensor.shape).copy()
    if kind == gguf.GGMLQuantizationType.F16:
        return stored.view(np.float16).reshape(tensor.shape).astype(np.float32)
    rows = stored.reshape(*tensor.shape[:-1], -1)
    try:
        values: Floats = gguf.dequantize(rows, kind).reshape(tensor.shape)
    except NotImplementedError:
        raise UnsupportedModelError(
            f"the GGUF tensor {tensor.name} has the type {kind.name}, which is not supported"
        ) from None
    return values


def _type(tensor: GgufTensor) -> gguf.GGMLQuantizationType:
    try:
        return gguf.GGMLQuantizationType(tensor.type_id)
    except ValueError:
        raise UnsupportedModelError(
            f"the GGUF tensor {tensor.name} has the unknown type number {tensor.type_id}"
        ) from None


def _stored_bytes(file: GgufFile, tensor: GgufTensor) -> int:
    """Its bytes in the file. Raises ModelSourceError if the file ends before, or no row can have that many values."""
    block_values, block_bytes = gguf.GGML_QUANT_SIZES[_type(tensor)]
    if tensor.shape[-1] % block_values:
        raise ModelSourceError(f"{file.path}: a row of {tensor.name} is not a multiple of {block_values} values")
    num_bytes = tensor.num_elements // block_values * block_bytes
    if tensor.offset + num_bytes > len(file.buffer):
        raise ModelSourceError(f"{file.path} is cut off: it ends before the tensor {tensor.name} does")
    return int(num_bytes)


def _unpermute(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of each head from interleaved pairs to halves: (0, 1, 2, 3, ...) -> (0, 2, ..., 1, 3, ...)."""
    pairs = weight.view(num_heads, -1, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)
