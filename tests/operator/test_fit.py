"""What one node type makes of a spec: the engine's configuration and its memory."""

import pytest
from octavo_engine.config import load_config
from octavo_engine.errors import CapacityError
from octavo_operator.fit import fit
from octavo_operator.nodes import find_node_types
from operator_samples import LLAMA_8B, h100_node, node, spec


def fit_to(sample, **engine):
    (node_type,) = (each for each in find_node_types([sample]).types if each.is_gpu)
    return fit(spec(engine=engine), node_type, LLAMA_8B.geometry)


def test_an_8_bit_cache_holds_twice_the_tokens(tmp_path) -> None:
    limits = {"maxNumSeqs": 512, "maxModelLen": 8192}
    wide, narrow = fit_to(h100_node(), **limits), fit_to(h100_node(), kvCacheDtype="fp8", **limits)
    assert narrow.capacity.num_kv_blocks == pytest.approx(2 * wide.capacity.num_kv_blocks, rel=0.01)
    assert narrow.capacity.kv_block_bytes * 2 == wide.capacity.kv_block_bytes
    file = tmp_path / "engine.yaml"
    file.write_text(narrow.config.to_yaml())
    assert load_config({}, {}, file).kv_cache_dtype == "fp8"


def test_a_gpu_without_8_bit_floats_is_rejected_by_name() -> None:
    with pytest.raises(CapacityError, match=r"fp8 needs a GPU with 8-bit floats.*A100 80 GB SXM has none"):
        fit_to(node("a", product="NVIDIA-A100-SXM4-80GB", memory_mib=81_920, gpus=1), kvCacheDtype="fp8")
