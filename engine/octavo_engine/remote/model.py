"""A model that lies elsewhere: which of its files an engine reads, its geometry by ranges, and its download."""

import json
import logging
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Protocol

from octavo_engine.errors import ModelSourceError
from octavo_engine.geometry import Geometry, geometry_from_config, read_geometry
from octavo_engine.hub import CONFIG_FILES, TOKENIZER_FILES
from octavo_engine.remote.cache import ModelCache, Progress, ProgressCallback
from octavo_engine.remote.files import RemoteFile
from octavo_engine.stored_weights import (
    INDEX_FILE,
    SINGLE_FILE,
    Header,
    StoredWeights,
    index_weights,
    parse_header,
    total_weights,
    with_stored_weights,
)

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
SAFETENSORS = ".safetensors"
GGUF = ".gguf"
# What deletes a file, or a folder's content, of the layers below (OCI image specification, layers).
WHITEOUT = ".wh."
OPAQUE_WHITEOUT = ".wh..wh..opq"

_HEADER_BUFFER_BYTES = 128 << 10
_MOST_JSON_BYTES = 64 << 20
# A GGUF header holds the tokenizer: some MB.
_FIRST_GGUF_BYTES = 8 << 20
_MOST_GGUF_BYTES = 512 << 20

# A path inside the model -> the file there.
Layer = Mapping[str, RemoteFile]


@dataclass(frozen=True, slots=True)
class Archive:
    """A layer that is one archive.

    file: the whole, which `unpack`s; peek: what it holds, read in parts, and whether that is all of it
    """

    file: RemoteFile
    peek: Callable[[], tuple[Layer, bool]]


@dataclass(frozen=True, slots=True)
class RemoteModel:
    """Layers from the lowest to the highest; a path in a higher one hides the same path below."""

    layers: Sequence[Layer | Archive]


class Source(Protocol):
    """Where a model lies. `name` tells it from others in the cache."""

    name: str

    def find(self) -> RemoteModel:
        """Ask what is there. Raises ModelSourceError, and TransferError where trying again may help."""

    def close(self) -> None:
        """End its connections."""


def is_model_file(path: str) -> bool:
    """Whether an engine might read a file of that name."""
    name = PurePosixPath(path).name
    is_weights = name.endswith((SAFETENSORS, GGUF)) and not name.startswith(WHITEOUT)
    return is_weights or name in (*CONFIG_FILES, *TOKENIZER_FILES, INDEX_FILE)


def download(source: Source, cache: ModelCache, on_progress: ProgressCallback | None = None) -> Path:
    """The folder with what an engine reads, or the `.gguf` file.

    A source that does not answer is noticed at once, and what it held when it was last asked serves then.
    Raises ModelSourceError.
    """
    try:
        model = source.find()
    except ModelSourceError as error:
        folder = cache.latest(source.name)
        if folder is None or error.reason not in ("SourceUnavailable", "SourceRateLimited"):
            raise
        logger.warning("%s; serving what it held when it was last asked", error)
        return _entry(folder)
    archives = [layer.file for layer in model.layers if isinstance(layer, Archive)]
    plain = _overlay(layer for layer in model.layers if not isinstance(layer, Archive))
    # What archives hold is known when they are here.
    chosen = plain if archives else choose_files(_at_root(plain))
    progress = Progress(sum(file.size for file in [*archives, *chosen.values()]), on_progress)
    if archives:
        cache.fetch(archives, progress)
        layers = [_unpacked(layer.file.key, cache) if isinstance(layer, Archive) else layer for layer in model.layers]
        chosen = choose_files(_at_root(_overlay(layers)))
    plain_keys = {file.key for file in plain.values()}
    cache.fetch([file for file in chosen.values() if file.key in plain_keys], progress)
    return _entry(cache.link({name: file.key for name, file in chosen.items()}, source.name))


def _entry(folder: Path) -> Path:
    return next(folder.glob(f"*{GGUF}"), folder)


def _unpacked(key: str, cache: ModelCache) -> Layer:
    folder = cache.path(key)
    return {
        str(path.relative_to(folder)): RemoteFile(
            f"{key}/{path.relative_to(folder)}", path.stat().st_size, partial(_read_local, path)
        )
        for path in folder.rglob("*")
        if path.is_file()
    }


def _read_local(path: Path, begin: int, end: int) -> bytes:
    with path.open("rb") as file:
        file.seek(begin)
        return file.read(end - begin)


def read_remote_geometry(source: Source) -> Geometry:
    """From `config.json` and the headers of the weights, or from a GGUF header; of weights nothing else is read.

    Raises ModelSourceError, or UnsupportedModelError where the model's numbers make no sense.
    """
    layers: list[Layer] = []
    is_complete = True
    for layer in reversed(source.find().layers):
        seen, is_all = layer.peek() if isinstance(layer, Archive) else (layer, True)
        layers.insert(0, seen)
        is_complete = is_complete and is_all
    files = _at_root(_overlay(layers))
    if not is_complete and CONFIG_FILE in files:
        return geometry_from_config(_read_object(files, CONFIG_FILE))
    if not is_complete and not any(path.endswith(GGUF) for path in files):
        raise ModelSourceError(
            "has no config.json at the beginning of its compressed layers: let each file be a layer of its own, or "
            "state spec.model.geometry",
            reason="InspectionFailed",
        )
    chosen = choose_files(files)
    if CONFIG_FILE in chosen:
        geometry = geometry_from_config(_read_object(chosen, CONFIG_FILE))
        return with_stored_weights(geometry, _read_weights(chosen))
    (file,) = chosen.values()
    return _read_gguf(file)


