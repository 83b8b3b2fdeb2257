"""Model families: one file each, found by the decorator `@register_model`.

A family puts layers together as its geometry and configuration say; all then answer `forward` and `compute_logits`. It
knows nothing of files, requests or scheduling.
"""

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar, Self, TypeVar

import torch
from octavo_kernels.ops.attention_metadata import AttentionMetadata
from torch import nn

from octavo_engine.errors import UnsupportedModelError
from octavo_engine.geometry import Geometry
from octavo_engine.layers.decoder import Decoder
from octavo_engine.layers.embedding import OutputLayer
from octavo_engine.layers.layer import Layer
from octavo_engine.parallel import Pipeline, Ranks

ModelType = TypeVar("ModelType", bound="Model")


class Model(nn.Module, ABC):
    """A decoder with its output layer. Tokens of all requests lie one after the other, without padding.

    Parameters bear the names of LLaMA's checkpoints, where a layer that stacks several weights into one says which in
    its `parts`; a family with other names translates them.
    """

    # A component of the checkpoint's dotted names -> the one here; absent: the same.
    checkpoint_names: ClassVar[Mapping[str, str]] = {}

    def __init__(self, geometry: Geometry, decoder: Decoder) -> None:
        super().__init__()
        self.geometry = geometry
        self.model = decoder
        tied = decoder.embed_tokens if geometry.tie_word_embeddings else None
        self.lm_head = OutputLayer(geometry.hidden_size, geometry.vocab_size, tied_to=tied)
        self._has_logits = True

    @classmethod
    @abstractmethod
    def from_config(cls, geometry: Geometry, config: Mapping[str, object], max_model_len: int) -> Self:
        """Build it on torch's current device in torch's default type, weights unset.

        config: the fields of `config.json`
        Raises UnsupportedModelError for a feature that it does not have.
        """

    @classmethod
    def own_name(cls, name: str) -> str:
        """The parameter that the checkpoint's tensor `name` belongs to."""
        return ".".join(cls.checkpoint_names.get(component, component) for component in name.split("."))

    def shard(self, ranks: Ranks) -> None:
        """Keep what one rank holds, before anything has memory; in the place of other stages' modules is nothing."""
        if ranks.pipeline:
            self._keep_stage(ranks.pipeline)
        if ranks.tensor:
            for module in reversed(list(self.modules())):  # those within others first
                if isinstance(module, Layer):
                    module.shard(ranks.tensor)

    def _keep_stage(self, pipeline: Pipeline) -> None:
        self.model.keep_stage(pipeline)
        self._has_logits = pipeline.is_last
        is_looked_up = pipeline.is_first or (pipeline.is_last and self.geometry.tie_word_embeddings)
        if not is_looked_up:
            self.model.embed_tokens = nn.Identity()  # type: ignore[assignment]
        if not pipeline.is_last:
            self.lm_head = nn.Identity()  # type: ignore[assignment]

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """Hidden states after the final norm, [num_tokens, hidden_size].

        input_ids, positions: [num_tokens] int64
        kv_cache: [num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim]; this step's part is written
        """
        hidden: torch.Tensor = self.model(input_ids, positions, kv_cache, metadata)
        return hidden

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[num_rows, hidden_size] -> [num_rows, vocab_size]; zeros before the last stage, which samples for all."""
        if not self._has_logits:
            return hidden.new_zeros(len(hidden), self.geometry.vocab_size)
        logits: torch.Tensor = self.lm_head(hidden)
        return logits


class ModelRegistry:
    """Architecture (the class name in config.json) -> the class that serves it."""

    def __init__(self) -> None:
        self._classes: dict[str, type[Model]] = {}

    def register(self, *architectures: str) -> Callable[[type[ModelType]], type[ModelType]]:
        """A class decorator. Raises ValueError for an architecture that another class has."""

        def decorate(model_class: type[ModelType]) -> type[ModelType]:
            for architecture in architectures:
                if architecture in self._classes:
                    other = self._classes[architecture].__name__
                    raise ValueError(f"{architecture} is registered by {other} and by {model_class.__name__}")
                self._classes[architecture] = model_class
            return model_class

        return decorate

    @property
    def architectures(self) -> frozenset[str]:
        """Those that have a class."""
        return frozenset(self._classes)

    def find(self, architecture: str) -> type[Model]:
        """The class for an architecture. Raises UnsupportedModelError that lists what is known."""
        if architecture not in self._classes:
            known = ", ".join(sorted(self._classes))
            raise UnsupportedModelError(f"the architecture {architecture} is not supported; supported: {known}")
        return self._classes[architecture]


MODELS = ModelRegistry()
register_model = MODELS.register


def find_model_class(architecture: str) -> type[Model]:
    """The class for an architecture, after importing every module of this package.

    Raises UnsupportedModelError that lists what is known; an import error of a module is not hidden.
    """
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        importlib.import_module(module.name)
    return MODELS.find(architecture)
