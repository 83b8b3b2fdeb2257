"""Build a model and fill it: every parameter from the checkpoint exactly once."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from octavo_kernels.native import cpu_kernels
from octavo_kernels.ops.linear import Quantization, activation_dtype, choose_linear
from torch import nn

from octavo_engine.config import LoadFormat
from octavo_engine.errors import UnsupportedModelError
from octavo_engine.geometry import Geometry
from octavo_engine.gguf_file import GgufFile
from octavo_engine.layers.embedding import Embedding, OutputLayer
from octavo_engine.layers.linear import FusedHeads, Linear
from octavo_engine.layers.norm import Norm
from octavo_engine.loading.dummy_weights import fill_dummy_parameters
from octavo_engine.loading.gguf_weights import GgufWeights
from octavo_engine.loading.kv_scales import take_kv_scale
from octavo_engine.loading.model_config import config_from_gguf, read_model_config
from octavo_engine.loading.safetensors_weights import SafetensorsWeights
from octavo_engine.loading.upload import ProgressCallback, Uploader
from octavo_engine.loading.weight_source import Part, StoredTensor, WeightSource
from octavo_engine.model_source import ModelFiles
from octavo_engine.models import Model, find_model_class
from octavo_engine.parallel import Ranks

# Buffers that old checkpoints store although they follow from the configuration.
_DERIVED = re.compile(r".*\.rotary_emb\.inv_freq|.*\.(attn|self_attn|attention)\.(masked_)?bias")
# The two names of one matrix, where embeddings are tied.
_EMBEDDING, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
_TIED = (_EMBEDDING, _OUTPUT)
_MAX_NAMES = 5


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """weight_bytes: memory of the parameters; kernels: op -> implementation that was chosen for it.

    under_way: what fills the parameters, to be waited for if that was left open
    """

    model: Model
    weight_bytes: int
    kernels: dict[str, str]
    under_way: Uploader


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """Where one of the checkpoint's tensors goes: rows `start` to `stop` of a module's parameter.

    shape: the checkpoint's; part: what this rank reads of it
    fused: how the checkpoint orders these rows, where it is not the module's order
    """

    module: nn.Module
    parameter: str
    start: int
    stop: int
    shape: tuple[int, ...]
    part: Part = ()
    fused: FusedHeads | None = None


def load_model(
    files: ModelFiles,
    geometry: Geometry,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Quantization,
    on_progress: ProgressCallback,
    *,
    max_model_len: int | None = None,
    load_format: LoadFormat = "auto",
    ranks: Ranks | None = None,
    may_return_early: bool = False,
) -> LoadedModel:
    """Build the model of `files` with its weights in `dtype` on `device`, packed for it and ready to run.

    quantization:  none, or int8 for linear layers with one scale per output channel
    max_model_len: longest context that will be served; default: the model's own
    load_format:   auto, or dummy for random weights, for which the folder needs nothing but config.json
    ranks:         those that the model is spread over, which `geometry`, that of the whole model, can be divided
                   among; None: this process has all of it. Of a file of safetensors a rank reads its share alone.
    may_return_early: with weights `under_way` to a GPU, whose addresses are all that capturing graphs takes
    Memory peaks at the weights plus one of the checkpoint's tensors, or two where their rows change places; for a GPU
    several are read at a time.
    Raises UnsupportedModelError if the architecture is unknown, or if tensors are missing, unexpected or mis-shaped;
    ModelSourceError if the files cannot be read.
    """
    gguf_file = GgufFile(files.path) if files.is_gguf else None
    config = config_from_gguf(gguf_file) if gguf_file else read_model_config(files)
    model_class = find_model_class(geometry.architecture)
    with torch.device("meta"):
        model = model_class.from_config(geometry, config, max_model_len or geometry.max_position_embeddings)
    if ranks:
        model.shard(ranks)
    if load_format == "dummy":
        fill_dummy_parameters(model, dtype, device, seed=0)
        under_way = Uploader(device)
    else:
        source: WeightSource = GgufWeights(gguf_file, geometry) if gguf_file else SafetensorsWeights(files.path)
        under_way = begin_to_fill(model, source, dtype, device)
        if not (may_return_early and device.type == "cuda" and quantization == "none" and _are_filled_in_place(model)):
            under_way.wait(on_progress)
    with under_way:
        model.to(device=device).eval()
        return pack_weights(model, dtype, device, quantization, under_way)


def _are_filled_in_place(model: Model) -> bool:
    """Whether filling takes no memory of the device beside the parameters'."""
    return not any(isinstance(module, Linear) and module.fused for module in model.modules())


def pack_weights(
    model: Model,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Quantization,
    under_way: Uploader,
) -> LoadedModel:
    """Lay out every multiplied weight for its device, and set the type of activations."""
    kernel = choose_linear(device, dtype, quantization)
    # Never quantised: greedy choices hang on the logits.
    output_kernel = choose_linear(device, dtype, "none")
    packed_bytes = 0
    for module in model.modules():
        if isinstance(module, Embedding):
            module.output_dtype = activation_dtype(dtype, device)
        elif isinstance(module, Norm):
            module.to(activation_dtype(dtype, device))
        elif isinstance(module, Linear):
            packed_bytes += module.pack(kernel)
        elif isinstance(module, OutputLayer):
            packed_bytes += module.pack(output_kernel)
    weight_bytes = packed_bytes + sum(parameter.nbytes for parameter in model.parameters())
    names = {"attention": _attention_kernel(dtype, device), "linear": kernel.name, "output": output_kernel.name}
    return LoadedModel(model, weight_bytes, names, under_way)


