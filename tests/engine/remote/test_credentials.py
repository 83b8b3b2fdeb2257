"""Which entry of Docker's configuration is for which registry."""

import json

import pytest
from octavo_engine.remote.credentials import Credentials, find_credentials

FITS = {
    "the host": ("registry.example.com", "registry.example.com", True),
    "with a scheme and a version": ("https://registry.example.com/v2/", "registry.example.com", True),
    "Docker Hub by its old name": ("https://index.docker.io/v1/", "docker.io", True),
    "the port": ("registry.example.com:5000", "registry.example.com:5000", True),
    "another port": ("registry.example.com:5000", "registry.example.com", False),
    "IPv6": ("[::1]:5000", "[::1]:5000", True),
    "a star for one name": ("*.example.com", "registry.example.com", True),
    "a star is not for two": ("*.example.com", "a.registry.example.com", False),
    "a path above": ("registry.example.com/ai", "registry.example.com", True),
    "a path beside": ("registry.example.com/a", "registry.example.com", False),
    "a longer name": ("example.com", "example.com.evil.io", False),
    "another host": ("ghcr.io", "registry.example.com", False),
}


@pytest.mark.parametrize(("key", "host", "expected"), FITS.values(), ids=FITS)
def test_an_entry_is_for_hosts_and_paths(key: str, host: str, expected: bool) -> None:
    config = {"auths": {key: {"username": "me", "password": "secret"}}}
    found = find_credentials(host, "ai/model", {".dockerconfigjson": json.dumps(config)})
    assert found == (Credentials("me", "secret") if expected else None)


def test_the_longest_entry_wins_and_no_secret_is_shown() -> None:
    config = {
        "auths": {"ghcr.io": {"username": "all", "password": "x"}, "ghcr.io/ai": {"username": "ai", "password": "y"}}
    }
    found = find_credentials("ghcr.io", "ai/model", {".dockerconfigjson": json.dumps(config)})
    assert repr(found) == "Credentials(user='ai')"
