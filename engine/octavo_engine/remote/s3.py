"""Models in S3 and what speaks its protocol (MinIO, Ceph, R2, ...), through AWS's own client library.

Its standard variables and files say endpoint, region, credentials and certificates; see
https://docs.aws.amazon.com/sdkref/latest/guide/settings-reference.html. The library is imported when it is needed.
"""

import contextlib
import hashlib
import logging
import os
import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from octavo_engine.errors import ModelSourceError, SourceReason
from octavo_engine.remote.cache import NUM_CONNECTIONS
from octavo_engine.remote.files import RemoteFile, TransferError
from octavo_engine.remote.model import GGUF, RemoteModel

logger = logging.getLogger(__name__)

S3_SCHEME = "s3://"

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_CONNECT_TIMEOUT_S = 10
_READ_TIMEOUT_S = 60

# Error code of S3, or HTTP status -> the reason in a word, and what to do.
_KEYS = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the role, and AWS_ENDPOINT_URL"
_REFUSED: tuple[SourceReason, str] = (
    "ModelAccessDenied", "; the credentials need s3:GetObject and s3:ListBucket for it",
)  # fmt: skip
_UNKNOWN_KEYS: tuple[SourceReason, str] = ("ModelAccessDenied", f": {_KEYS}")
_ELSEWHERE: tuple[SourceReason, str] = ("ModelUnreadable", ": the bucket lies in another region; name it in AWS_REGION")
_BUSY: tuple[SourceReason, str] = ("SourceRateLimited", ": too many requests; try again later")
_HINTS: Mapping[str, tuple[SourceReason, str]] = {
    "NoSuchBucket": ("ModelNotFound", ": check the bucket's name, AWS_ENDPOINT_URL and AWS_REGION"),
    "NoSuchKey": ("ModelNotFound", ": there is no such object"),
    "AccessDenied": _REFUSED, "403": _REFUSED,
    "InvalidAccessKeyId": _UNKNOWN_KEYS, "SignatureDoesNotMatch": _UNKNOWN_KEYS, "401": _UNKNOWN_KEYS,
    "ExpiredToken": _UNKNOWN_KEYS, "InvalidToken": _UNKNOWN_KEYS, "RequestTimeTooSkewed": _UNKNOWN_KEYS,
    "InvalidIdentityToken": _UNKNOWN_KEYS, "ExpiredTokenException": _UNKNOWN_KEYS,
    "InvalidObjectState": ("ModelUnreadable", ": it is archived and has to be restored first"),
    "PermanentRedirect": _ELSEWHERE, "AuthorizationHeaderMalformed": _ELSEWHERE,
    "IllegalLocationConstraintException": _ELSEWHERE,
    "PreconditionFailed": ("SourceUnavailable", ": it was changed while it was read; try again"),
    "SlowDown": _BUSY, "429": _BUSY,
    "404": ("ModelNotFound", ": there is no such object or bucket"),
}  # fmt: skip


