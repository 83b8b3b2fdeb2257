"""Credentials for container registries, from where Docker, Podman and Kubernetes keep them."""

import base64
import binascii
import fnmatch
import json
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from octavo_engine.errors import ModelSourceError

# The key of a Secret of the type kubernetes.io/dockerconfigjson, and so the name of the variable that a pod gets of it.
SECRET_KEY = ".dockerconfigjson"
_DOCKER_HUB = ("docker.io", "index.docker.io", "registry-1.docker.io")
_HELPER_TIMEOUT_S = 30


@dataclass(frozen=True, slots=True)
class Credentials:
    """A name and a password, or a token that is exchanged for others."""

    user: str
    password: str = field(repr=False)
    identity_token: str = field(default="", repr=False)


def find_credentials(host: str, repository: str, environment: Mapping[str, str]) -> Credentials | None:
    """The first that fit: of the pod's Secret, of REGISTRY_AUTH_FILE, of DOCKER_CONFIG or ~/.docker.

    host: the registry, with its port
    Raises ModelSourceError for a file that cannot be read.
    """
    for place, config in _configs(environment):
        found = _of_helper(config, host) or _of_auths(place, config, host, repository)
        if found is not None:
            return found
    return None


def _configs(environment: Mapping[str, str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if SECRET_KEY in environment:
        yield SECRET_KEY, _parse(SECRET_KEY, environment[SECRET_KEY])
    folder = Path(environment.get("DOCKER_CONFIG") or "~/.docker").expanduser()
    named = environment.get("REGISTRY_AUTH_FILE")
    for file in ([Path(named)] if named else []) + [folder / "config.json"]:
        try:
            yield str(file), _parse(str(file), file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            if named == str(file):
                raise ModelSourceError(
                    f"cannot be read: there is no file {file}, which REGISTRY_AUTH_FILE names"
                ) from None
        except OSError as error:
            raise ModelSourceError(f"cannot be read: cannot open {file}: {error.strerror}") from None


def _parse(place: str, text: str) -> Mapping[str, Any]:
    try:
        config = json.loads(text)
        if isinstance(config, dict) and isinstance(config.get("auths", {}), dict):
            return config
    except ValueError:
        pass
    raise ModelSourceError(f"cannot be read: {place} is no configuration of Docker", reason="ModelAccessDenied")


def _of_helper(config: Mapping[str, Any], host: str) -> Credentials | None:
    """Ask the program that Docker's configuration names (protocol: docker/docker-credential-helpers)."""
    server = "https://index.docker.io/v1/" if host in _DOCKER_HUB else host
    helper = (config.get("credHelpers") or {}).get(server) or config.get("credsStore")
    if not helper:
        return None
    program = f"docker-credential-{helper}"
    try:
        answer = subprocess.run(
            [program, "get"], input=server, capture_output=True, text=True, timeout=_HELPER_TIMEOUT_S, check=False
        )
        found = json.loads(answer.stdout) if answer.returncode == 0 else None
    except (OSError, subprocess.TimeoutExpired, ValueError) as error:
        problem = f"cannot be read: {program}, which Docker's configuration names, does not work ({error})"
        raise ModelSourceError(problem, reason="ModelAccessDenied") from None
    if not isinstance(found, dict):
        return None  # the helper has none for this registry
    user, secret = str(found.get("Username", "")), str(found.get("Secret", ""))
    return Credentials("", "", secret) if user == "<token>" else Credentials(user, secret)


def _of_auths(place: str, config: Mapping[str, Any], host: str, repository: str) -> Credentials | None:
    """The entry whose key fits best: it may have a scheme, a path, and stars as in Kubernetes' image pull secrets."""
    fitting = [(key, entry) for key, entry in config.get("auths", {}).items() if _fits(key, host, repository)]
    for _, entry in sorted(fitting, key=lambda each: len(each[0]), reverse=True):
        found = _credentials(place, entry)
        if found is not None:
            return found
    return None


def _fits(key: str, host: str, repository: str) -> bool:
    pattern, _, path = key.split("://", 1)[-1].partition("/")
    path = "" if path in ("v1/", "v2/", "v1", "v2") else path.strip("/")
    if pattern in _DOCKER_HUB and host in _DOCKER_HUB:
        pattern = host
    is_host = pattern == host or (pattern.count(".") == host.count(".") and fnmatch.fnmatchcase(host, pattern))
    return is_host and (not path or f"{repository}/".startswith(f"{path}/"))


def _credentials(place: str, entry: Any) -> Credentials | None:
    """None for an entry that only says that another program has them."""
    if not isinstance(entry, dict):
        return None
    if entry.get("identitytoken"):
        return Credentials("", "", str(entry["identitytoken"]))
    if entry.get("username"):
        return Credentials(str(entry["username"]), str(entry.get("password", "")))
    if not entry.get("auth"):
        return None
    try:
        user, colon, password = base64.b64decode(str(entry["auth"]), validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        colon = ""
    if not colon:
        raise ModelSourceError(
            f"cannot be read: an `auth` in {place} is not base64 of NAME:PASSWORD", reason="ModelAccessDenied"
        )
    return Credentials(user, password)
