"""Qwen2, Qwen2.5 and Qwen3, dense: LLaMA's layers with a few additions.

Sources: Qwen2 (https://arxiv.org/abs/2407.10671) section 2.2.1, Qwen3 (https://arxiv.org/abs/2505.09388) section 2 and
the fields of their configurations.
"""

from octavo_engine.models import register_model
from octavo_engine.models.llama import Llama


@register_model("Qwen2ForCausalLM", "Qwen3ForCausalLM")
class Qwen(Llama):
    """Qwen2 has biases on queries, keys and values; Qwen3 normalises each query and key head; lower layers see all.

    The geometry says so, and a LLaMA's layers do as it says.
    """
