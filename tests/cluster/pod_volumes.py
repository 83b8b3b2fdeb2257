"""A pod's volumes as folders of the host. Contents are written once, before the containers start."""

import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import TypeAlias

from kube_client import Manifest
from pod_environment import ContainerConfigError, Lookup, Mounts, PodIdentity, field_value

# A token of the pod's service account, by audience ("" for the API server's own) and lifetime in seconds.
TokenSource: TypeAlias = Callable[[str, int], Awaitable[str]]

_DEFAULT_MODE = 0o644


async def write_volume(
    volume: Manifest, folder: Path, identity: PodIdentity, lookup: Lookup, token: TokenSource
) -> Path:
    """Make one volume and return its host path, inside `folder` except for hostPath.

    Raises ContainerConfigError if what it needs is not there, or for a kind that the process node cannot make.
    """
    if "hostPath" in volume:
        return _host_path(volume["hostPath"])
    if "emptyDir" in volume:
        return made_folder(folder)
    if "projected" in volume:
        mode = volume["projected"].get("defaultMode", _DEFAULT_MODE)
        for source in volume["projected"].get("sources", ()):
            _write_files(folder, await _source_files(source, identity, lookup, token), mode)
        return folder
    for kind in ("configMap", "secret", "downwardAPI"):
        if kind in volume:
            files = await _source_files({kind: volume[kind]}, identity, lookup, token)
            _write_files(folder, files, volume[kind].get("defaultMode", _DEFAULT_MODE))
            return folder
    kind = next(key for key in volume if key != "name")
    raise ContainerConfigError(f"volume {volume['name']}: the process node has no {kind} volumes")


def container_mounts(container: Manifest, volumes: Mapping[str, Path], termination_log: Path) -> Mounts:
    """Where the container's mount paths, and its termination log, really are."""
    host_paths = {container.get("terminationMessagePath", "/dev/termination-log"): termination_log}
    for mount in container.get("volumeMounts", ()):
        host_path = volumes[mount["name"]] / mount.get("subPath", "")
        host_paths[mount["mountPath"].rstrip("/")] = host_path
    return Mounts(host_paths)


def _host_path(source: Manifest) -> Path:
    path = Path(source["path"])
    if source.get("type") == "DirectoryOrCreate":
        made_folder(path)
    elif source.get("type") == "FileOrCreate":
        path.touch()
    elif source.get("type") and not path.exists():
        raise ContainerConfigError(f"hostPath {path} does not exist")
    return path


async def _source_files(
    source: Manifest, identity: PodIdentity, lookup: Lookup, token: TokenSource
) -> dict[str, tuple[bytes, int | None]]:
    """Contents and modes (None: the volume's default) by path below the volume."""
    if "serviceAccountToken" in source:
        wanted = source["serviceAccountToken"]
        content = await token(wanted.get("audience", ""), wanted.get("expirationSeconds", 3600))
        return {wanted["path"]: (content.encode(), None)}
    if "downwardAPI" in source:
        return {
            item["path"]: (field_value(item["fieldRef"]["fieldPath"], identity).encode(), item.get("mode"))
            for item in source["downwardAPI"].get("items", ())
            if "fieldRef" in item
        }
    if "configMap" in source:
        return await _keyed_files("ConfigMap", source["configMap"], source["configMap"].get("name", ""), lookup)
    if "secret" in source:
        reference = source["secret"]
        # A secret volume says secretName, a projected source says name.
        return await _keyed_files("Secret", reference, reference.get("secretName") or reference["name"], lookup)
    raise ContainerConfigError(f"the process node cannot project {', '.join(source)}")


async def _keyed_files(
    kind: str, reference: Manifest, name: str, lookup: Lookup
) -> dict[str, tuple[bytes, int | None]]:
    data = await lookup(kind, name)
    is_optional = reference.get("optional", False)
    if data is None:
        if is_optional:
            return {}
        raise ContainerConfigError(f"{kind} {name} not found")
    if not reference.get("items"):
        return {key: (value, None) for key, value in data.items()}
    files: dict[str, tuple[bytes, int | None]] = {}
    for item in reference["items"]:
        if item["key"] in data:
            files[item["path"]] = (data[item["key"]], item.get("mode"))
        elif not is_optional:
            raise ContainerConfigError(f"{kind} {name} has no key {item['key']}")
    return files


def made_folder(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _write_files(folder: Path, files: Mapping[str, tuple[bytes, int | None]], default_mode: int) -> None:
    made_folder(folder)
    for path, (content, mode) in files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        os.chmod(target, default_mode if mode is None else mode)
