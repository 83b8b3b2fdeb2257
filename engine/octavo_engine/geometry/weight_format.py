"""`quantization_config` of a config.json -> how the weights of linear layers are stored."""

from octavo_engine.errors import UnsupportedModelError
from octavo_engine.geometry.fields import Config, count, flag, part
from octavo_engine.geometry.shapes import WeightFormat

_KNOWN = "fp8, awq, gptq, compressed-tensors"


def read_weight_format(config: Config) -> WeightFormat | None:
    """None for a checkpoint that is not quantised.

    Raises UnsupportedModelError for a method whose bytes are not known.
    """
    settings = part(config, "quantization_config")
    if not settings:
        return None
    method = settings.get("quant_method")
    if method == "fp8":
        return _fp8(settings)
    if method in ("awq", "gptq"):
        return _grouped(str(method), settings)
    if method == "compressed-tensors":
        return _compressed_tensors(settings)
    raise UnsupportedModelError(f"config.json: the quantisation {method!r} is not known; known: {_KNOWN}")


def _fp8(settings: Config) -> WeightFormat:
    """A float32 scale for each block; without blocks one for each weight."""
    block = settings.get("weight_block_size")
    if block is None:
        return WeightFormat("fp8", 8, group_rows=0, scale_bytes=4)
    if not isinstance(block, list | tuple) or len(block) != 2 or not all(isinstance(n, int) and n > 0 for n in block):
        raise UnsupportedModelError(f"config.json: weight_block_size must be two positive integers, not {block!r}")
    return WeightFormat("fp8", 8, group_columns=block[1], group_rows=block[0], scale_bytes=4)


def _grouped(method: str, settings: Config) -> WeightFormat:
    """Packed integers; a float16 scale and a packed zero point for each output of a group, and GPTQ's group indices."""
    bits = count(settings, "bits", 4)
    if bits not in (2, 3, 4, 8):
        raise UnsupportedModelError(f"config.json: {method} with {bits} bits is not known; known: 2, 3, 4, 8")
    index_bytes = 4 if method == "gptq" else 0
    return WeightFormat(method, bits, _group_size(settings), zero_point_bits=bits, index_bytes=index_bytes)


def _compressed_tensors(settings: Config) -> WeightFormat:
    """The first group of layers, which in published checkpoints is all linear layers but the output."""
    groups = part(settings, "config_groups")
    weights = part(part(groups, next(iter(groups), "group_0")), "weights")
    bits = count(weights, "num_bits")
    if bits not in (4, 8):
        raise UnsupportedModelError(f"config.json: compressed-tensors with {bits} bits is not known; known: 4, 8")
    zero_point_bits = 0 if flag(weights, "symmetric", True) else bits
    is_per_tensor = weights.get("strategy") == "tensor"
    return WeightFormat(
        "compressed-tensors",
        bits,
        0 if is_per_tensor else _group_size(weights),
        group_rows=0 if is_per_tensor else 1,
        zero_point_bits=zero_point_bits,
    )


def _group_size(settings: Config) -> int:
    """Inputs that share a scale; -1 and null mean all of a row, which is 0 here."""
    size = settings.get("group_size")
    return 0 if size is None or size == -1 else count(settings, "group_size")
