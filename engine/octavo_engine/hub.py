"""Models of the Hugging Face hub, through its own client: downloads, headers by range requests, and what goes wrong.

Each way in which a hub can fail becomes one sentence, and one word. Torch-free; the client is imported when it is
needed, since that takes 0.3 s which a local model need not pay.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from octavo_engine.errors import ModelSourceError, SourceReason
from octavo_engine.stored_weights import INDEX_FILE, Header, StoredWeights, stored_weights

logger = logging.getLogger(__name__)

HUB_SCHEME = "hf://"

# What an engine reads of a repository. Others (original/, *.bin, onnx/) can be as large again, and so can the weights
# of Mistral's own runtime, which lie beside those of transformers.
CONFIG_FILES = ("config.json", "generation_config.json")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
WEIGHT_FILES = ("*.safetensors", INDEX_FILE)
UNREAD_FILES = ("*/*", "consolidated*")  # a pattern's star matches slashes too: original/model.safetensors

NO_WEIGHTS = "has no .safetensors weights; choose a repository that has them"
OFFLINE_PROBLEM = "is not in the cache and HF_HUB_OFFLINE is set: unset it, or download the model once beforehand"


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


def download_model(address: str, revision: str | None) -> Path:
    """The folder with all that an engine reads. Raises ModelSourceError."""
    folder = _fetch(address, revision, [*CONFIG_FILES, *TOKENIZER_FILES, *WEIGHT_FILES])
    if not any(folder.glob("*.safetensors")):
        raise ModelSourceError(f"{address} {NO_WEIGHTS}", reason="ModelNotFound")
    return folder


def download_config(address: str, revision: str | None) -> Path:
    """The folder with `config.json`, and with the index of the weights where they are sharded.

    Raises ModelSourceError.
    """
    return _fetch(address, revision, ["config.json", INDEX_FILE])


def read_hub_weights(address: str, revision: str | None, folder: Path) -> StoredWeights | None:
    """What the headers on the hub say; None where they cannot be had, though `config.json` could.

    Raises ModelSourceError if there are no safetensors.
    """
    from huggingface_hub import HfApi, errors

    repository = parse_hub_address(address, revision)

    def read_header(name: str) -> Header:
        """By HTTP range request."""
        found = HfApi().parse_safetensors_file_metadata(repository.name, name, revision=repository.revision)
        return {key: (each.dtype, each.data_offsets) for key, each in found.tensors.items()}

    try:
        return stored_weights(folder / INDEX_FILE, read_header)
    except errors.EntryNotFoundError:
        if _has_weights(repository):
            return None
        raise ModelSourceError(f"{address} {NO_WEIGHTS}", reason="ModelNotFound") from None
    except (errors.HfHubHTTPError, errors.SafetensorsParsingError, errors.OfflineModeIsEnabled, _transport_error()):
        logger.info("model=%s the headers of its weights cannot be read", address)
        return None


def _has_weights(repository: HubRepository) -> bool:
    """Whether there are safetensors of another name than the usual one; True where the hub does not say."""
    from huggingface_hub import HfApi, errors

    try:
        names = HfApi().list_repo_files(repository.name, revision=repository.revision)
    except (errors.HfHubHTTPError, _transport_error()):
        return True
    return any("/" not in name and name.endswith(".safetensors") for name in names)


def _fetch(address: str, revision: str | None, patterns: list[str]) -> Path:
    """The folder with those of the repository's files that match; it has a config.json.

    A hub that cannot be reached is noticed at once, and its cached files serve then.
    """
    from huggingface_hub import snapshot_download

    repository = parse_hub_address(address, revision)

    def download() -> Path:
        folder = snapshot_download(
            repository.name,
            revision=repository.revision,
            allow_patterns=patterns,
            ignore_patterns=list(UNREAD_FILES),
        )
        return Path(folder)

    folder = _explain_hub_errors(address, download)
    if not (folder / "config.json").is_file():
        problem = "has no config.json, so it is not a model that Octavo can serve"
        raise ModelSourceError(f"{address} {problem}", reason="ModelNotFound")
    return folder


def _explain_hub_errors(address: str, download: Callable[[], Path]) -> Path:
    """Run `download`; turn each way in which a hub can fail into one sentence."""
    from huggingface_hub import constants, errors

    reason: SourceReason = "ModelNotFound"
    try:
        return download()
    except errors.GatedRepoError:
        reason = "ModelAccessDenied"
        problem = "is gated: accept its terms on its page, and give a token that may read it in HF_TOKEN"
    except errors.RepositoryNotFoundError:
        problem = "does not exist, or is private: check the spelling, or give a token that may read it in HF_TOKEN"
    except errors.RevisionNotFoundError:
        problem = "has no such revision: name a branch, a tag or a commit that it has"
    except errors.HFValidationError as error:
        problem = f"is no name of a repository: {str(error).splitlines()[0]}"
    except errors.LocalEntryNotFoundError as error:
        problem, reason = _why_not_fetched(error)
    except errors.EntryNotFoundError:
        problem, reason = "lost a file while it was downloaded: try again", "HubUnavailable"
    except errors.OfflineModeIsEnabled:
        problem, reason = OFFLINE_PROBLEM, "HubUnavailable"
    except errors.HfHubHTTPError as error:
        problem, reason = _status_problem(error.response.status_code)
    except _transport_error() as error:
        problem = f"could not be downloaded from {constants.ENDPOINT} ({type(error).__name__}): check the network"
        reason = "HubUnavailable"
    except OSError as error:
        problem = f"could not be stored in {constants.HF_HUB_CACHE}: {error.strerror or error}"
        reason = "ModelUnreadable"
    raise ModelSourceError(f"{address} {problem}", reason=reason)


def _transport_error() -> type[Exception]:
    """Releases differ in the library that carries their requests, and so in the class of its errors."""
    from huggingface_hub import errors

    return cast("type[Exception]", errors.HfHubHTTPError.__bases__[0])


def _why_not_fetched(error: BaseException) -> tuple[str, SourceReason]:
    """The client reports every failed request as a missing cache entry; what happened is the error's cause.

    Returns the problem, and the reason in a word.
    """
    from huggingface_hub import constants, errors

    if constants.is_offline_mode():
        return OFFLINE_PROBLEM, "HubUnavailable"
    if isinstance(error.__cause__, errors.HfHubHTTPError):
        return _status_problem(error.__cause__.response.status_code)
    return (
        f"is not in the cache and {constants.ENDPOINT} cannot be reached: check the network and HF_ENDPOINT, "
        "or serve a folder that holds the model",
        "HubUnavailable",
    )


# HTTP status of the hub -> the reason in a word, and what to do.
_STATUS_HINTS: dict[int, tuple[SourceReason, str]] = {
    401: ("ModelAccessDenied", "; the token in HF_TOKEN may not read it"),
    403: ("ModelAccessDenied", "; the token in HF_TOKEN may not read it"),
    404: ("ModelNotFound", ""),
    429: ("HubRateLimited", ": too many requests; a token in HF_TOKEN raises the limit"),
}


def _status_problem(status: int) -> tuple[str, SourceReason]:
    from huggingface_hub import constants

    unavailable: tuple[SourceReason, str] = ("HubUnavailable", "")
    reason, hint = _STATUS_HINTS.get(status, unavailable)
    return f"could not be downloaded: {constants.ENDPOINT} answered {status}{hint}", reason
