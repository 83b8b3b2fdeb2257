"""What several devices would hold: shards that add up, the fewest that fit, and what cannot be divided."""

from dataclasses import replace

import pytest
from octavo_engine.capacity import GIB, Limits, find_parallelism, shard, weight_bytes
from octavo_engine.errors import CapacityError
from octavo_engine.geometry import Experts, Geometry, LatentAttention
from octavo_kernels.hardware import BY_NAME

LLAMA_70B = Geometry(
    "LlamaForCausalLM", 80, 8192, 64, 8, 128, 28672, 128256, 131072, tie_word_embeddings=False, dtype="bfloat16"
)
FALCON_7B = Geometry(
    "FalconForCausalLM", 32, 4544, 71, 1, 64, 18176, 65024, 2048, True, "bfloat16", has_gated_mlp=False
)
DEEPSEEK_V3 = Geometry(
    "DeepseekV3ForCausalLM", 61, 7168, 128, 128, 192, 18432, 129280, 163840, False, "bfloat16",
    experts=Experts(58, 256, 8, 2048, shared_intermediate_size=2048), latent=LatentAttention(512, 64, 128, 128, 1536),
)  # fmt: skip
H100 = BY_NAME["h100"]


def find(geometry: Geometry, hardware_name: str, devices_per_node: int = 8, **limits: int):
    hardware = BY_NAME[hardware_name]
    found = find_parallelism(
        geometry, hardware, hardware.memory_mib << 20, devices_per_node=devices_per_node,
        dtype="bfloat16", kv_cache_dtype="bfloat16", limits=Limits(**limits),
    )  # fmt: skip
    return found.tensor, found.pipeline


@pytest.mark.parametrize("tensor", [1, 2, 4, 8])
def test_shards_of_a_node_are_the_model_but_for_what_each_needs_whole(tensor: int) -> None:
    part = shard(LLAMA_70B, tensor=tensor)
    norms = LLAMA_70B.num_other_parameters
    assert tensor * (part.num_parameters - norms) == LLAMA_70B.num_parameters - norms
    assert tensor * part.kv_bytes_per_token("bfloat16") == LLAMA_70B.kv_bytes_per_token("bfloat16")


def test_a_kv_head_is_on_several_devices_where_there_are_too_few() -> None:
    assert shard(LLAMA_70B, tensor=16).num_kv_heads == 1


def test_compressed_keys_and_values_are_on_every_device() -> None:
    part = shard(DEEPSEEK_V3, tensor=8)
    assert part.kv_bytes_per_token("bfloat16") == DEEPSEEK_V3.kv_bytes_per_token("bfloat16")
    assert part.num_expert_parameters * 8 == DEEPSEEK_V3.num_expert_parameters


def test_stages_of_a_pipeline_share_the_layers_and_the_ends_one_embedding_each() -> None:
    part = shard(LLAMA_70B, pipeline=3)
    assert part.num_layers == 27
    assert part.num_embedding_parameters == LLAMA_70B.num_embedding_parameters // 2
    assert shard(DEEPSEEK_V3, pipeline=4).experts == replace(DEEPSEEK_V3.experts, num_layers=16)


@pytest.mark.parametrize(
    ("geometry", "parts", "sentence"),
    [
        (FALCON_7B, {"tensor": 2}, "71 heads cannot be divided among 2 devices"),
        (replace(LLAMA_70B, intermediate_size=28673), {"tensor": 2}, "28673 MLP features cannot be divided"),
        (replace(LLAMA_70B, num_heads=96, num_kv_heads=12), {"tensor": 8}, "12 KV heads cannot be divided among 8"),
        (LLAMA_70B, {"pipeline": 81}, "80 layers cannot be divided among 81 stages"),
    ],
)
def test_what_does_not_divide_is_named(geometry: Geometry, parts: dict[str, int], sentence: str) -> None:
    with pytest.raises(CapacityError, match=sentence):
        shard(geometry, **parts)


def test_the_fewest_devices_that_hold_the_model() -> None:
    """141 GB of weights; 90 % of an L4 are 22 GB, of an H100 77, of an H200 136, of a B200 173."""
    assert find(LLAMA_70B, "b200") == (1, 1)
    assert find(LLAMA_70B, "h200") == (2, 1)
    assert find(LLAMA_70B, "h100") == (2, 1)
    assert find(LLAMA_70B, "l4") == (8, 1)


def test_over_nodes_where_one_is_not_enough() -> None:
    """1,342 GB of weights: 16 H200 hold 2,171 GB usable; of an H100's 77 GB, 3 x 8 leave no room for a context."""
    assert find(DEEPSEEK_V3, "h200") == (8, 2)
    assert find(DEEPSEEK_V3, "b300") == (8, 1)
    tensor, pipeline = find(DEEPSEEK_V3, "h100")
    assert tensor == 8
    each = weight_bytes(shard(DEEPSEEK_V3, tensor=8, pipeline=pipeline), H100, "bfloat16")
    assert each < 0.9 * (H100.memory_mib << 20)
    fewer = weight_bytes(shard(DEEPSEEK_V3, tensor=8, pipeline=pipeline - 1), H100, "bfloat16")
    assert fewer + 4 * GIB > 0.9 * (H100.memory_mib << 20)


def test_heads_that_do_not_divide_leave_the_layers() -> None:
    assert find(FALCON_7B, "l4") == (1, 1)
    assert find(replace(FALCON_7B, num_layers=64), "l4") == (1, 2)


def test_what_nothing_holds_says_what_the_last_attempt_lacked() -> None:
    with pytest.raises(CapacityError, match=r"needs \d+\.\d GiB for a context of 131072 tokens"):
        find(replace(DEEPSEEK_V3, num_layers=16), "l4", devices_per_node=1, max_model_len=131072)
