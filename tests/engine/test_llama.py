"""The LLaMA family against `transformers`, through the paged path: several requests, chunked at odd boundaries."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from engine.paged_runner import PagedRunner, load, random_prompts, reference_logits
from octavo_engine.errors import ModelSourceError, UnsupportedModelError
from octavo_engine.geometry import read_geometry
from octavo_engine.loading.loader import load_model
from octavo_engine.loading.safetensors_weights import SafetensorsWeights
from octavo_engine.model_source import ModelFiles
from octavo_engine.models import ModelRegistry, find_model_class

pytestmark = pytest.mark.usefixtures("one_thread")

LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
VARIANTS = {
    "grouped heads": ("Llama", {}),
    "tied embeddings": ("Llama", {"tie_word_embeddings": True}),
    "one head per KV head": ("Llama", {"num_key_value_heads": 6}),
    "one KV head": ("Llama", {"num_key_value_heads": 1}),
    "attention biases": ("Llama", {"attention_bias": True}),
    "mlp biases": ("Llama", {"mlp_bias": True}),
    "own head size": ("Llama", {"head_dim": 12}),
    "other theta and eps": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0},
                                      "rms_norm_eps": 1e-2}),
    "llama3 rope": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "linear rope": ("Llama", {"rope_parameters": LINEAR_ROPE}),
    "yarn rope": ("Llama", {"rope_parameters": YARN_ROPE}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral with a sliding window": ("Mistral", {"sliding_window": 9}),
}  # fmt: skip


@pytest.mark.parametrize(("architecture", "fields"), VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("chunk_sizes", [[1000], [5, 1, 7, 1, 2]], ids=["whole prompts", "odd chunks"])
def test_logits_equal_transformers(architecture, fields, chunk_sizes, tiny_llama_dir) -> None:
    folder = tiny_llama_dir(architecture, **fields)
    prompts = random_prompts(131, [1, 23, 64, 50])
    expected = reference_logits(folder, prompts)
    logits = PagedRunner(load(folder).model, prompts).run(chunk_sizes)
    for own, reference in zip(logits, expected, strict=True):
        assert own.dtype == torch.float32
        torch.testing.assert_close(own, reference, atol=1e-4, rtol=1e-4)


def test_reads_rope_theta_and_rope_scaling_of_older_configurations(tiny_llama_dir, edit_json) -> None:
    folder = tiny_llama_dir(rope_parameters=LLAMA3_ROPE)
    prompts = random_prompts(131, [40])
    expected = reference_logits(folder, prompts)
    old = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
    edit_json(folder / "config.json", rope_parameters=None, rope_theta=10_000.0, rope_scaling=old)
    logits = PagedRunner(load(folder).model, prompts).run([7])
    torch.testing.assert_close(logits[0], expected[0], atol=1e-4, rtol=1e-4)


def test_a_single_file_loads_like_shards(tiny_llama_dir) -> None:
    prompts = random_prompts(131, [20])
    sharded, single = tiny_llama_dir(seed=1), tiny_llama_dir(seed=2, shard_size="1GB")
    assert (sharded / "model.safetensors.index.json").is_file()
    assert (single / "model.safetensors").is_file()
    for folder in (sharded, single):
        logits = PagedRunner(load(folder).model, prompts).run([1000])
        torch.testing.assert_close(logits[0], reference_logits(folder, prompts)[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/other.safetensors", "..", ""])
def test_an_index_that_names_files_elsewhere_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ModelSourceError, match=r"names files outside its folder|names files that are missing"):
        SafetensorsWeights(tmp_path)


def test_progress_rises_to_one(tiny_llama_dir) -> None:
    folder = tiny_llama_dir()
    fractions: list[float] = []
    load_model(
        ModelFiles("", folder), read_geometry(folder), torch.float32, torch.device("cpu"), "none",
        lambda fraction, text: fractions.append(fraction),
    )  # fmt: skip
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert len(fractions) > 10


def test_weight_bytes_are_those_of_the_geometry(tiny_llama_dir) -> None:
    folder = tiny_llama_dir(attention_bias=True, mlp_bias=True)
    assert load(folder).weight_bytes == read_geometry(folder).num_parameters * 4


def rewrite_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


BROKEN = {
    "missing": (lambda tensors: tensors.pop("model.norm.weight"), "lacks model.norm.weight"),
    "missing part": (lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.weight"), "lacks .*1.self_attn.k"),
    "unexpected": (lambda tensors: tensors.update(extra=torch.ones(1)), "does not: extra"),
    "shape": (
        lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}),
        r"norm.weight has the shape \(3,\)",
    ),
    "integers": (
        lambda tensors: tensors.update({"model.norm.weight": torch.ones(48, dtype=torch.int8)}),
        "norm.weight holds torch.int8",
    ),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
def test_names_the_tensor_that_is_wrong(change, message, tiny_llama_dir) -> None:
    folder = tiny_llama_dir(shard_size="1GB")
    rewrite_tensors(folder, change)
    with pytest.raises(UnsupportedModelError, match=message):
        load(folder)


def test_ignores_what_follows_from_the_configuration(tiny_llama_dir) -> None:
    folder = tiny_llama_dir(shard_size="1GB", tie_word_embeddings=True)

    def add_derived(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    rewrite_tensors(folder, add_derived)
    load(folder)


def test_tied_embeddings_may_be_stored_under_either_name(tiny_llama_dir) -> None:
    folder, prompts = tiny_llama_dir(shard_size="1GB", tie_word_embeddings=True), random_prompts(131, [20])
    expected = reference_logits(folder, prompts)[0]
    rewrite_tensors(
        folder, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")})
    )
    torch.testing.assert_close(PagedRunner(load(folder).model, prompts).run([1000])[0], expected, atol=1e-4, rtol=1e-4)


def test_tied_embeddings_that_are_stored_apart_are_refused(tiny_llama_dir) -> None:
    folder = tiny_llama_dir(shard_size="1GB", tie_word_embeddings=True)

    def tear(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    rewrite_tensors(folder, tear)
    with pytest.raises(UnsupportedModelError, match=r"lm_head\.weight is not its model\.embed_tokens\.weight"):
        load(folder)


def test_a_missing_shard_is_named(tiny_llama_dir) -> None:
    folder = tiny_llama_dir()
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(ModelSourceError, match=shard.name):
        load(folder)


def test_a_damaged_shard_is_named(tiny_llama_dir) -> None:
    folder = tiny_llama_dir(shard_size="1GB")
    (folder / "model.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(ModelSourceError, match="not a readable safetensors file"):
        load(folder)


UNSUPPORTED = {
    "quantised": ({"quantization_config": {"quant_method": "gptq"}}, "quantised with gptq"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    "rope": ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "rope type 'longrope'"),
    "architecture": ({"architectures": ["NoSuchModel"]}, "NoSuchModel is not supported; supported: .*Llama.*Mistral"),
}


@pytest.mark.parametrize(("fields", "message"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_an_unsupported_feature_is_named(fields, message, tiny_llama_dir, edit_json) -> None:
    folder = tiny_llama_dir()
    edit_json(folder / "config.json", **fields)
    with pytest.raises(UnsupportedModelError, match=message):
        load(folder)


def test_two_classes_cannot_serve_one_architecture() -> None:
    registry = ModelRegistry()
    registry.register("A", "B")(find_model_class("LlamaForCausalLM"))
    with pytest.raises(ValueError, match="B is registered by"):
        registry.register("B")(find_model_class("LlamaForCausalLM"))


def smollm2_reference(file: Path) -> torch.nn.Module:
    """`transformers`' model, filled by hand from the gguf package's reader."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
    )  # fmt: skip
    reader = gguf.GGUFReader(file)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 30)
    model = LlamaForCausalLM(config).eval()
    own = {names.get_name(name.rpartition(".")[0]): name for name in model.state_dict() if name != "lm_head.weight"}
    weights = {}
    for tensor in reader.tensors:
        name = own[tensor.name.rpartition(".")[0]]
        weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        if "q_proj" in name or "k_proj" in name:
            weight = weight.view(-1, 32, 2, 576).transpose(1, 2).reshape(weight.shape)
        weights[name] = weight
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert missing == ["lm_head.weight"]
    assert not unexpected
    return model


@pytest.mark.model
def test_smollm2_equals_transformers(smollm2_path: Path) -> None:
    prompts = random_prompts(49152, [3, 70, 41])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, about the gguf reader's read-only memory map
        reference = smollm2_reference(smollm2_path)
    logits = PagedRunner(load(smollm2_path).model, prompts).run([33, 1, 8])
    with torch.inference_mode():
        for own, prompt in zip(logits, prompts, strict=True):
            torch.testing.assert_close(own, reference(torch.tensor([prompt])).logits[0], atol=1e-3, rtol=1e-3)
