"""An object store on loopback that speaks as much of S3's protocol as reading takes, and checks signatures (version 4).

Written from https://docs.aws.amazon.com/AmazonS3/latest/API/: ListObjectsV2, HeadObject, GetObject with ranges and
If-Match, and errors as XML.
"""

import contextlib
import functools
import hashlib
import hmac
import re
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, quote, unquote, urlsplit
from xml.sax.saxutils import escape

ACCESS_KEY, SECRET_KEY = "OCTAVOEXAMPLE", "not/a+secret"
PAGE_SIZE = 3
# Buckets and what every request to them is answered with.
REFUSALS = {
    "forbidden": (403, "AccessDenied"), "busy-bucket": (503, "SlowDown"), "throttled": (429, "TooManyRequests"),
    "broken": (500, "InternalError"), "elsewhere": (301, "PermanentRedirect"), "absent": (404, "NoSuchBucket"),
}  # fmt: skip


class S3Server(ThreadingHTTPServer):
    """`objects`: bucket -> key -> bytes; `asked`: (method, path, range) of all requests; `num_sent`: bytes of bodies.

    public:    buckets that need no signature
    cut_off:   path -> how many answers are still to end in the middle
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, dict[str, bytes]] = {}
        self.public: set[str] = set()
        self.asked: list[tuple[str, str, str]] = []
        self.num_sent = 0
        self.cut_off: Counter[str] = Counter()
        self.held = threading.Event()
        self.held.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def environment(self) -> dict[str, str]:
        """The variables that a client needs, without what the machine may have of them."""
        return {
            "AWS_ENDPOINT_URL": self.url, "AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_REGION": "eu-central-1", "AWS_EC2_METADATA_DISABLED": "true", "AWS_MAX_ATTEMPTS": "1",
            "AWS_CONFIG_FILE": "/nowhere", "AWS_SHARED_CREDENTIALS_FILE": "/nowhere",
        }  # fmt: skip

    def files_read(self) -> set[str]:
        """Names of the objects of which something was fetched."""
        return {path.rpartition("/")[2] for method, path, _ in self.asked if method == "GET" and path.count("/") > 1}


class _Handler(BaseHTTPRequestHandler):
    server: S3Server
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        bucket, _, key = path.strip("/").partition("/")
        self.server.asked.append((self.command, path, self.headers.get("Range", "")))
        problem = None if bucket in self.server.public else _signature_problem(self)
        if problem:
            self._refuse(403, problem)
        elif bucket in REFUSALS:
            self._refuse(*REFUSALS[bucket])
        elif bucket not in self.server.objects:
            self._refuse(404, "NoSuchBucket")
        elif not key:
            self._list(bucket, dict(parse_qsl(urlsplit(self.path).query)))
        elif key not in self.server.objects[bucket]:
            self._refuse(404, "NoSuchKey")
        else:
            self._object(path, self.server.objects[bucket][key])

    def _list(self, bucket: str, query: dict[str, str]) -> None:
        assert query["list-type"] == "2"
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        keys = sorted(key for key in self.server.objects[bucket] if key.startswith(prefix))
        if delimiter:
            keys = [key for key in keys if delimiter not in key[len(prefix) :]]
        start = int(query.get("continuation-token", "0"))
        page = keys[start : start + PAGE_SIZE]
        contents = "".join(
            f"<Contents><Key>{quote(key)}</Key><ETag>{escape(_etag(content))}</ETag><Size>{len(content)}</Size></Contents>"
            for key in page
            for content in [self.server.objects[bucket][key]]
        )
        is_truncated = start + PAGE_SIZE < len(keys)
        following = f"<NextContinuationToken>{start + PAGE_SIZE}</NextContinuationToken>" if is_truncated else ""
        body = (
            '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult '
            f'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>{bucket}</Name>'
            f"<IsTruncated>{str(is_truncated).lower()}</IsTruncated><EncodingType>url</EncodingType>{contents}{following}"
            "</ListBucketResult>"
        )
        self._answer(200, body.encode(), {"Content-Type": "application/xml"})

    def _object(self, path: str, content: bytes) -> None:
        headers = {"ETag": _etag(content), "Accept-Ranges": "bytes"}
        if self.headers.get("If-Match", _etag(content)) != _etag(content):
            self._refuse(412, "PreconditionFailed")
            return
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted is None:
            self._answer(200, content, headers)
            return
        self.server.held.wait()
        begin, end = int(wanted[1]), min(int(wanted[2]) + 1, len(content))
        headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(content)}"
        self._answer(206, content[begin:end], headers, is_cut=self.server.cut_off[path] > 0)
        self.server.cut_off[path] -= 1

    def _refuse(self, status: int, code: str) -> None:
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>told by a test</Message></Error>"
        # Where a redirection leads to.
        self._answer(status, body.encode(), {"Content-Type": "application/xml", "x-amz-bucket-region": "us-west-2"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str], *, is_cut: bool = False) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.server.num_sent += len(body)
            with contextlib.suppress(ConnectionError):
                self.wfile.write(body[: len(body) // 2] if is_cut else body)
        if is_cut:
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Quiet."""


@functools.lru_cache
def _etag(content: bytes) -> str:
    return f'"{hashlib.md5(content, usedforsecurity=False).hexdigest()}"'


def _signature_problem(request: BaseHTTPRequestHandler) -> str | None:
    """The error code for a request that is not signed with the one key that there is."""
    authorization = request.headers.get("Authorization", "")
    found = re.fullmatch(
        r"AWS4-HMAC-SHA256 Credential=(\w+)/(\d+)/([\w-]+)/s3/aws4_request, SignedHeaders=([\w;-]+), Signature=(\w+)",
        authorization,
    )
    if found is None:
        return "AccessDenied"
    key, day, region, names, signature = found.groups()
    if key != ACCESS_KEY:
        return "InvalidAccessKeyId"
    url = urlsplit(request.path)
    query = "&".join(sorted(f"{quote(k, safe='-_.~')}={quote(v, safe='-_.~')}" for k, v in parse_qsl(url.query, True)))
    headers = "".join(f"{name}:{' '.join(request.headers[name].split())}\n" for name in names.split(";"))
    payload = request.headers["x-amz-content-sha256"]
    canonical = "\n".join([request.command, url.path, query, headers, names, payload])
    scope = f"{day}/{region}/s3/aws4_request"
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    text = "\n".join(["AWS4-HMAC-SHA256", request.headers["x-amz-date"], scope, digest])
    signing = f"AWS4{SECRET_KEY}".encode()
    for each in (day, region, "s3", "aws4_request", text):
        signing = hmac.digest(signing, each.encode(), "sha256")
    return None if hmac.compare_digest(signing.hex(), signature) else "SignatureDoesNotMatch"


@contextlib.contextmanager
def serve_s3() -> Iterator[S3Server]:
    with S3Server() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield server
        server.shutdown()
