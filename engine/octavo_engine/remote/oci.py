"""Models in container registries: artifacts with one layer per file, and images with the model in a folder.

An artifact's layer names its file in an annotation (ORAS: `org.opencontainers.image.title`, ModelPack:
`org.cncf.model.filepath`) and is the file itself, or a tar archive by its media type. Of an image (a *modelcar*) the
files below /models are read. Formats: https://github.com/opencontainers/image-spec, and
https://github.com/modelpack/model-spec.
"""

import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import PurePosixPath
from typing import Any

from octavo_engine.errors import ModelSourceError
from octavo_engine.remote.archives import archive
from octavo_engine.remote.files import RemoteFile
from octavo_engine.remote.model import Archive, Layer, RemoteModel
from octavo_engine.remote.registry import DOCKER_HUB, INDEX_TYPES, Registry

OCI_SCHEME = "oci://"

_REFERENCE = re.compile(
    r"(?P<host>localhost|[^/@]*[.:][^/@]*)/(?P<repository>[a-z0-9][a-z0-9._/-]*)"
    r"(:(?P<tag>[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}))?(@(?P<digest>sha256:[0-9a-f]{64}))?"
)
_TITLE = "org.opencontainers.image.title"
_FILE_PATHS = ("org.cncf.model.filepath", _TITLE)
# ORAS packs a folder into a tar archive and says so; without it a titled layer is a file, whatever its media type.
_UNPACK = "io.deis.oras.content.unpack"
_TAR = re.compile(r".*[.+]tar(?P<compression>[.+](gzip|zstd))?")
_IMAGE_LAYERS = ("application/vnd.oci.image.layer.", "application/vnd.docker.image.rootfs.")
_IMAGE_FOLDER = "models"
# The machine's name as Python has it -> as images have it.
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


class OciSource:
    """`oci://registry/repository[:tag][@sha256:digest]`; without both, the tag is latest."""

    def __init__(self, address: str) -> None:
        self.name = address
        found = _REFERENCE.fullmatch(address.removeprefix(OCI_SCHEME))
        if found is None:
            raise ModelSourceError(
                f"names no artifact: write {OCI_SCHEME}REGISTRY/REPOSITORY:TAG, such as "
                f"{OCI_SCHEME}{DOCKER_HUB}/ai/smollm2"
            )
        host, repository = found["host"], found["repository"]
        if host == DOCKER_HUB and "/" not in repository:
            repository = f"library/{repository}"
        self._reference = found["digest"] or found["tag"] or "latest"
        self._registry = Registry(host, repository)

    def close(self) -> None:
        """End its connections."""
        self._registry.close()

    def find(self) -> RemoteModel:
        """Read the manifest. Raises ModelSourceError."""
        manifest = self._registry.manifest(self._reference)
        if _type(manifest) in INDEX_TYPES or "manifests" in manifest:
            manifest = self._registry.manifest(_choose_manifest(manifest))
        layers = manifest.get("layers")
        if not isinstance(layers, list):
            raise ModelSourceError(f"cannot be read: it is of a type that is not known ({_type(manifest) or 'none'})")
        found = [layer for each in layers if (layer := self._layer(each)) is not None]
        if not found:
            raise ModelSourceError(
                "holds no files that can be told: push one layer per file with its name, as `oras push` does, or an "
                f"image with the model in /{_IMAGE_FOLDER}",
                reason="ModelNotFound",
            )
        return RemoteModel(found)

    def _layer(self, descriptor: Any) -> Layer | Archive | None:
        """A plain file, an archive, or None for what holds no files."""
        try:
            media_type, digest, size = str(descriptor["mediaType"]), str(descriptor["digest"]), int(descriptor["size"])
            annotations = descriptor.get("annotations") or {}
            named = [str(annotations[key]) for key in _FILE_PATHS if annotations.get(key)]
            is_unpacked = annotations.get(_UNPACK) == "true"
        except (KeyError, TypeError, ValueError, AttributeError):
            raise ModelSourceError("cannot be read: its manifest has a layer without type, digest or size") from None
        if not re.fullmatch("sha256:[0-9a-f]{64}", digest):
            raise ModelSourceError(f"cannot be read: its digests are not of the kind sha256 but {digest.split(':')[0]}")
        read = partial(self._registry.read_blob, digest, size)
        file = RemoteFile(digest.replace(":", "-"), size, read, digest.removeprefix("sha256:"))
        tar = _TAR.fullmatch(media_type)
        if is_unpacked or (tar and _TITLE not in annotations):
            compression = ((tar and tar["compression"]) or "").lstrip(".+")
            if compression == "zstd":
                raise ModelSourceError("has layers compressed by zstd, which is not read: use gzip, or better nothing")
            is_image = media_type.startswith(_IMAGE_LAYERS) and not is_unpacked
            return archive(file, _IMAGE_FOLDER if is_image else "", is_compressed=is_unpacked or compression == "gzip")
        if named:
            return {_safe_path(named[0]): file}
        # Docker's own artifacts do not name their one file.
        return {"model.gguf": file} if ".gguf." in f"{media_type}." else None


def _type(manifest: Mapping[str, Any]) -> str:
    return str(manifest.get("mediaType") or "")


def _choose_manifest(index: Mapping[str, Any]) -> str:
    """The digest of this machine's manifest, or of the first: a model is the same on all. Attestations are none."""
    try:
        entries = [
            (str(each["digest"]), (each.get("platform") or {}).get("architecture", ""))
            for each in index["manifests"]
            if (each.get("platform") or {}).get("architecture") != "unknown"
        ]
    except (KeyError, TypeError, AttributeError):
        entries = []
    if not entries:
        raise ModelSourceError("cannot be read: its index names no manifests")
    machine = os.uname().machine
    own = [digest for digest, architecture in entries if architecture == _ARCHITECTURES.get(machine, machine)]
    return (own or [entries[0][0]])[0]


def _safe_path(path: str) -> str:
    parts = PurePosixPath(path).parts
    if path.startswith("/") or ".." in parts or not parts:
        raise ModelSourceError(f"cannot be read: its manifest names a file {path}, which is no path inside a model")
    return str(PurePosixPath(*parts))
