"""What the library's matrix multiplication takes for each linear layer of a model, by number of rows.

The sum over a model's layers is what a step cannot beat without a better multiplication.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from octavo_engine.bench.timing import Work, median_s
from octavo_engine.geometry import Geometry

if TYPE_CHECKING:
    import torch

NUM_ROWS: Final = (1, 16, 64, 256, 512)
_CACHE_BYTES: Final = 400 << 20  # several times the largest cache: weights have to come from memory
_MAX_COPIES: Final = 8


@dataclass(frozen=True, slots=True)
class LinearShape:
    """`count` layers with a weight of [out_features, in_features]."""

    name: str
    out_features: int
    in_features: int
    count: int


@dataclass(frozen=True, slots=True)
class LinearTimes:
    """Microseconds of each shape's multiplication with `num_rows` rows, and milliseconds of all of a model's."""

    num_rows: int
    layer_us: dict[str, float]
    step_ms: float
    weights_gb_s: float


def linear_shapes(geometry: Geometry, config: Mapping[str, Any]) -> tuple[LinearShape, ...]:
    """A model's linear layers, projections of one input stacked. Experts are left out: no one multiplication does them.

    config: the fields of config.json
    """
    hidden, layers = geometry.hidden_size, geometry.num_layers
    heads = geometry.num_heads * geometry.head_dim
    attention = (
        LinearShape("qkv", geometry.num_qkv_features, hidden, layers),
        LinearShape("o", hidden, heads, layers),
    )
    output = LinearShape("output", geometry.vocab_size, hidden, 1)
    if config.get("num_experts") or config.get("num_local_experts"):
        return (*attention, output)
    mlp = (
        LinearShape("up", geometry.num_up_features, hidden, layers),
        LinearShape("down", hidden, geometry.intermediate_size, layers),
    )
    return (*attention, *mlp, output)


def measure_linears(
    shapes: Sequence[LinearShape], device: "torch.device", dtype: "torch.dtype", num_rows: Sequence[int] = NUM_ROWS
) -> list[LinearTimes]:
    """Time every shape with every number of rows."""
    return [_times(shapes, rows, device, dtype) for rows in num_rows]


def _times(shapes: Sequence[LinearShape], num_rows: int, device: "torch.device", dtype: "torch.dtype") -> LinearTimes:
    seconds = {shape.name: _linear_s(shape, num_rows, device, dtype) for shape in shapes}
    step_s = sum(seconds[shape.name] * shape.count for shape in shapes)
    num_weights = sum(shape.out_features * shape.in_features * shape.count for shape in shapes)
    layer_us = {name: each * 1e6 for name, each in seconds.items()}
    return LinearTimes(num_rows, layer_us, step_s * 1e3, num_weights * dtype.itemsize / step_s / 1e9)


def _linear_s(shape: LinearShape, num_rows: int, device: "torch.device", dtype: "torch.dtype") -> float:
    """Median seconds of one multiplication; weights rotate, so that none is in a cache."""
    import torch

    weight_bytes = shape.out_features * shape.in_features * dtype.itemsize
    num_copies = min(_MAX_COPIES, _CACHE_BYTES // weight_bytes + 1)
    weights = [
        torch.randn(shape.out_features, shape.in_features, dtype=dtype, device=device) for _ in range(num_copies)
    ]
    rows = torch.randn(num_rows, shape.in_features, dtype=dtype, device=device)
    result = torch.empty(num_rows, shape.out_features, dtype=dtype, device=device)

    def multiply_all() -> None:
        for weight in weights:
            torch.mm(rows, weight.t(), out=result)

    work = _captured(multiply_all) if device.type == "cuda" else multiply_all
    return median_s([work], device.type, num_warm_ups=2) / num_copies


def _captured(work: Work) -> Work:
    """The same work as a CUDA graph: without it, launches would take longer than small multiplications."""
    import torch

    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    replay: Work = graph.replay
    return replay
