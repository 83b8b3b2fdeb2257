"""Octavo behind the interface of the offline comparison with vLLM and SGLang: prompts of token ids in, answers out.

Name it there as `tools.bench_peers.gpu.octavo_adapter:Octavo`, from the repository's root. Weights are random unless
the option `load_format` is `auto`; every other option is a field of the engine's configuration.
"""

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[3]
_SITE = Path(os.environ.get("OCTAVO_SITE", Path(tempfile.gettempdir()) / "site"))
# Options of other engines' profilers that the comparison hands to every engine.
_FOREIGN_OPTIONS = ("profile_dir", "profile_delay", "profile_steps")


class Octavo:
    """The engine's core in this process. `max_len` is the longest context in tokens."""

    can_profile = False

    def __init__(self, model_dir: str, max_len: int, opts: dict[str, Any]) -> None:
        sys.path += [str(path) for path in (_ROOT / "engine", _ROOT / "kernels", _SITE)]
        from octavo_engine.config import load_config
        from octavo_engine.core import EngineCore
        from octavo_engine.garbage_collection import spare_old_objects

        options = {name: value for name, value in opts.items() if name not in _FOREIGN_OPTIONS}
        fields = {"model": model_dir, "max_model_len": max_len, "load_format": "dummy", **options}
        self._core = EngineCore(load_config(fields, {}), lambda phase: None)
        spare_old_objects()  # as an engine process does

    def generate(self, prompts: Sequence[Sequence[int]], out_len: int) -> list[list[int]]:
        """Greedy answers of exactly `out_len` tokens."""
        from octavo_engine.bench.offline import generate
        from octavo_engine.bench.workloads import BenchRequest

        return generate(self._core, [BenchRequest(tuple(prompt), out_len) for prompt in prompts])

    def info(self) -> dict[str, Any]:
        """What a reader needs to judge the figures."""
        import octavo_engine

        ready = self._core.ready()
        names = ("max_num_seqs", "max_num_batched_tokens", "num_kv_blocks", "block_size", "hardware", "kernels")
        return {"version": octavo_engine.__version__, **{name: getattr(ready, name) for name in names}}

    def close(self) -> None:
        """Let go of the engine and its memory."""
        del self._core
