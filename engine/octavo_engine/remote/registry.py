"""One repository of a container registry, over HTTP: manifests, ranges of blobs, tokens, and what goes wrong.

Protocol: the OCI distribution specification 1.1 (https://github.com/opencontainers/distribution-spec), with the token
authentication of https://distribution.github.io/distribution/spec/auth/token/. HTTPS, except on loopback.
"""

import base64
import contextlib
import hashlib
import ipaddress
import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from octavo_engine.errors import ModelSourceError, SourceReason
from octavo_engine.remote.credentials import Credentials, find_credentials
from octavo_engine.remote.files import TransferError, retried

DOCKER_HUB = "docker.io"
_DOCKER_HUB_HOST = "registry-1.docker.io"
INDEX_TYPES = (
    "application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json",
)  # fmt: skip
MANIFEST_TYPES = (
    "application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json",
)  # fmt: skip
_MOST_MANIFEST_BYTES = 4 << 20
_TIMEOUT_S = 30.0
_GIVE = (
    "`docker login` on this machine, or a Secret of the type kubernetes.io/dockerconfigjson in spec.model.secretRef, "
    "gives credentials"
)


class Registry:
    """`host/repository`. Its methods raise ModelSourceError, and TransferError where trying again may help."""

    def __init__(self, host: str, repository: str) -> None:
        import httpx2

        self._credentials = find_credentials(host, repository, os.environ)
        self._repository = repository
        self._scheme = "http" if _is_loopback(host) else "https"
        self._host = _DOCKER_HUB_HOST if host == DOCKER_HUB else host
        self._url = f"{self._scheme}://{self._host}/v2/{repository}"
        self._client = httpx2.Client(timeout=_TIMEOUT_S, follow_redirects=True)
        self._authorization: str | None = None

    def close(self) -> None:
        """End its connections."""
        self._client.close()

    def manifest(self, reference: str) -> Mapping[str, Any]:
        """The manifest or index of a tag or digest. Its own digest is checked where `reference` is one."""
        accept = ", ".join([*INDEX_TYPES, *MANIFEST_TYPES])
        data = retried(lambda: self._get(f"manifests/{reference}", {"Accept": accept}, None))
        if reference.startswith("sha256:") and hashlib.sha256(data).hexdigest() != reference.removeprefix("sha256:"):
            raise ModelSourceError(f"cannot be read: {self._host} sent a manifest without the digest {reference}")
        try:
            manifest = json.loads(data)
        except ValueError:
            manifest = None
        if not isinstance(manifest, dict):
            raise ModelSourceError(f"cannot be read: {self._host} answers with something that is no manifest")
        return manifest

    def read_blob(self, digest: str, size: int, begin: int, end: int) -> bytes:
        """Bytes `begin` to `end` of a blob with `size` bytes. Tried once."""
        return self._get(f"blobs/{digest}", {"Range": f"bytes={begin}-{end - 1}"}, (size, begin, end))

    def _get(self, path: str, headers: Mapping[str, str], wanted: tuple[int, int, int] | None) -> bytes:
        for is_last in (False, True):
            # Ranges count encoded bytes.
            asked = {**headers, "Accept-Encoding": "identity"}
            if self._authorization:
                asked["Authorization"] = self._authorization
            with self._explained(), self._client.stream("GET", f"{self._url}/{path}", headers=asked) as response:
                is_own = response.url.host == urlsplit(self._url).hostname
                if response.status_code == 401 and is_own and not is_last:
                    self._authorize(response.headers.get("WWW-Authenticate", ""))
                    continue
                if response.status_code not in (200, 206):
                    raise self._refusal(response.status_code, path, response.headers.get("Retry-After", ""))
                return self._body(response, wanted)
        raise AssertionError("the second answer is returned or raised")

    def _body(self, response: Any, wanted: tuple[int, int, int] | None) -> bytes:
        size, begin, end = wanted or (0, 0, _MOST_MANIFEST_BYTES)
        if wanted and response.status_code == 200 and end - begin < size:
            raise ModelSourceError(f"cannot be read: {response.url.host} does not answer requests for parts of a file")
        data = bytearray()
        for each in response.iter_bytes():
            data += each
            if len(data) > end - begin:
                raise ModelSourceError(f"cannot be read: {response.url.host} sends more than was asked for")
        if wanted and len(data) < end - begin:
            raise TransferError(f"cannot be read: {response.url.host} ended its answer too early")
        return bytes(data)

    def _authorize(self, challenge: str) -> None:
        """Get what the registry's challenge asks for."""
        scheme, _, rest = challenge.partition(" ")
        if scheme.lower() == "basic":
            if self._credentials is None:
                raise ModelSourceError(
                    f"cannot be read: {self._host} wants credentials; {_GIVE}", reason="ModelAccessDenied"
                )
            self._authorization = _basic(self._credentials)
            return
        fields = dict(re.findall(r'(\w+)="([^"]*)"', rest))
        realm = urlsplit(fields.get("realm", ""))
        if scheme.lower() != "bearer" or not realm.hostname:
            raise ModelSourceError(f"cannot be read: {self._host} asks for credentials in a way that is not known")
        if realm.scheme != "https" and not _is_loopback(realm.netloc):
            raise ModelSourceError(f"cannot be read: {self._host} wants credentials sent to {realm.netloc} unencrypted")
        self._authorization = f"Bearer {self._token(fields)}"

    def _token(self, fields: Mapping[str, str]) -> str:
        query = {"scope": fields.get("scope") or f"repository:{self._repository}:pull"}
        if fields.get("service"):
            query["service"] = fields["service"]
        known = self._credentials
        with self._explained():
            if known is not None and known.identity_token:
                form = {**query, "grant_type": "refresh_token", "refresh_token": known.identity_token}
                # A redirection would take the token along to another host.
                data = {**form, "client_id": "octavo"}
                response = self._client.post(fields["realm"], data=data, follow_redirects=False)
            else:
                headers = {"Authorization": _basic(known)} if known else {}
                response = self._client.get(fields["realm"], params=query, headers=headers)
        host = response.url.host
        if response.status_code >= 500 or response.status_code == 429:
            raise self._refusal(response.status_code, "", response.headers.get("Retry-After", ""))
        if response.status_code != 200:
            problem = (
                f"{host} answered {response.status_code} to the credentials" if known else f"{host} wants credentials"
            )
            raise ModelSourceError(f"cannot be read: {problem}; {_GIVE}", reason="ModelAccessDenied")
        try:
            answer = response.json()
            return str(answer.get("token") or answer["access_token"])
        except (ValueError, KeyError, AttributeError):
            raise ModelSourceError(f"cannot be read: {host} answers with something that is no token") from None

    def _refusal(self, status: int, path: str, retry_after: str) -> ModelSourceError:
        pause_s = float(retry_after) if retry_after.isdecimal() else None
        if status == 429:
            problem = f"{self._host} answered 429: too many requests; credentials may raise the limit"
            return TransferError(f"cannot be read: {problem}", reason="SourceRateLimited", retry_after_s=pause_s)
        if status >= 500:
            return TransferError(f"cannot be read: {self._host} answered {status}", retry_after_s=pause_s)
        reason: SourceReason = "ModelUnreadable"
        hint = ""
        if status in (401, 403):
            who = "the credentials may not read it" if self._credentials else f"no credentials are known; {_GIVE}"
            reason, hint = "ModelAccessDenied", f": it does not exist, or {who}"
        elif status == 404:
            kind = "tag or digest" if path.startswith("manifests/") else "blob; push the model again"
            reason, hint = "ModelNotFound", f": there is no such repository, {kind}"
        return ModelSourceError(f"cannot be read: {self._host} answered {status}{hint}", reason=reason)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        import httpx2

        try:
            yield
        except (httpx2.InvalidURL, httpx2.UnsupportedProtocol, httpx2.TooManyRedirects) as error:
            raise ModelSourceError(f"cannot be read: {self._host} leads nowhere ({error})") from None
        except httpx2.RequestError as error:
            problem = str(error) or type(error).__name__
            raise TransferError(
                f"cannot be read: {self._host} cannot be reached over {self._scheme.upper()} ({problem}): check the "
                "name and the network; SSL_CERT_FILE names the authorities to trust"
            ) from None


def _basic(credentials: Credentials) -> str:
    pair = f"{credentials.user}:{credentials.password}"
    return f"Basic {base64.b64encode(pair.encode()).decode()}"


def _is_loopback(netloc: str) -> bool:
    host = urlsplit(f"//{netloc}").hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
