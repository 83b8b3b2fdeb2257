"""The objects of the cluster as the watches and the lists last showed them, and as our own writes answered.

Watch events, list results and answers overtake one another, so an object is only ever replaced by one of a later
resource version, and one that was seen deleted does not come back from an older list.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from octavo_operator.apiserver import (
    CHILD_KINDS,
    CONFIG_MAP,
    HARDWARE_PROFILE,
    INFERENCE_SERVICE,
    NODE,
    POD,
    RESOURCE_SLICE,
    WORKLOAD_KINDS,
    Kind,
)
from octavo_operator.observe import (
    Key,
    Manifest,
    ObservedNode,
    key_of,
    observe_node,
    observe_pod,
    observe_workload,
    owner_key,
    with_claimable,
)
from octavo_operator.profiles import HardwareTable, ProfileVerdict, read_profiles
from octavo_operator.running import Running, observe_running

# Deletions that are remembered; more than a list can be behind.
_MAX_TOMBSTONES = 10_000


class ObjectStore:
    """Of one event loop; nothing here waits."""

    def __init__(self) -> None:
        self._objects: dict[str, dict[Key, Manifest]] = defaultdict(dict)
        self._children: dict[Key, dict[tuple[str, str], Manifest]] = defaultdict(dict)
        self._nodes: dict[str, ObservedNode] = {}
        self._node_versions: dict[str, int] = {}
        self._profiles: tuple[HardwareTable, list[ProfileVerdict]] | None = None
        self._deleted: dict[str, int] = {}

    def put(self, kind: Kind, manifest: Manifest) -> bool:
        """Take in an object unless it is older than what is known. Returns whether it was new."""
        metadata = manifest["metadata"]
        metadata.pop("managedFields", None)
        if metadata["uid"] in self._deleted:
            return False
        key = key_of(manifest)
        known = self._objects[kind.name].get(key)
        if known is not None and resource_version(known) >= resource_version(manifest):
            return False
        self._objects[kind.name][key] = manifest
        self._forget(kind)
        owner = owner_key(manifest) if kind in (*CHILD_KINDS, POD) else None
        if owner is not None:
            self._children[owner][kind.name, key.name] = manifest
        return True

    def remove(self, kind: Kind, manifest: Manifest) -> None:
        """An object was deleted."""
        self._deleted[manifest["metadata"]["uid"]] = resource_version(manifest)
        if len(self._deleted) > _MAX_TOMBSTONES:
            del self._deleted[next(iter(self._deleted))]
        key = key_of(manifest)
        known = self._objects[kind.name].get(key)
        if known is not None and known["metadata"]["uid"] == manifest["metadata"]["uid"]:
            self._drop(kind, key)

    def replace(self, kind: Kind, items: Iterable[Manifest], list_version: int) -> list[Manifest]:
        """Take in a whole list. Returns the objects of which no watch had told: new, changed and vanished ones."""
        unseen: list[Manifest] = []
        listed: set[Key] = set()
        for item in items:
            listed.add(key_of(item))
            if self.put(kind, item):
                unseen.append(item)
        for key, known in list(self._objects[kind.name].items()):
            if key not in listed and resource_version(known) <= list_version:
                self._drop(kind, key)
                unseen.append(known)
        return unseen

    def _drop(self, kind: Kind, key: Key) -> None:
        manifest = self._objects[kind.name].pop(key)
        self._forget(kind)
        owner = owner_key(manifest) if kind in (*CHILD_KINDS, POD) else None
        if owner is not None and self._children[owner].get((kind.name, key.name)) is manifest:
            del self._children[owner][kind.name, key.name]
            if not self._children[owner]:
                del self._children[owner]

    def _forget(self, kind: Kind) -> None:
        """What was worked out from objects of this kind has to be worked out anew."""
        if kind is HARDWARE_PROFILE:
            self._profiles = None

    def put_node(self, manifest: Manifest) -> bool:
        """Take in a Node. Returns whether a plan could tell the difference: heartbeats do not count."""
        node = observe_node(manifest)
        if self._node_versions.get(node.name, -1) >= resource_version(manifest):
            return False
        self._node_versions[node.name] = resource_version(manifest)
        changed = self._nodes.get(node.name) != node
        self._nodes[node.name] = node
        return changed

    def remove_node(self, name: str) -> bool:
        """A Node is gone. Returns whether it was known."""
        self._node_versions.pop(name, None)
        return self._nodes.pop(name, None) is not None

    def replace_nodes(self, manifests: Sequence[Manifest], list_version: int) -> bool:
        """Take in all Nodes. Returns whether a plan could tell the difference."""
        changes = [self.put_node(each) for each in manifests]
        listed = {each["metadata"]["name"] for each in manifests}
        gone = [name for name, version in self._node_versions.items() if name not in listed and version <= list_version]
        for name in gone:
            self.remove_node(name)
        return any(changes) or bool(gone)

    def resource(self, key: Key) -> Manifest | None:
        """The InferenceService."""
        return self._objects[INFERENCE_SERVICE.name].get(key)

    def resource_keys(self) -> list[Key]:
        """All InferenceServices."""
        return list(self._objects[INFERENCE_SERVICE.name])

    def count(self, kind: Kind) -> int:
        """Known objects of a kind."""
        return len(self._nodes) if kind is NODE else len(self._objects[kind.name])

    def children(self, key: Key, kind: Kind) -> list[Manifest]:
        """The objects of one kind that carry the resource's label, in order of their names."""
        found = self._children.get(key, {})
        return [found[each] for each in sorted(found) if each[0] == kind.name]

    def child(self, key: Key, kind: Kind, name: str) -> Manifest | None:
        """One object of those."""
        return self._children.get(key, {}).get((kind.name, name))

    def nodes(self) -> list[ObservedNode]:
        """All Nodes, with the devices that can be claimed there."""
        return with_claimable(self._nodes.values(), self._objects[RESOURCE_SLICE.name].values())

    def profiles(self) -> tuple[HardwareTable, list[ProfileVerdict]]:
        """The hardware table with the cluster's own rows, and what became of each HardwareProfile."""
        if self._profiles is None:
            self._profiles = read_profiles(self._objects[HARDWARE_PROFILE.name].values())
        return self._profiles

    def profile(self, name: str) -> Manifest | None:
        """The HardwareProfile."""
        return self._objects[HARDWARE_PROFILE.name].get(Key("", name))

    def running(self, key: Key, spec_hash: str) -> Running:
        """What bears on the resource's plan of all that runs."""
        in_use: dict[str, int] = defaultdict(int)
        for kind in WORKLOAD_KINDS:
            for manifest in self._objects[kind.name].values():
                state = observe_workload(manifest, ())
                in_use[state.node_type] += state.desired * state.gpus_per_replica
        return observe_running(
            [each for kind in WORKLOAD_KINDS for each in self.children(key, kind)],
            self.children(key, CONFIG_MAP),
            self.children(key, POD),
            in_use,
            self._taken(key),
            spec_hash,
        )

    def _taken(self, key: Key) -> dict[tuple[str, str], int]:
        """(Node, node type) -> devices that ready engines of other resources than `key` hold."""
        taken: dict[tuple[str, str], int] = defaultdict(int)
        for manifest in self._objects[POD.name].values():
            pod = observe_pod(manifest)
            if pod.is_ready and owner_key(manifest) != key:
                taken[pod.node, pod.node_type] += pod.num_gpus
        return taken


def resource_version(manifest: Manifest) -> int:
    """As a number: within one kind, later is larger."""
    version: Any = manifest["metadata"].get("resourceVersion", 0)
    return int(version)
