"""What a container's process gets to see: command line, environment variables, paths. No processes, no files.

Follows the kubelet's rules, except that there is no mount namespace: a container path is rewritten to the host
path behind it wherever it stands in the command, the arguments or a variable's value.
"""

import math
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from kube_client import Manifest
from kubernetes.utils.quantity import parse_quantity

# Data of a ConfigMap or Secret of the pod's namespace, by kind and name; None if there is none.
Lookup: TypeAlias = Callable[[str, str], Awaitable[Mapping[str, bytes] | None]]

_VARIABLE = re.compile(r"\$\$|\$\(([^()\s]+)\)")
_SUBSCRIPT = re.compile(r"metadata\.(labels|annotations)\['(.+)'\]")


class ContainerConfigError(Exception):
    """The pod names something that is not there (yet): a ConfigMap, a Secret, one of their keys, a field."""


@dataclass(frozen=True, slots=True)
class PodIdentity:
    """A pod with the addresses that its node gave it. `address` is where its processes listen."""

    pod: Manifest
    node_name: str
    address: str


@dataclass(frozen=True, slots=True)
class Mounts:
    """Container paths and the host paths behind them."""

    host_paths: Mapping[str, Path] = field(default_factory=dict)

    def rewrite(self, text: str) -> str:
        """Replace each container path in `text`, and each path below one, by its host path."""
        if not self.host_paths:
            return text
        longest_first = sorted(self.host_paths, key=len, reverse=True)
        pattern = "|".join(re.escape(path) for path in longest_first)
        # A path starts where no other path part ends, and ends where its last part does.
        return re.sub(rf"(?<![\w.-])({pattern})(?![\w.-])", lambda found: str(self.host_paths[found[1]]), text)


def expand(text: str, variables: Mapping[str, str]) -> str:
    """Kubernetes' own substitution: $(NAME) if there is such a variable, $$ for a plain $."""

    def replacement(found: re.Match[str]) -> str:
        return "$" if found[0] == "$$" else variables.get(found[1], found[0])

    return _VARIABLE.sub(replacement, text)


def command_line(container: Manifest, variables: Mapping[str, str], mounts: Mounts) -> list[str]:
    """The process to start, with host paths. Raises ContainerConfigError if only the image could tell."""
    words = [*container.get("command", ()), *container.get("args", ())]
    if not container.get("command"):
        raise ContainerConfigError("images are ignored by the process node, so `command` must be given")
    return [mounts.rewrite(expand(word, variables)) for word in words]


async def environment_variables(
    container: Manifest, identity: PodIdentity, base: Mapping[str, str], lookup: Lookup
) -> dict[str, str]:
    """`base`, then envFrom, then env; later ones win and can refer to earlier ones. Paths are the container's."""
    variables = dict(base)
    for source in container.get("envFrom", ()):
        variables |= await _all_keys(source, lookup)
    for entry in container.get("env", ()):
        if "valueFrom" in entry:
            value = await _value_from(entry["valueFrom"], container, identity, lookup)
        else:
            value = expand(entry.get("value", ""), variables)
        if value is not None:
            variables[entry["name"]] = value
    return variables


def on_host(variables: Mapping[str, str], base: Mapping[str, str], mounts: Mounts) -> dict[str, str]:
    """`variables` with host paths; what came from `base` unchanged has host paths already."""
    return {name: value if base.get(name) == value else mounts.rewrite(value) for name, value in variables.items()}


def field_value(path: str, identity: PodIdentity) -> str:
    """A field of the downward API.

    `status.podIP` is the address that the pod can be reached at, not the one it reports: whoever asks for it
    wants to listen there or to tell a peer.
    """
    pod = identity.pod
    metadata, spec = pod["metadata"], pod["spec"]
    subscript = _SUBSCRIPT.fullmatch(path)
    if subscript:
        return str((metadata.get(subscript[1]) or {}).get(subscript[2], ""))
    if path in {"metadata.labels", "metadata.annotations"}:
        entries = metadata.get(path.removeprefix("metadata.")) or {}
        return "\n".join(f'{key}="{value}"' for key, value in sorted(entries.items()))
    known = {
        "metadata.name": metadata["name"],
        "metadata.namespace": metadata["namespace"],
        "metadata.uid": metadata["uid"],
        "spec.nodeName": identity.node_name,
        "spec.serviceAccountName": spec.get("serviceAccountName", "default"),
        "status.podIP": identity.address,
        "status.podIPs": identity.address,
        "status.hostIP": "127.0.0.1",
        "status.hostIPs": "127.0.0.1",
    }
    if path not in known:
        raise ContainerConfigError(f"field {path} is not known to the process node")
    return str(known[path])


def resource_value(reference: Manifest, container: Manifest) -> str:
    """A request or limit of the container in units of the divisor, rounded up; 0 if it is not set."""
    kind, _, name = reference["resource"].partition(".")
    quantity = container.get("resources", {}).get(kind, {}).get(name, 0)
    divisor = parse_quantity(reference.get("divisor") or "1") or 1
    return str(math.ceil(parse_quantity(quantity) / divisor))


async def _value_from(source: Manifest, container: Manifest, identity: PodIdentity, lookup: Lookup) -> str | None:
    if "fieldRef" in source:
        return field_value(source["fieldRef"]["fieldPath"], identity)
    if "resourceFieldRef" in source:
        return resource_value(source["resourceFieldRef"], container)
    for kind, key in (("ConfigMap", "configMapKeyRef"), ("Secret", "secretKeyRef")):
        if key in source:
            return await _one_key(kind, source[key], lookup)
    raise ContainerConfigError(f"the process node cannot read variables from {', '.join(source)}")


async def _one_key(kind: str, reference: Manifest, lookup: Lookup) -> str | None:
    data = await lookup(kind, reference["name"])
    if data is not None and reference["key"] in data:
        return data[reference["key"]].decode()
    if reference.get("optional"):
        return None
    missing = f"{kind} {reference['name']} not found" if data is None else f"{kind} {reference['name']} has no key"
    raise ContainerConfigError(f"{missing} ({reference['key']})")


async def _all_keys(source: Manifest, lookup: Lookup) -> dict[str, str]:
    kind, reference = (
        ("ConfigMap", source["configMapRef"]) if "configMapRef" in source else ("Secret", source["secretRef"])
    )
    data = await lookup(kind, reference["name"])
    if data is None:
        if reference.get("optional"):
            return {}
        raise ContainerConfigError(f"{kind} {reference['name']} not found")
    return {source.get("prefix", "") + key: value.decode() for key, value in data.items()}
