"""A container registry on loopback: the reading half of the OCI distribution specification, with token authentication.

Blobs are answered by a redirect to another host name, as registries do that keep them in an object store.
"""

import base64
import contextlib
import gzip
import hashlib
import io
import json
import re
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

USER, PASSWORD = "reader", "open:sesame"
IDENTITY_TOKEN = "identity"
TITLE = "org.opencontainers.image.title"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
TAR = "application/vnd.oci.image.layer.v1.tar"

# Repositories and what every request to them is answered with.
REFUSALS = {"broken/model": 500, "busy/model": 429, "forbidden/model": 403, "no/token": 401}


@dataclass
class Layer:
    """As it is pushed."""

    content: bytes
    media_type: str = "application/octet-stream"
    annotations: Mapping[str, str] = field(default_factory=dict)


def file_layers(files: Mapping[str, bytes]) -> list[Layer]:
    """What `oras push` makes of files."""
    return [Layer(content, TAR, {TITLE: name}) for name, content in files.items()]


def tar(files: Mapping[str, bytes]) -> bytes:
    """An archive with these files, and with their folders."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        for folder in sorted({name.rpartition("/")[0] for name in files} - {""}):
            entry = tarfile.TarInfo(folder)
            entry.type = tarfile.DIRTYPE
            archive.addfile(entry)
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return made.getvalue()


def compressed(content: bytes) -> bytes:
    return gzip.compress(content, compresslevel=1, mtime=0)


def digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


class RegistryServer(ThreadingHTTPServer):
    """asked: (path, range) of all requests; num_sent: bytes of blobs.

    private: repositories that only USER may read; basic: those that ask for the password instead of a token
    flaky:   path -> how many requests are still to fail with 503
    tokens_elsewhere: who posts for a token is sent on
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[tuple[str, str], tuple[str, bytes]] = {}
        self.private: set[str] = set()
        self.basic: set[str] = set()
        self.no_ranges = False
        self.tokens_elsewhere = False
        self.asked: list[tuple[str, str]] = []
        self.num_sent = 0
        self.flaky: Counter[str] = Counter()
        self.leaked: list[str] = []

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server_port}"

    def push(self, repository: str, tag: str, layers: Sequence[Layer], **fields: Any) -> str:
        """Store an artifact; its digest."""
        descriptors = [self._store(layer) for layer in layers]
        config = self._store(Layer(b"{}", "application/vnd.oci.empty.v1+json"))
        manifest = {"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": descriptors, **fields}
        return self.push_manifest(repository, tag, MANIFEST, manifest)

    def push_manifest(self, repository: str, tag: str, media_type: str, manifest: Mapping[str, Any]) -> str:
        content = json.dumps(manifest).encode()
        for reference in (tag, digest(content)):
            self.manifests[repository, reference] = (media_type, content)
        return digest(content)

    def _store(self, layer: Layer) -> dict[str, Any]:
        self.blobs[digest(layer.content)] = layer.content
        descriptor = {"mediaType": layer.media_type, "digest": digest(layer.content), "size": len(layer.content)}
        return descriptor | ({"annotations": dict(layer.annotations)} if layer.annotations else {})

    def docker_config(self, password: str = PASSWORD) -> str:
        """What `docker login` writes, and a Secret of the type kubernetes.io/dockerconfigjson holds."""
        auth = base64.b64encode(f"{USER}:{password}".encode()).decode()
        return json.dumps({"auths": {self.host: {"auth": auth}}})


class _Handler(BaseHTTPRequestHandler):
    server: RegistryServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.server.asked.append((url.path, self.headers.get("Range", "")))
        if url.path == "/token":
            self._token({key: values[0] for key, values in parse_qs(url.query).items()}, self.headers["Authorization"])
        elif url.path.startswith("/storage/"):
            self._blob(url.path.removeprefix("/storage/"))
        else:
            self._registry(url.path)

    def do_POST(self) -> None:
        form = self.rfile.read(int(self.headers["Content-Length"])).decode()
        values = {key: each[0] for key, each in parse_qs(form).items()}
        self.server.asked.append((self.path, ""))
        if self.server.tokens_elsewhere:
            self._answer(307, b"", {"Location": f"http://localhost:{self.server.server_port}/elsewhere"})
        elif values.get("grant_type") == "refresh_token" and values["refresh_token"] == IDENTITY_TOKEN:
            self._answer(200, json.dumps({"access_token": f"{values['scope']} {USER}"}).encode())
        else:
            self._answer(401, b"{}")

    def _token(self, query: Mapping[str, str], authorization: str | None) -> None:
        """Anybody gets a token; only the right password gets one in the user's name."""
        if authorization and authorization != _basic():
            self._answer(401, b"{}")
            return
        assert query["service"] == "test"
        user = USER if authorization else "anonymous"
        self._answer(200, json.dumps({"token": f"{query['scope']} {user}"}).encode())

    def _registry(self, path: str) -> None:
        found = re.fullmatch(r"/v2/(.+)/(manifests|blobs)/([^/]+)", path)
        assert found is not None, path
        repository, kind, reference = found.groups()
        if REFUSALS.get(repository, 401) != 401:
            self._answer(REFUSALS[repository], b"", {"Retry-After": "0"})
        elif not self._is_allowed(repository):
            realm = f"http://{self.server.host}/token"
            scope = f"repository:{repository}:pull"
            challenge = f'Bearer realm="{realm}",service="test",scope="{scope}"'
            self._answer(401, b"", {"WWW-Authenticate": "Basic" if repository in self.server.basic else challenge})
        elif self.server.flaky[path] > 0:
            self.server.flaky[path] -= 1
            self._answer(503, b"")
        elif kind == "blobs":
            # The same server under another name: whatever is sent there beside the request is leaked.
            self._answer(307, b"", {"Location": f"http://localhost:{self.server.server_port}/storage/{reference}"})
        elif (repository, reference) in self.server.manifests:
            media_type, content = self.server.manifests[repository, reference]
            assert media_type in self.headers["Accept"]
            self._answer(200, content, {"Content-Type": media_type})
        else:
            self._answer(404, b'{"errors": [{"code": "MANIFEST_UNKNOWN"}]}')

    def _is_allowed(self, repository: str) -> bool:
        authorization = self.headers.get("Authorization", "")
        if repository in self.server.basic:
            return authorization == _basic()
        scheme, _, token = authorization.partition(" ")
        scope, _, user = token.rpartition(" ")
        is_good = scheme == "Bearer" and scope == f"repository:{repository}:pull" and REFUSALS.get(repository) != 401
        return is_good and (user == USER or repository not in self.server.private)

    def _blob(self, reference: str) -> None:
        if self.headers.get("Authorization"):
            self.server.leaked.append(self.headers["Authorization"])
        content = self.server.blobs[reference]
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted is None or self.server.no_ranges:
            self.server.num_sent += len(content)
            self._answer(200, content)
            return
        begin, end = int(wanted[1]), min(int(wanted[2]) + 1, len(content))
        self.server.num_sent += end - begin
        self._answer(206, content[begin:end], {"Content-Range": f"bytes {begin}-{end - 1}/{len(content)}"})

    def _answer(self, status: int, body: bytes, headers: Mapping[str, str] = {}) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quiet."""


def _basic() -> str:
    return f"Basic {base64.b64encode(f'{USER}:{PASSWORD}'.encode()).decode()}"


@contextlib.contextmanager
def serve_registry() -> Iterator[RegistryServer]:
    with RegistryServer() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield server
        server.shutdown()