class S3Source:
    """A folder of objects (`s3://bucket/prefix`) or one object (`s3://bucket/file.gguf`)."""

    def __init__(self, address: str) -> None:
        self._bucket, _, path = address.removeprefix(S3_SCHEME).partition("/")
        self._path = path.strip("/")
        if not _BUCKET.fullmatch(self._bucket):
            raise ModelSourceError(f"names no bucket: write {S3_SCHEME}BUCKET/PREFIX or {S3_SCHEME}BUCKET/FILE{GGUF}")
        self._is_signed = True
        try:
            with self._explained():
                self._client = self._open()
        except ValueError as error:  # such as an endpoint that is no URL
            raise ModelSourceError(f"cannot be read: {_text(error)}") from None
        self.name = f"{self._client.meta.endpoint_url} {self._bucket}/{self._path}"

    def _open(self) -> Any:
        import botocore.session
        from botocore import UNSIGNED
        from botocore.config import Config

        session = botocore.session.get_session()
        config = Config(
            connect_timeout=_CONNECT_TIMEOUT_S, read_timeout=_READ_TIMEOUT_S, max_pool_connections=NUM_CONNECTIONS
        )
        if session.get_credentials() is None:
            # A public bucket asks for none.
            self._is_signed = False
            config = config.merge(Config(signature_version=UNSIGNED))
            logger.info("no credentials for S3 are known: asking without")
        # The library itself reads AWS_DEFAULT_REGION alone; what injects a role's variables sets AWS_REGION, too.
        return session.create_client("s3", region_name=os.environ.get("AWS_REGION") or None, config=config)

    def close(self) -> None:
        """End its connections."""
        self._client.close()

    def find(self) -> RemoteModel:
        """List the folder. Raises ModelSourceError."""
        with self._explained():
            if self._path.endswith(GGUF):
                found = self._client.head_object(Bucket=self._bucket, Key=self._path)
                objects = [(self._path, found["ETag"], int(found["ContentLength"]))]
            else:
                objects = list(self._list())
        if not objects:
            raise ModelSourceError(
                f"holds no objects: check the prefix, which is a folder's name in the bucket {self._bucket}",
                reason="ModelNotFound",
            )
        return RemoteModel([{key.rpartition("/")[2]: self._file(key, etag, size) for key, etag, size in objects}])

    def _list(self) -> Iterator[tuple[str, str, int]]:
        prefix = f"{self._path}/" if self._path else ""
        pages = self._client.get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=self._bucket, Prefix=prefix, Delimiter="/"):
            for each in page.get("Contents", []):
                if not each["Key"].endswith("/"):
                    yield each["Key"], each["ETag"], int(each["Size"])

    def _file(self, key: str, etag: str, size: int) -> RemoteFile:
        etag = etag.strip('"')  # not every store quotes them in lists
        identity = "\n".join([self._client.meta.endpoint_url, self._bucket, key, etag, str(size)])
        name = f"s3-{hashlib.sha256(identity.encode()).hexdigest()}"
        return RemoteFile(name, size, partial(self._read, key, etag))

    def _read(self, key: str, etag: str, begin: int, end: int) -> bytes:
        """A range of the very object that was listed."""
        wanted = {"Bucket": self._bucket, "Key": key, "IfMatch": f'"{etag}"', "Range": f"bytes={begin}-{end - 1}"}
        with self._explained():
            return bytes(self._client.get_object(**wanted)["Body"].read())

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn each way in which S3 can fail into one sentence."""
        from botocore import exceptions

        try:
            yield
        except exceptions.ClientError as error:
            raise self._refusal(error.response) from None
        except (exceptions.PartialCredentialsError, exceptions.CredentialRetrievalError) as error:
            raise ModelSourceError(f"cannot be read: {_text(error)}; {_KEYS}", reason="ModelAccessDenied") from None
        except exceptions.SSLError as error:
            raise ModelSourceError(
                f"cannot be read: {_text(error)}; AWS_CA_BUNDLE names the file with the authorities to trust",
                reason="SourceUnavailable",
            ) from None
        except (exceptions.HTTPClientError, exceptions.ConnectionError, exceptions.IncompleteReadError) as error:
            raise TransferError(
                f"cannot be read ({_text(error)}): check the network, AWS_ENDPOINT_URL and AWS_REGION"
            ) from None
        except exceptions.BotoCoreError as error:
            raise ModelSourceError(f"cannot be read: {_text(error)}") from None

    def _refusal(self, response: Mapping[str, Any]) -> ModelSourceError:
        code = str(response.get("Error", {}).get("Code", ""))
        status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        if code not in _HINTS and status >= 500:
            return ModelSourceError(f"cannot be read: S3 answered {status} {code}", reason="SourceUnavailable")
        unknown: tuple[SourceReason, str] = ("ModelUnreadable", "")
        reason, hint = _HINTS.get(code) or _HINTS.get(str(status)) or unknown
        if reason == "ModelAccessDenied" and not self._is_signed:
            hint = "; no credentials are known: give AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a role"
        says = code if code.isalpha() else f"{status}"
        return ModelSourceError(f"cannot be read: S3 answered {says}{hint}", reason=reason)


def _text(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
