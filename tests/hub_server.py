"""A hub on loopback that speaks as much of Hugging Face's protocol as Octavo needs: lists, files, ranges, refusals."""

import contextlib
import hashlib
import json
import re
import struct
import threading
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from octavo_engine.geometry import geometry_from_config

COMMIT = "a" * 40
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "hidden_size": 48, "num_attention_heads": 6,
    "intermediate_size": 80, "vocab_size": 100, "max_position_embeddings": 64,
}  # fmt: skip
NUM_PARAMETERS = geometry_from_config(CONFIG).num_parameters


def safetensors(num_values: int) -> bytes:
    """A file with one tensor of float32 zeros."""
    end = 4 * num_values
    tensors = {"weight": {"dtype": "F32", "shape": [num_values], "data_offsets": [0, end]}}
    header = json.dumps({"__metadata__": {"format": "pt"}, **tensors}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(end)


def index(total_size: int | None, *shards: str) -> bytes:
    metadata = {"total_size": total_size} if total_size else {}
    return json.dumps({"metadata": metadata, "weight_map": {f"weight.{name}": name for name in shards}}).encode()


REPOSITORIES = {
    "org/good": {
        "config.json": json.dumps(CONFIG).encode(), "tokenizer.json": b"{}",
        "model.safetensors": safetensors(NUM_PARAMETERS),
        "pytorch_model.bin": b"unwanted", "original/model.safetensors": b"unwanted", "README.md": b"unwanted",
        "consolidated.safetensors": b"unwanted",
    },
    "org/sharded": {
        "config.json": json.dumps(CONFIG).encode(), "model.safetensors.index.json": index(4 * NUM_PARAMETERS, "a", "b"),
        "a": safetensors(NUM_PARAMETERS - 10), "b": safetensors(10),
    },
    "org/liar": {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": safetensors(3 * NUM_PARAMETERS)},
    "org/garbage": {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": b"x" * 100},
    "org/large": {
        "config.json": json.dumps({**CONFIG, "vocab_size": 50_000}).encode(),
        "model.safetensors": safetensors(4_900_000),
    },
    "org/other-name": {"config.json": json.dumps(CONFIG).encode(), "weights.safetensors": safetensors(NUM_PARAMETERS)},
    "org/bare": {"config.json": json.dumps(CONFIG).encode()},
    "org/no-config": {"model.safetensors": b"weights"},
}  # fmt: skip
REFUSALS = {
    "org/gated": (HTTPStatus.FORBIDDEN, "GatedRepo"),
    "org/absent": (HTTPStatus.NOT_FOUND, "RepoNotFound"),
    "org/private": (HTTPStatus.UNAUTHORIZED, "RepoNotFound"),
    "org/broken": (HTTPStatus.INTERNAL_SERVER_ERROR, "Broken"),
    "org/busy": (HTTPStatus.TOO_MANY_REQUESTS, ""),
    "org/forbidden": (HTTPStatus.FORBIDDEN, ""),
}


class HubHandler(BaseHTTPRequestHandler):
    """As much of the hub as downloads need: a model's listing, and its files with their headers."""

    requested: list[str]
    sent: list[int]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.requested.append(self.path)
        parts = self.path.strip("/").split("/")
        repository = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        if repository in REFUSALS:
            status, code = REFUSALS[repository]
            self._answer(status, b"{}", {"X-Error-Code": code} if code else {})
        elif repository not in REPOSITORIES:
            self._answer(HTTPStatus.NOT_FOUND, b"{}", {})
        elif parts[0] == "api" and parts[4] == "tree":
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in REPOSITORIES[repository].items()
            ]
            self._answer(HTTPStatus.OK, json.dumps(tree).encode(), {"Content-Type": "application/json"})
        elif parts[0] == "api":
            self._list(REPOSITORIES[repository], parts[-1])
        else:
            self._file(REPOSITORIES[repository], "/".join(parts[4:]))

    def _list(self, files: dict[str, bytes], revision: str) -> None:
        if revision not in ("main", COMMIT):
            self._answer(HTTPStatus.NOT_FOUND, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return
        siblings = [{"rfilename": name} for name in files]
        listing = {"id": "org/name", "modelId": "org/name", "sha": COMMIT, "siblings": siblings, "tags": []}
        self._answer(HTTPStatus.OK, json.dumps(listing).encode(), {"Content-Type": "application/json"})

    def _file(self, files: dict[str, bytes], name: str) -> None:
        if name not in files:
            self._answer(HTTPStatus.NOT_FOUND, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        headers = {"ETag": f'"{hashlib.sha256(files[name]).hexdigest()}"', "X-Repo-Commit": COMMIT}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted is None:
            self._answer(HTTPStatus.OK, files[name], headers)
            return
        begin, end = int(wanted[1]), min(int(wanted[2]) + 1, len(files[name]))
        headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(files[name])}"
        self._answer(HTTPStatus.PARTIAL_CONTENT, files[name][begin:end], headers)

    def _answer(self, status: HTTPStatus, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.sent.append(len(body))
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@contextlib.contextmanager
def serve_hub() -> Iterator[ThreadingHTTPServer]:
    """Its handler class has `requested` (paths) and `sent` (bytes of each answer)."""
    handler = type("Handler", (HubHandler,), {"requested": [], "sent": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
