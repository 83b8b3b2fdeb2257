"""Files with manifests, read: documents of YAML or JSON, and the Nodes among them."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from octavo_operator.errors import ManifestError
from octavo_operator.observe import Manifest, ObservedNode, observe_node, with_claimable
from octavo_operator.profile_api import PROFILE_KIND

_HINT = "give the output of `kubectl get nodes -o yaml`, or of `kubectl get nodes,resourceslices -o yaml`"


def read_documents(path: Path) -> list[Any]:
    """All YAML (or JSON) documents of a file; `-` is standard input.

    Raises ManifestError.
    """
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
        return [each for each in yaml.safe_load_all(text) if each is not None]
    except OSError as error:
        raise ManifestError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ManifestError(f"{path} is not YAML: {str(error).splitlines()[0]}") from None


def node_manifests(documents: Sequence[Any]) -> list[Manifest]:
    """The Nodes of a List, or of several documents; each can be observed.

    Raises ManifestError if there is something else, or a Node cannot be read.
    """
    try:
        found = [each for each in _items(documents) if each["kind"] == "Node"]
        for each in found:
            observe_node(each)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ManifestError(f"the nodes cannot be read ({error}): {_HINT}") from None
    return found


def observed_nodes(documents: Sequence[Any]) -> list[ObservedNode]:
    """The Nodes as plans see them, with the devices of the ResourceSlices that are beside them.

    Raises ManifestError as `node_manifests` does, and for a ResourceSlice that cannot be read.
    """
    nodes = [observe_node(each) for each in node_manifests(documents)]
    try:
        return with_claimable(nodes, [each for each in _items(documents) if each["kind"] == "ResourceSlice"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ManifestError(f"the ResourceSlices cannot be read ({error}): {_HINT}") from None


def profile_manifests(documents: Sequence[Any]) -> list[Manifest]:
    """The HardwareProfiles of a List, or of several documents.

    Raises ManifestError if there is something else, or one without a name.
    """
    found: list[Manifest] = []
    for document in documents:
        if not isinstance(document, Mapping):
            raise ManifestError(f"a {type(document).__name__} is no {PROFILE_KIND}")
        items = document.get("items") or [] if str(document.get("kind", "")).endswith("List") else [document]
        for each in items:
            kind = each.get("kind", PROFILE_KIND) if isinstance(each, Mapping) else type(each).__name__
            if kind != PROFILE_KIND or not (each.get("metadata") or {}).get("name"):
                raise ManifestError(f"a {kind} without a name, or of another kind, is no {PROFILE_KIND}")
            found.append(dict(each))
    return found


def _items(documents: Sequence[Any]) -> Iterator[Manifest]:
    for document in documents:
        kind = document.get("kind", "") if isinstance(document, Mapping) else type(document).__name__
        if kind.endswith("List"):
            yield from _items([{"kind": "Node", **each} for each in document.get("items") or []])
        elif kind in ("Node", "ResourceSlice"):
            yield dict(document)
        else:
            raise ManifestError(f"a {kind or 'document without a kind'} is no Node")


class NodeFile:
    """The Nodes of a file, for an operator that may not read those of the API server. Read anew at each resync."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._num_reads = 0

    def list(self) -> tuple[list[Manifest], int]:
        """The Nodes and the version of the list, as the API server would give them.

        Raises ManifestError.
        """
        found = node_manifests(read_documents(self._path))
        # A file that was edited by hand has old resource versions, or none: the latest reading is the newest state.
        self._num_reads += 1
        for each in found:
            each["metadata"] = {**each["metadata"], "resourceVersion": str(self._num_reads)}
        return found, self._num_reads
