"""The base of all layers."""

from typing import Any

from torch import nn

from octavo_engine.parallel import Group


class Layer(nn.Module):
    """A module whose call is its `forward`.

    Torch's call looks for hooks, which serving has no use for, at 7 microseconds each time on the CPUs that were
    measured: with eight layers in each of thirty blocks, a tenth of a small model's step.
    """

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "forward" in cls.__dict__:
            cls.__call__ = cls.forward  # type: ignore[method-assign]

    def shard(self, group: Group) -> None:
        """Keep this rank's share of the layer, before its weights have memory; a layer without one stays whole.

        Called after the submodules' own. A layer whose weights are divided overrides it.
        """
