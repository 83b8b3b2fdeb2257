"""Weights from GGUF: every quantisation, names, the permutation of query and key rows, and rope factors."""

import math
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from engine.paged_runner import PagedRunner, load, random_prompts, reference_logits
from octavo_engine.errors import ModelSourceError, UnsupportedModelError
from octavo_engine.geometry import Geometry, read_geometry
from octavo_engine.gguf_file import GgufFile
from octavo_engine.loading.gguf_weights import GgufWeights, hugging_face_name, read_tensor
from octavo_engine.loading.loader import load_model
from octavo_engine.loading.model_config import config_from_gguf
from octavo_engine.model_source import ModelFiles

Types = gguf.GGMLQuantizationType
# Largest error of a value in [-1, 1] after quantising; Q4_K and Q6_K have no quantiser in Python (see below).
TOLERANCE = {
    Types.F32: 0.0, Types.F16: 1e-3, Types.BF16: 8e-3, Types.Q8_0: 8e-3,
    Types.Q5_0: 0.07, Types.Q5_1: 0.07, Types.Q4_0: 0.15, Types.Q4_1: 0.15,
}  # fmt: skip
HEADS, KV_HEADS, HEAD_DIM, HIDDEN, MLP, VOCAB = 4, 2, 16, 64, 96, 10


def write_gguf(
    path: Path, tensors: dict[str, tuple[np.ndarray, Types]], *, architecture: str = "llama", **pairs: float | str
) -> Path:
    """pairs: GGUF keys with __ for the dot, written as uint32, float32 or string."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in pairs.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(key.replace("__", "."), value)
    writer.add_array("tokenizer.ggml.tokens", [f"t{index}" for index in range(VOCAB)])
    for name, (values, kind) in tensors.items():
        stored = values if values.dtype == np.uint8 else gguf.quantize(values, kind)
        writer.add_tensor(name, stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", TOLERANCE, ids=lambda kind: kind.name)
def test_dequantises(kind: Types, tmp_path: Path) -> None:
    values = np.random.default_rng(0).uniform(-1, 1, (3, 64)).astype(np.float32)
    file = GgufFile(write_gguf(tmp_path / "a.gguf", {"w": (values, kind)}))
    read = read_tensor(file, file.tensors["w"])
    assert read.dtype == np.float32
    assert read.shape == values.shape
    assert np.abs(read - values).max() <= TOLERANCE[kind]


@pytest.mark.parametrize("kind", [Types.Q4_K, Types.Q6_K], ids=lambda kind: kind.name)
def test_dequantises_k_quants(kind: Types, tmp_path: Path) -> None:
    """One block of 256 values, its bits laid out as ggml's block_q4_K and block_q6_K, all quants and scales equal."""
    if kind == Types.Q4_K:  # d, dmin: half; 8 six-bit scales and minima in 12 bytes; 128 bytes of two quants
        scales = bytes([3] * 4 + [1] * 4 + [0x13] * 4)
        block = np.frombuffer(np.array([0.5, 0.25], np.float16).tobytes() + scales + bytes([0x75] * 128), np.uint8)
        low, high = 0.5 * 3 * 5 - 0.25 * 1, 0.5 * 3 * 7 - 0.25 * 1
        expected = np.array(([low] * 32 + [high] * 32) * 4, np.float32)
    else:  # 128 bytes of low bits, 64 of high bits, 16 scales, d: half
        block = np.frombuffer(
            bytes([0x11] * 128) + bytes([0b10101010] * 64) + bytes([2] * 16) + np.float16(0.5).tobytes(), np.uint8
        )
        expected = np.full(256, 0.5 * 2 * ((2 << 4 | 1) - 32), np.float32)
    file = GgufFile(write_gguf(tmp_path / "a.gguf", {"w": (block[None], kind)}))
    assert file.tensors["w"].shape == (1, 256)
    np.testing.assert_allclose(read_tensor(file, file.tensors["w"])[0], expected)