def _overlay(layers: Iterable[Layer]) -> Layer:
    """What is seen from above, without what higher layers delete."""
    seen: dict[str, RemoteFile] = {}
    for layer in layers:
        for path in layer:
            folder, _, name = path.rpartition("/")
            if name == OPAQUE_WHITEOUT:
                deleted = f"{folder}/" if folder else ""
                seen = {each: file for each, file in seen.items() if not each.startswith(deleted)}
            elif name.startswith(WHITEOUT):
                target = path[: -len(name)] + name.removeprefix(WHITEOUT)
                seen = {
                    each: file for each, file in seen.items() if each != target and not each.startswith(f"{target}/")
                }
        seen |= {path: file for path, file in layer.items() if is_model_file(path)}
    return seen


def _at_root(files: Layer) -> Layer:
    """The files of the model's folder: the uppermost one with a configuration or a GGUF file."""
    folders = {
        PurePosixPath(path).parent
        for path in files
        if PurePosixPath(path).name == CONFIG_FILE or path.endswith((GGUF, SAFETENSORS))
    }
    depth = min((len(folder.parts) for folder in folders), default=0)
    roots = sorted(str(folder) for folder in folders if len(folder.parts) == depth)
    if len(roots) > 1:
        raise ModelSourceError(f"holds several models, in {', '.join(roots)}: one is served at a time")
    return {
        PurePosixPath(path).name: file for path, file in files.items() if [str(PurePosixPath(path).parent)] == roots
    }


def choose_files(files: Layer) -> Layer:
    """Of a model's folder, what an engine reads: configuration, tokenizer and safetensors, or one GGUF file.

    Raises ModelSourceError where there is neither.
    """
    weights = _choose_weights(files)
    ggufs = sorted(name for name in files if name.endswith(GGUF))
    if CONFIG_FILE in files and weights:
        names = [name for name in (*CONFIG_FILES, *TOKENIZER_FILES, INDEX_FILE) if name in files]
        return {name: files[name] for name in (*names, *weights)}
    if len(ggufs) == 1:
        return {ggufs[0]: files[ggufs[0]]}
    if ggufs:
        raise ModelSourceError(
            f"holds several .gguf files, of which one is served at a time: {', '.join(ggufs)}", reason="ModelNotFound"
        )
    lacks = "has no .safetensors weights" if CONFIG_FILE in files else "has no config.json"
    raise ModelSourceError(f"{lacks} and no .gguf file, so it is not a model", reason="ModelNotFound")


def _choose_weights(files: Layer) -> list[str]:
    """The files that the index names; without an index the single file, or all there are: as the loader reads them."""
    if INDEX_FILE in files:
        index = _read_object(files, INDEX_FILE)
        weight_map = index.get("weight_map")
        names = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []
        missing = [name for name in names if name not in files]
        if missing or not names:
            problem = f"names files that are not there: {', '.join(missing)}" if missing else "names no files"
            raise ModelSourceError(f"has a {INDEX_FILE} that {problem}")
        return names
    if SINGLE_FILE in files:
        return [SINGLE_FILE]
    return sorted(name for name in files if name.endswith(SAFETENSORS))


def _read_object(files: Layer, name: str) -> dict[str, object]:
    file = files[name]
    if file.size > _MOST_JSON_BYTES:
        raise ModelSourceError(f"has a {name} of {file.size} bytes, which is none")
    try:
        values = json.loads(file.read(0, file.size))
    except ValueError as error:
        raise ModelSourceError(f"has a {name} that is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ModelSourceError(f"has a {name} that holds no JSON object")
    return values


def _read_weights(files: Layer) -> StoredWeights | None:
    def read_header(name: str) -> Header:
        with files[name].open(_HEADER_BUFFER_BYTES) as stream:
            return parse_header(stream, name)

    if INDEX_FILE in files:
        return index_weights(_read_object(files, INDEX_FILE), INDEX_FILE, read_header)
    return total_weights([read_header(name) for name in files if name.endswith(SAFETENSORS)])


def _read_gguf(file: RemoteFile) -> Geometry:
    """Fetch the beginning of a GGUF file, and more of it until the header is whole."""
    with tempfile.TemporaryDirectory(prefix="octavo-") as folder:
        head = Path(folder, "model.gguf")
        end = 0
        while True:
            begin, end = end, min(file.size, max(_FIRST_GGUF_BYTES, 4 * end))
            with head.open("ab") as stream:
                stream.write(file.read(begin, end))
            try:
                return read_geometry(head)
            except ModelSourceError as error:
                if end == file.size or end >= _MOST_GGUF_BYTES:
                    problem = str(error).removeprefix(f"{head} ")
                    raise ModelSourceError(f"holds a GGUF file that cannot be read: it {problem}") from None
