"""An object store and a registry of a test, and a cache folder that is empty."""

import os
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy
import pytest
from octavo_engine.remote import files, model
from registry_server import RegistryServer, serve_registry
from s3_server import S3Server, serve_s3


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("AWS_", "DOCKER_", "REGISTRY_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(files, "PAUSES_S", (0.01, 0.01))
    # A header comes in several parts.
    monkeypatch.setattr(model, "_FIRST_GGUF_BYTES", 1000)


@pytest.fixture(scope="session")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """8 MB, of which 30 kB are header."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_embedding_length(48)
    writer.add_head_count(6)
    writer.add_feed_forward_length(80)
    writer.add_context_length(64)
    writer.add_token_list([f"token {number}" for number in range(1500)])
    writer.add_tensor("token_embd.weight", numpy.zeros((2_000_000,), numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    with serve_s3() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture
def registry() -> Iterator[RegistryServer]:
    with serve_registry() as server:
        yield server
