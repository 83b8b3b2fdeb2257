"""A cluster as `octavo plan` sees it: read once, never written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import unified_diff
from pathlib import Path
from typing import Any

import yaml

from octavo_operator.api import InferenceServiceSpec
from octavo_operator.apiserver import (
    CHILD_KINDS,
    HARDWARE_PROFILE,
    INFERENCE_SERVICE,
    LEADER_WORKER_SET,
    NODE,
    OPTIONAL_KINDS,
    POD,
    RESOURCE_SLICE,
    UNREACHABLE,
    WORKLOAD_KINDS,
    ApiServer,
    Kind,
)
from octavo_operator.errors import ApiError, ConnectionSettingsError
from octavo_operator.objectstore import ObjectStore
from octavo_operator.observe import MANAGED_SELECTOR, Key, Manifest, ObservedNode
from octavo_operator.profiles import HardwareTable
from octavo_operator.render import GEOMETRY, MANIFEST_HASH
from octavo_operator.running import VARIANT, Running, spec_hash


@dataclass(frozen=True)
class Cluster:
    """What a plan for one resource is made from.

    uid, annotations: of the resource, if it is there
    children:         the objects that the operator made for it
    has_leader_worker_sets:       whether it has LeaderWorkerSets
    """

    nodes: Sequence[ObservedNode]
    table: HardwareTable
    running: Running
    uid: str = ""
    annotations: Mapping[str, str] = field(default_factory=dict)
    children: Sequence[Manifest] = ()
    has_leader_worker_sets: bool = True


async def read_cluster(kubeconfig: Path | None, key: Key, spec: InferenceServiceSpec) -> Cluster:
    """Nodes, profiles and what runs for `key`, from the API server.

    Raises ConnectionSettingsError where there is none, ApiError where it refuses.
    """
    try:
        async with ApiServer(kubeconfig) as api:
            store = ObjectStore()
            nodes, version = await api.list(NODE)
            store.replace_nodes(nodes, version)
            missing = set()
            for kind in (HARDWARE_PROFILE, RESOURCE_SLICE, *CHILD_KINDS, POD):
                found = await _list(api, kind, key.namespace)
                if found is None:
                    missing.add(kind)
                else:
                    store.replace(kind, *found)
            live = await api.get(INFERENCE_SERVICE, key)
    except UNREACHABLE as error:
        raise ConnectionSettingsError(f"the API server does not answer: {str(error) or type(error).__name__}") from None
    metadata: Mapping[str, Any] = (live or {}).get("metadata") or {}
    annotations = metadata.get("annotations") or {}
    return Cluster(
        nodes=store.nodes(),
        table=store.profiles()[0],
        running=store.running(key, spec_hash(spec, annotations)),
        uid=metadata.get("uid", ""),
        annotations=annotations,
        children=[each for kind in CHILD_KINDS for each in store.children(key, kind)],
        has_leader_worker_sets=LEADER_WORKER_SET not in missing,
    )


async def _list(api: ApiServer, kind: Kind, namespace: str) -> tuple[list[Manifest], int] | None:
    """Objects of a kind; what makes pods in all namespaces, since they share the nodes, where that is allowed.

    None where the cluster lacks an optional kind, or keeps it from the user.
    """
    selector = MANAGED_SELECTOR if kind.is_namespaced else ""
    places = [None, namespace] if kind in WORKLOAD_KINDS else [namespace]
    for place in places:
        try:
            return await api.list(kind, place, selector)
        except ApiError as error:
            if error.status == 403 and place is None:
                continue
            if error.status in (403, 404) and kind in OPTIONAL_KINDS:
                return None
            raise
    return None


# What tells one pass from the next, and says nothing that the rest of an object does not.
_OWN_NOTES = (MANIFEST_HASH, VARIANT, GEOMETRY)


def differences(desired: Sequence[Manifest], live: Sequence[Manifest]) -> str:
    """A unified diff from what is there to what the plan asks for, of the fields that the plan sets; empty if none."""
    by_name = {(each["kind"], each["metadata"]["name"]): each for each in live}
    wanted = {(each["kind"], each["metadata"]["name"]): each for each in desired}
    texts: list[str] = []
    for (kind, name), manifest in wanted.items():
        old = by_name.get((kind, name))
        texts += _diff(f"{kind}/{name}", _noteless(_set_fields(manifest, old)) if old else None, _noteless(manifest))
    for kind, name in by_name.keys() - wanted.keys():
        texts += _diff(f"{kind}/{name}", {"kind": kind, "metadata": {"name": name}}, None)
    return "".join(texts)


def _diff(title: str, old: Manifest | None, new: Manifest | None) -> list[str]:
    before, after = (_lines(each) if each else [] for each in (old, new))
    names = (f"live/{title}" if old else "/dev/null", f"plan/{title}" if new else "/dev/null")
    return list(unified_diff(before, after, *names))


def _lines(manifest: Manifest) -> list[str]:
    text: str = yaml.safe_dump(manifest, sort_keys=True, width=110)
    return text.splitlines(keepends=True)


def _noteless(manifest: Manifest) -> Manifest:
    metadata = manifest["metadata"]
    annotations = metadata.get("annotations") or {}
    kept = {name: value for name, value in annotations.items() if name not in _OWN_NOTES}
    return {**manifest, "metadata": {**metadata, "annotations": kept}}


def _set_fields(desired: Any, live: Any) -> Any:
    """The live value, cut to the fields that `desired` sets; items of lists by name where they have one."""
    if isinstance(desired, Mapping) and isinstance(live, Mapping):
        return {name: _set_fields(value, live[name]) for name, value in desired.items() if name in live}
    if isinstance(desired, list) and isinstance(live, list):
        names = [each["name"] for each in desired if isinstance(each, Mapping) and "name" in each]
        if len(names) == len(desired):
            found = {each.get("name"): each for each in live if isinstance(each, Mapping)}
            return [_set_fields(each, found[each["name"]]) for each in desired if each["name"] in found]
        if len(desired) == len(live):
            return [_set_fields(each, other) for each, other in zip(desired, live, strict=True)]
    return live