def test_an_unsupported_type_is_named(tmp_path: Path) -> None:
    file = GgufFile(write_gguf(tmp_path / "a.gguf", {"w": (np.zeros((1, 8), np.uint8), Types.I8)}))
    with pytest.raises(UnsupportedModelError, match="tensor w has the type I8"):
        read_tensor(file, file.tensors["w"])


def test_a_cut_file_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", {"token_embd.weight": (np.ones((64, 64), np.float32), Types.F32)})
    path.write_bytes(path.read_bytes()[:-1000])
    geometry = Geometry("LlamaForCausalLM", 1, 64, 4, 2, 16, 96, 64, 64, True, "float32")
    with pytest.raises(ModelSourceError, match=r"ends before the tensor token_embd\.weight"):
        GgufWeights(GgufFile(path), geometry)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output.weight", "lm_head.weight"),
        ("blk.12.attn_q.bias", "model.layers.12.self_attn.q_proj.bias"),
        ("blk.0.ffn_down.weight", "model.layers.0.mlp.down_proj.weight"),
        ("blk.0.ffn_gate_exps.weight", "blk.0.ffn_gate_exps.weight"),
        ("something", "something"),
    ],
)
def test_names_as_hugging_face_does(name: str, expected: str) -> None:
    assert hugging_face_name(name) == expected


