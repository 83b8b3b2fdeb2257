"""GGUF headers: what is read, and what is refused with a sentence instead of a traceback."""

import struct
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from octavo_engine.errors import ModelSourceError
from octavo_engine.gguf_file import GgufFile


@pytest.fixture
def small_file(tmp_path: Path) -> Path:
    path = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("an.integer", 7)
    writer.add_float64("a.float", 0.5)
    writer.add_bool("a.bool", True)
    writer.add_string("a.string", "grüße")
    writer.add_array("some.strings", ["a", "", "日本"])
    writer.add_array("some.integers", [1, -2, 3])
    writer.add_tensor("matrix", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("vector", np.ones(5, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_reads_every_kind_of_value(small_file: Path) -> None:
    metadata = GgufFile(small_file).metadata
    assert metadata["an.integer"] == 7
    assert metadata["a.float"] == 0.5
    assert metadata["a.bool"] is True
    assert metadata["a.string"] == "grüße"
    assert metadata["some.strings"] == ["a", "", "日本"]
    assert metadata["some.integers"] == [1, -2, 3]
    assert "missing" not in metadata
    assert metadata.get("missing", 3) == 3
    assert len(list(metadata)) == len(metadata)


def test_says_where_tensors_lie(small_file: Path) -> None:
    file = GgufFile(small_file)
    assert file.architecture == "llama"
    matrix = file.tensors["matrix"]
    assert matrix.shape == (2, 3)
    assert np.frombuffer(file.buffer, np.float32, 6, matrix.offset).tolist() == [0, 1, 2, 3, 4, 5]
    vector = file.tensors["vector"]
    assert np.frombuffer(file.buffer, np.float16, 5, vector.offset).tolist() == [1] * 5


def test_agrees_with_the_gguf_package(small_file: Path) -> None:
    reader = gguf.GGUFReader(small_file)
    file = GgufFile(small_file)
    expected = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert dict(file.metadata) == expected
    assert [(tensor.name, int(tensor.data_offset)) for tensor in reader.tensors] == [
        (tensor.name, tensor.offset) for tensor in file.tensors.values()
    ]


@pytest.mark.parametrize("length", [3, 10, 24, 40, 120, 300])
def test_a_cut_header_is_refused(length: int, small_file: Path) -> None:
    small_file.write_bytes(small_file.read_bytes()[:length])
    with pytest.raises(ModelSourceError, match="is not a readable GGUF file"):
        GgufFile(small_file)


BAD_BYTES = {
    "other format": (b"PK\x03\x04" + bytes(100), "does not start with the letters GGUF"),
    "version": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
    "absurd string": (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**60), "ends in the middle"),
    "absurd count": (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "is not a readable GGUF file"),
    "unknown type": (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 99), "value type 99"),
    "dimensions": (b"GGUF" + struct.pack("<IQQQ1sI", 3, 1, 0, 1, b"t", 9), "9 dimensions"),
    "empty": (b"", "is empty"),
}


@pytest.mark.parametrize(("content", "message"), BAD_BYTES.values(), ids=BAD_BYTES)
def test_bad_bytes_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelSourceError, match=message):
        GgufFile(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelSourceError, match=r"there is no file .*none\.gguf"):
        GgufFile(tmp_path / "none.gguf")


@pytest.mark.model
def test_opens_a_real_file_without_decoding_its_vocabulary(smollm2_path: Path) -> None:
    start = time.process_time()
    file = GgufFile(smollm2_path)
    assert time.process_time() - start < 0.3
    assert len(file.metadata["tokenizer.ggml.tokens"]) == 49152
