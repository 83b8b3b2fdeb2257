import itertools
import json
from pathlib import Path

import pytest
import torch
from octavo_engine.bench import checkpoint
from octavo_engine.bench.checkpoint import TensorShape, tensor_shapes, write_configuration, write_safetensors
from octavo_engine.bench.checkpoint import write_weights as write_weights_of
from octavo_engine.bench.models import find_model, model_address
from octavo_engine.bench.shapes import SHAPES, shape_config
from octavo_engine.config import EngineConfig
from octavo_engine.core import EngineCore
from octavo_engine.errors import ConfigError
from octavo_engine.loading.tokenizer import load_tokenizer
from octavo_engine.model_source import ModelFiles
from octavo_engine.protocol import AddRequest, SamplingParams
from safetensors.torch import load_file


def write(folder: Path, shape: str = "tiny-llama", *, seed: int = 0, dtype: str = "float32") -> Path:
    config = {**shape_config(shape), "dtype": dtype}
    write_configuration(config, folder)
    write_weights_of(config, folder, seed=seed, dtype=dtype, on_progress=lambda fraction, file: None)
    return folder


def octavo_logprobs(folder: Path, prompt: list[int]) -> torch.Tensor:
    """Log probability of each prompt token but the first, as the engine computes it."""
    config = EngineConfig(model=str(folder), device="cpu", dtype="float32", max_model_len=64, num_threads=1)
    core = EngineCore(config, lambda phase: None)
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    core.add_request(AddRequest("one", prompt, params, 0.0))
    outputs = []
    while core.has_work:
        outputs += core.step().outputs
    return torch.tensor([each.logprob for each in (outputs[0].prompt_logprobs or [])[1:] if each])


def test_octavo_and_transformers_compute_the_same_from_it(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = write(tmp_path, seed=3)
    prompt = torch.randint(320, (1, 24), generator=torch.Generator().manual_seed(1))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = model(prompt).logits[0, :-1].log_softmax(-1).gather(1, prompt[0, 1:, None])[:, 0]
    torch.testing.assert_close(octavo_logprobs(folder, prompt[0].tolist()), expected, atol=1e-5, rtol=1e-5)


def test_weights_have_their_distribution_norms_are_one(tmp_path: Path) -> None:
    tensors = load_file(write(tmp_path) / "model-00001-of-00001.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    assert embedding.shape == (320, 64)
    assert embedding.mean().abs() < 1e-3
    assert embedding.std() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(tensors["model.norm.weight"], torch.ones(64))


def test_values_follow_from_seed_and_name_alone(tmp_path: Path) -> None:
    first, second = TensorShape("a.weight", (33, 7)), TensorShape("b.weight", (5, 5))
    write_safetensors(tmp_path / "both", [first, second], seed=1, dtype="float32")
    write_safetensors(tmp_path / "one", [second], seed=1, dtype="float32")
    write_safetensors(tmp_path / "other", [second], seed=2, dtype="float32")
    both, one, other = (load_file(tmp_path / name) for name in ("both", "one", "other"))
    assert torch.equal(both["b.weight"], one["b.weight"])
    assert not torch.equal(one["b.weight"], other["b.weight"])


def test_large_tensors_are_drawn_in_pieces_without_repeating(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_PIECE_ELEMENTS", 1000)
    write_safetensors(tmp_path / "file", [TensorShape("a.weight", (50, 61))], seed=0, dtype="bfloat16")
    values = load_file(tmp_path / "file")["a.weight"].flatten()
    assert values.dtype == torch.bfloat16
    pieces = values.split(1000)
    assert len(pieces) == 4
    assert not any(torch.equal(a[:50], b[:50]) for a, b in itertools.pairwise(pieces))


def test_shards_are_bounded_and_indexed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 100_000)
    folder = write(tmp_path)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = {file.name: set(load_file(file)) for file in folder.glob("*.safetensors")}
    assert len(files) > 3
    assert all(name in files[file] for name, file in index["weight_map"].items())
    assert sum(map(len, files.values())) == len(index["weight_map"])


def test_a_tied_output_layer_is_not_stored() -> None:
    names = {tensor.name for tensor in tensor_shapes({**SHAPES["tiny-llama"], "tie_word_embeddings": True})}
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_experts_are_stored_one_by_one_as_published_checkpoints_do() -> None:
    shapes = {tensor.name: tensor.shape for tensor in tensor_shapes(SHAPES["tiny-qwen3-moe"])}
    assert shapes["model.layers.1.mlp.experts.7.gate_proj.weight"] == (32, 64)
    assert shapes["model.layers.1.mlp.experts.7.down_proj.weight"] == (64, 32)
    assert shapes["model.layers.0.mlp.gate.weight"] == (8, 64)


@pytest.mark.parametrize(
    ("shape", "billions"),
    [
        ("llama-8b", 8.03),
        ("llama-1b", 1.24),
        ("qwen3-0.6b", 0.60),
        ("qwen3-30b-a3b", 30.53),
        ("pythia-1.4b", 1.41),
        ("falcon-7b", 6.92),
    ],
)
def test_named_shapes_have_the_parameters_of_the_models_that_they_follow(shape: str, billions: float) -> None:
    assert sum(tensor.num_elements for tensor in tensor_shapes(SHAPES[shape])) / 1e9 == pytest.approx(
        billions, abs=0.006
    )


def test_the_tokenizer_turns_ids_into_words_and_back(tmp_path: Path) -> None:
    write_configuration(SHAPES["tiny-llama"], tmp_path)
    tokenizer = load_tokenizer(ModelFiles(str(tmp_path), tmp_path))
    assert tokenizer.decode([5, 310, 7]).split() == ["w5", "w310", "w7"]
    assert tokenizer.encode("w5 w310 w7") == [5, 310, 7]
    assert tokenizer.eos_token_ids == {1}


def test_a_configuration_that_no_model_has_is_told() -> None:
    with pytest.raises(ConfigError, match="transformers makes no model"):
        tensor_shapes({"model_type": "no-such-model"})
    with pytest.raises(ConfigError, match="tiny-llama"):
        shape_config("llama")


def test_a_shape_has_a_folder_only_while_it_is_used() -> None:
    model = find_model("tiny-llama")
    with model_address(model) as address:
        assert json.loads((Path(address) / "config.json").read_text())["vocab_size"] == 320
    assert not Path(address).exists()