def _attention_kernel(dtype: torch.dtype, device: torch.device) -> str:
    """The implementation that attention chooses for this type of weights on this device."""
    if device.type == "cuda":
        return "triton"
    return "c" if activation_dtype(dtype, device) == torch.float32 and cpu_kernels() is not None else "torch"


def begin_to_fill(model: Model, source: WeightSource, dtype: torch.dtype, device: torch.device) -> Uploader:
    """Give each of the model's meta parameters memory, and have values brought there.

    Raises UnsupportedModelError that names tensors which are missing, unexpected, double or mis-shaped.
    """
    slots = dict(_slots(model))
    elsewhere = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, nn.Identity))
    missing, unexpected = set(slots), []
    shared: dict[str, StoredTensor] = {}  # what should be one matrix, where a checkpoint has it twice
    with Uploader(device) as uploader:
        for stored in source:
            name = model.own_name(stored.name)
            if model.geometry.tie_word_embeddings and name in _TIED:
                shared[name] = stored
            if name in missing:
                uploader.submit(_filling(slots[name], stored, dtype, device), stored.name, stored.num_bytes)
                missing.remove(name)
            elif name.startswith(elsewhere):
                pass  # another stage's
            elif not take_kv_scale(model, name, stored) and not _is_dispensable(stored.name, name, model.geometry):
                unexpected.append(stored.name)
        if shared.keys() == {_OUTPUT} and _EMBEDDING in missing:
            stored = shared[_OUTPUT]
            uploader.submit(_filling(slots[_EMBEDDING], stored, dtype, device), stored.name, stored.num_bytes)
            missing.remove(_EMBEDDING)
        elif len(shared) == len(_TIED) and _EMBEDDING in slots:
            uploader.submit(partial(_check_tied, shared), shared[_OUTPUT].name, shared[_OUTPUT].num_bytes)
        if missing:
            raise UnsupportedModelError(f"the checkpoint lacks {_some(sorted(missing))}")
        if unexpected:
            raise UnsupportedModelError(
                f"the checkpoint has tensors that {type(model).__name__} does not: {_some(unexpected)}"
            )
        return uploader


def _slots(model: Model) -> Iterator[tuple[str, Slot]]:
    """The name of each tensor that the model wants, and where it goes."""
    for path, module in model.named_modules():
        for parameter, tensor in module.named_parameters(recurse=False):
            if isinstance(module, Linear):
                yield from _linear_slots(path.rpartition(".")[0], module, parameter)
            elif isinstance(module, Embedding | OutputLayer):
                num_here = module.rows.stop - module.rows.start
                shape, part = (module.num_rows, *tensor.shape[1:]), _part((module.rows,), (module.num_rows,))
                yield f"{path}.{parameter}", Slot(module, parameter, 0, num_here, shape, part)
            else:
                yield f"{path}.{parameter}", Slot(module, parameter, 0, len(tensor), tuple(tensor.shape))


def _linear_slots(parent: str, module: Linear, parameter: str) -> Iterator[tuple[str, Slot]]:
    start = 0
    for name, num_rows in module.parts.items():
        shape: tuple[int, ...] = (num_rows, module.in_features)
        part = _part((module.rows[name], module.columns), shape)
        if parameter == "bias":
            shape, part = shape[:1], _part((module.rows[name],), shape)
        stop = start + module.num_own(name)
        yield f"{parent}.{name}.{parameter}", Slot(module, parameter, start, stop, shape, part, module.fused)
        start = stop


def _part(part: Part, shape: tuple[int, ...]) -> Part:
    """The same; nothing where that is the whole tensor, which is read faster."""
    is_whole = all(each == slice(0, size) for each, size in zip(part, shape, strict=False))
    return () if is_whole else part


def _filling(slot: Slot, stored: StoredTensor, dtype: torch.dtype, device: torch.device) -> Callable[[Uploader], None]:
    """What fills the slot, once its parameter has memory."""
    if stored.shape != slot.shape:
        raise UnsupportedModelError(
            f"the checkpoint's {stored.name} has the shape {stored.shape}; the configuration asks for {slot.shape}"
        )
    parameter = slot.module.get_parameter(slot.parameter)
    if parameter.is_meta:
        memory = torch.empty(parameter.shape, dtype=dtype, device=device)
        if isinstance(slot.module, Embedding | OutputLayer):
            memory[slot.stop :].zero_()  # what pads a rank's share
        parameter = nn.Parameter(memory, requires_grad=False)
        slot.module.register_parameter(slot.parameter, parameter)
    rows = parameter[slot.start : slot.stop]

    def fill(uploader: Uploader) -> None:
        tensor = stored.read(slot.part)
        if not tensor.is_floating_point():
            raise UnsupportedModelError(f"the checkpoint's {stored.name} holds {tensor.dtype}, which is not supported")
        if slot.fused:
            rows.copy_(slot.fused.stack(uploader.to_device(tensor)))
        else:
            uploader.copy(rows, tensor)

    return fill


def _check_tied(shared: Mapping[str, StoredTensor], _: Uploader) -> None:
    """Where they differ transformers takes both, whatever the configuration says; the memory plan has room for one."""
    if not torch.equal(shared[_EMBEDDING].read(), shared[_OUTPUT].read()):
        raise UnsupportedModelError(
            f"the checkpoint's {shared[_OUTPUT].name} is not its {shared[_EMBEDDING].name}, though config.json says"
            " tie_word_embeddings: set it to false there"
        )


def _is_dispensable(stored_name: str, name: str, geometry: Geometry) -> bool:
    """Tensors that a checkpoint may hold though the model has no use for them; `name` is the model's."""
    return bool(_DERIVED.fullmatch(stored_name)) or (geometry.tie_word_embeddings and name == _OUTPUT)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + more
