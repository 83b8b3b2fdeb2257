"""Manifests over manifests: a user's template merged into ours, and what is desired against what is live. Pure."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, TypeGuard

from octavo_operator.observe import Manifest

# Lists of a pod that merge by a key of their items; all other lists are replaced.
_MERGE_KEYS = {
    "containers": "name",
    "initContainers": "name",
    "volumes": "name",
    "env": "name",
    "imagePullSecrets": "name",
    "volumeMounts": "mountPath",
    "ports": "containerPort",
}


def merge(base: Manifest, patch: Mapping[str, Any]) -> Manifest:
    """`patch` over `base`: mappings merge, lists of containers, volumes, variables and mounts merge by their key."""
    merged = dict(base)
    for name, value in patch.items():
        current = merged.get(name)
        if isinstance(value, Mapping) and isinstance(current, dict):
            merged[name] = merge(current, value)
        elif name in _MERGE_KEYS and _are_mappings(current) and _are_mappings(value):
            merged[name] = _merge_list(current, value, _MERGE_KEYS[name])
        else:
            merged[name] = deepcopy(value)
    return merged


def _are_mappings(value: Any) -> TypeGuard[list[Manifest]]:
    """Whether it is a list whose items can have keys. What else a user wrote there, the API server refuses."""
    return isinstance(value, list) and all(isinstance(each, Mapping) for each in value)


def _merge_list(base: Sequence[Manifest], patch: Sequence[Manifest], key: str) -> list[Manifest]:
    merged = {each.get(key): each for each in base}
    for each in patch:
        merged[each.get(key)] = merge(merged.get(each.get(key), {}), each)
    return list(merged.values())


def differs(desired: Any, live: Any) -> bool:
    """Whether a field that we set has another value in the live object. Fields that others added do not count.

    Items of lists are compared by name where they have one, else by place.
    """
    if isinstance(desired, Mapping):
        return not isinstance(live, Mapping) or any(differs(value, live.get(name)) for name, value in desired.items())
    if isinstance(desired, list):
        return not isinstance(live, list) or _lists_differ(desired, live)
    return bool(desired != live)


def _lists_differ(desired: Sequence[Any], live: Sequence[Any]) -> bool:
    if desired and all(isinstance(each, Mapping) and "name" in each for each in desired):
        by_name = {each.get("name"): each for each in live if isinstance(each, Mapping)}
        return any(differs(each, by_name.get(each["name"])) for each in desired)
    if len(desired) != len(live):
        return True
    return any(differs(each, other) for each, other in zip(desired, live, strict=True))