def permute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp's converter: halves of a head to interleaved pairs."""
    halves = weight.reshape(num_heads, 2, -1, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def random_layer(rng: np.random.Generator) -> dict[str, np.ndarray]:
    shapes = {
        "attn_norm": (HIDDEN,), "attn_q": (HEADS * HEAD_DIM, HIDDEN), "attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
        "attn_v": (KV_HEADS * HEAD_DIM, HIDDEN), "attn_output": (HIDDEN, HEADS * HEAD_DIM), "ffn_norm": (HIDDEN,),
        "ffn_gate": (MLP, HIDDEN), "ffn_up": (MLP, HIDDEN), "ffn_down": (HIDDEN, MLP),
    }  # fmt: skip
    return {f"blk.0.{name}.weight": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


LLAMA_PAIRS = {
    "llama__block_count": 1, "llama__embedding_length": HIDDEN, "llama__attention__head_count": HEADS,
    "llama__attention__head_count_kv": KV_HEADS, "llama__feed_forward_length": MLP, "llama__context_length": 64,
    "llama__attention__layer_norm_rms_epsilon": 1e-5, "llama__rope__dimension_count": HEAD_DIM,
}  # fmt: skip


def test_a_whole_model_loads_with_its_rows_in_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    plain = {
        "token_embd.weight": rng.normal(size=(VOCAB, HIDDEN)).astype(np.float32),
        "output_norm.weight": rng.normal(size=HIDDEN).astype(np.float32),
        **random_layer(rng),
    }
    stored = {name: (values, Types.F32) for name, values in plain.items()}
    stored["blk.0.attn_q.weight"] = (permute(plain["blk.0.attn_q.weight"], HEADS), Types.F32)
    stored["blk.0.attn_k.weight"] = (permute(plain["blk.0.attn_k.weight"], KV_HEADS), Types.F32)
    path = write_gguf(tmp_path / "a.gguf", stored, **LLAMA_PAIRS)
    files = ModelFiles("", path)
    loaded = load_model(
        files, read_geometry(path), torch.float32, torch.device("cpu"), "none", lambda fraction, text: None
    )
    columns = loaded.model.get_submodule("model.layers.0.self_attn.qkv_proj")(torch.eye(HIDDEN))
    expected = np.concatenate([plain[f"blk.0.attn_{part}.weight"] for part in "qkv"])
    torch.testing.assert_close(columns.T, torch.from_numpy(expected), atol=1e-6, rtol=1e-6)


def test_a_part_of_a_tensor_is_that_of_the_whole_with_its_rows_in_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    stored = {name: (values, Types.Q8_0) for name, values in random_layer(rng).items()}
    stored |= {name: (values, Types.F32) for name, (values, _) in stored.items() if values.ndim == 1}
    stored["token_embd.weight"] = (rng.normal(size=(VOCAB, HIDDEN)).astype(np.float32), Types.F32)
    path = write_gguf(tmp_path / "a.gguf", stored, **LLAMA_PAIRS)
    part = slice(7, 50), slice(16, 48)
    for tensor in GgufWeights(GgufFile(path), read_geometry(path)):
        whole = tensor.read()
        assert tensor.shape == whole.shape
        torch.testing.assert_close(tensor.read(part[: whole.dim()]), whole[part[: whole.dim()]], rtol=0, atol=0)


def convert_to_gguf(folder: Path, architecture: str, path: Path) -> Path:
    """What llama.cpp's converter makes of a folder of an architecture whose rows it leaves alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    config = model.config
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.upper()), config.num_hidden_layers)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    tensors = {
        names.get_name(name, try_suffixes=(".weight", ".bias")): (parameter.detach().numpy(), Types.F32)
        for name, parameter in model.state_dict().items()
        if name not in tied
    }
    pairs = {
        "block_count": config.num_hidden_layers, "embedding_length": config.hidden_size,
        "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads,
        "feed_forward_length": config.intermediate_size, "context_length": config.max_position_embeddings,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps, "rope.freq_base": 10_000.0,
        "vocab_size": config.vocab_size,
    }  # fmt: skip
    if head_dim := getattr(config, "head_dim", None):
        pairs |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    prefixed = {f"{architecture}.{key}": value for key, value in pairs.items()}
    return write_gguf(path, tensors, architecture=architecture, **prefixed)


@pytest.mark.parametrize(
    ("family", "fields"),
    [("Qwen2", {}), ("Qwen2", {"tie_word_embeddings": True}), ("Qwen3", {}), ("Qwen3", {"tie_word_embeddings": True})],
)
def test_qwen_equals_transformers(family, fields, tiny_model_dir, tmp_path: Path) -> None:
    folder = tiny_model_dir(family, **fields)
    path = convert_to_gguf(folder, family.lower(), tmp_path / "a.gguf")
    assert replace(read_geometry(path), dtype="") == replace(read_geometry(folder), dtype="")
    prompts = random_prompts(131, [30])
    logits = PagedRunner(load(path).model, prompts).run([13, 1])
    torch.testing.assert_close(logits[0], reference_logits(folder, prompts)[0], atol=1e-4, rtol=1e-4)


def test_rope_factors_become_part_of_the_configuration(tmp_path: Path) -> None:
    factors = np.array([1, 2, 3, 4, 5, 6, 7, 8], np.float32)
    path = write_gguf(tmp_path / "a.gguf", {"rope_freqs.weight": (factors, Types.F32)}, **LLAMA_PAIRS)
    scaling = config_from_gguf(GgufFile(path))["rope_scaling"]
    assert scaling == {"rope_type": "factors", "frequency_factors": tuple(factors.tolist())}


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ({}, None),
        ({"llama__rope__scaling__type": "none"}, None),
        ({"llama__rope__scale_linear": 4.0}, ("linear", 4.0)),
        ({"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 2.0}, ("linear", 2.0)),
        ({"llama__rope__scaling__type": "yarn", "llama__rope__scaling__factor": 8.0}, ("yarn", 8.0)),
    ],
    ids=["absent", "none", "old linear", "linear", "yarn"],
)
def test_rope_scaling_is_translated(pairs, expected, tmp_path: Path) -> None:
    config = config_from_gguf(GgufFile(write_gguf(tmp_path / "a.gguf", {}, **LLAMA_PAIRS, **pairs)))
    scaling = config["rope_scaling"]
    assert (scaling and (scaling["rope_type"], scaling["factor"])) == expected
    assert math.isclose(config["partial_rotary_factor"], 1.0)


def test_unknown_rope_scaling_is_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", {}, **LLAMA_PAIRS, llama__rope__scaling__type="longrope")
    with pytest.raises(UnsupportedModelError, match="'longrope'"):
        config_from_gguf(GgufFile(path))
