"""Models in S3: a local server that speaks its protocol and checks signatures."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hub_server import CONFIG, NUM_PARAMETERS, index, safetensors
from octavo_engine.errors import ModelSourceError
from octavo_engine.model_source import resolve_geometry, resolve_model
from octavo_engine.remote import cache
from s3_server import S3Server

CONFIG_JSON = json.dumps(CONFIG).encode()
MODEL = {
    "llm/good/config.json": CONFIG_JSON, "llm/good/tokenizer.json": b"{}",
    "llm/good/model.safetensors": safetensors(NUM_PARAMETERS), "llm/good/README.md": b"unwanted",
    "llm/good/pytorch_model.bin": b"unwanted", "llm/good/original/consolidated.safetensors": b"unwanted",
    "llm/good/": b"", "llm/goodness/config.json": b"another model",
}  # fmt: skip
READ = ["config.json", "model.safetensors", "tokenizer.json"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_of_a_folder_comes_what_an_engine_reads(s3: S3Server) -> None:
    s3.objects["models"] = MODEL
    files = resolve_model("s3://models/llm/good")
    assert names(files.path) == READ
    assert s3.files_read() == set(READ)
    for name in READ:
        assert (files.path / name).read_bytes() == MODEL[f"llm/good/{name}"]
    assert files.read_json("config.json") == CONFIG


def test_a_bucket_may_be_a_model(s3: S3Server) -> None:
    s3.objects["my.model"] = {"config.json": CONFIG_JSON, "model.safetensors": safetensors(NUM_PARAMETERS)}
    assert resolve_model("s3://my.model").path == resolve_model("s3://my.model/").path


def test_the_geometry_needs_the_configuration_and_a_header(s3: S3Server) -> None:
    # 8 MB of weights.
    config = json.dumps({**CONFIG, "vocab_size": 20_000}).encode()
    weights = safetensors(1_960_000)
    s3.objects["models"] = {"large/config.json": config, "large/model.safetensors": weights}
    assert resolve_geometry("s3://models/large").checkpoint_bytes == 4 * 1_960_000
    assert s3.num_sent < 200_000


def test_an_index_says_which_shards_there_are(s3: S3Server) -> None:
    s3.objects["models"] = {
        "sharded/config.json": CONFIG_JSON,
        "sharded/model.safetensors.index.json": index(4 * NUM_PARAMETERS, "a.safetensors", "b.safetensors"),
        "sharded/a.safetensors": safetensors(NUM_PARAMETERS - 10), "sharded/b.safetensors": safetensors(10),
        "sharded/consolidated.safetensors": b"the same once more",
    }  # fmt: skip
    assert resolve_geometry("s3://models/sharded").checkpoint_bytes == 4 * NUM_PARAMETERS
    assert names(resolve_model("s3://models/sharded").path) == [
        "a.safetensors", "b.safetensors", "config.json", "model.safetensors.index.json",
    ]  # fmt: skip


def test_a_gguf_file_is_read_by_its_header_and_downloaded_alone(
    s3: S3Server, gguf_file: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "RANGE_BYTES", 1 << 20)
    s3.objects["models"] = {"gguf/tiny.gguf": gguf_file, "gguf/config.json": CONFIG_JSON}
    assert resolve_geometry("s3://models/gguf/tiny.gguf").vocab_size == 1500
    assert resolve_geometry("s3://models/gguf").vocab_size == 1500
    assert s3.num_sent < 0.05 * len(gguf_file)
    heard: list[float] = []
    files = resolve_model("s3://models/gguf/tiny.gguf", on_progress=lambda fraction, text: heard.append(fraction))
    assert files.is_gguf
    assert files.path.name == "tiny.gguf"
    assert files.path.read_bytes() == gguf_file
    assert heard == sorted(heard)
    assert heard[-1] == 1.0
    # The same object by the name of its folder is there already.
    assert resolve_model("s3://models/gguf").path == files.path


def test_what_is_there_is_not_fetched_again(s3: S3Server) -> None:
    s3.objects["models"] = dict(MODEL)
    first = resolve_model("s3://models/llm/good").path
    s3.asked.clear()
    assert resolve_model("s3://models/llm/good").path == first
    assert s3.files_read() == set()
    # Another file makes another model, of which only that file comes.
    s3.objects["models"]["llm/good/tokenizer.json"] = b'{"new": true}'
    second = resolve_model("s3://models/llm/good").path
    assert s3.files_read() == {"tokenizer.json"}
    assert (second / "tokenizer.json").read_bytes() == b'{"new": true}'
    assert (first / "tokenizer.json").read_bytes() == b"{}"


def test_an_interrupted_download_goes_on_where_it_stopped(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "RANGE_BYTES", 4096)
    weights = MODEL["llm/good/model.safetensors"]
    s3.objects["models"] = dict(MODEL)
    path = "/models/llm/good/model.safetensors"
    last = (len(weights) // 4096) * 4096
    asked = s3.asked

    class DownloadStoppedError(Exception):
        pass

    read_range = cache.RemoteFile.read

    def read(self: cache.RemoteFile, begin: int, end: int) -> bytes:
        if begin == last:
            raise DownloadStoppedError
        return read_range(self, begin, end)

    monkeypatch.setattr(cache.RemoteFile, "read", read)
    with pytest.raises(DownloadStoppedError):
        resolve_model("s3://models/llm/good")
    monkeypatch.setattr(cache.RemoteFile, "read", read_range)
    assert not list(Path(os.environ["XDG_CACHE_HOME"]).rglob("model.safetensors"))
    there = {each for method, place, each in asked if place == path and method == "GET"}
    assert len(there) > 1
    asked.clear()
    assert (resolve_model("s3://models/llm/good").path / "model.safetensors").read_bytes() == weights
    again = {each for method, place, each in asked if place == path and method == "GET"}
    assert f"bytes={last}-{len(weights) - 1}" in again
    assert not again & there


def test_a_broken_connection_is_tried_again(s3: S3Server) -> None:
    s3.objects["models"] = MODEL
    s3.cut_off["/models/llm/good/model.safetensors"] = 1
    folder = resolve_model("s3://models/llm/good").path
    assert (folder / "model.safetensors").read_bytes() == MODEL["llm/good/model.safetensors"]
    assert s3.cut_off["/models/llm/good/model.safetensors"] < 0


def test_a_connection_that_breaks_every_time_is_an_error(s3: S3Server) -> None:
    s3.objects["models"] = MODEL
    s3.cut_off["/models/llm/good/config.json"] = 99
    with pytest.raises(ModelSourceError, match=r"^s3://models/llm/good cannot be read .*check the network") as error:
        resolve_model("s3://models/llm/good")
    assert error.value.reason == "SourceUnavailable"


def test_two_processes_download_once(s3: S3Server) -> None:
    s3.objects["models"] = MODEL
    s3.held.clear()
    program = (
        "from octavo_engine.model_source import resolve_model\n"
        "heard = []\n"
        "print(resolve_model('s3://models/llm/good', on_progress=lambda *each: heard.append(each)).path)"
    )
    processes = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    # Both have asked what is there; one holds the locks.
    deadline = time.monotonic() + 30
    while [path for _, path, _ in s3.asked].count("/models") < 2 * 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    s3.held.set()
    paths = [process.communicate(timeout=60)[0] for process in processes]
    assert paths[0] == paths[1] != ""
    assert [place for method, place, _ in s3.asked if method == "GET"].count("/models/llm/good/model.safetensors") == 1


def test_a_process_that_is_killed_leaves_no_half_file(s3: S3Server) -> None:
    s3.objects["models"] = MODEL
    s3.held.clear()
    program = "from octavo_engine.model_source import resolve_model; resolve_model('s3://models/llm/good')"
    process = subprocess.Popen([sys.executable, "-c", program])
    blobs = Path(os.environ["XDG_CACHE_HOME"], "octavo", "models", "blobs")
    deadline = time.monotonic() + 30
    while not list(blobs.glob("*.partial")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    s3.held.set()
    assert list(blobs.glob("*.partial"))
    folder = resolve_model("s3://models/llm/good").path
    assert (folder / "model.safetensors").read_bytes() == MODEL["llm/good/model.safetensors"]
    assert not list(blobs.glob("*.partial"))


def test_a_download_is_a_phase_of_the_start_and_ends_with_the_server(s3: S3Server, gguf_file: bytes) -> None:
    s3.objects["models"] = {"gguf/tiny.gguf": gguf_file}
    s3.held.clear()
    command = [
        str(Path(sys.executable).with_name("octavo")),
        "serve",
        "s3://models/gguf",
        "--port",
        "0",
        "--device",
        "cpu",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        log = next(line for line in process.stderr if "Downloading" in line)
        assert "0 % 0.00 of 0.01 GB" in log
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert "Traceback" not in process.stderr.read()
    s3.held.set()


def test_a_store_that_is_away_is_bridged_by_what_is_there(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    s3.objects["models"] = MODEL
    folder = resolve_model("s3://models/llm/good").path
    s3.shutdown()
    s3.server_close()
    assert resolve_model("s3://models/llm/good").path == folder
    assert "serving what it held when it was last asked" in caplog.text
    with pytest.raises(ModelSourceError, match="check the network, AWS_ENDPOINT_URL"):
        resolve_model("s3://models/llm/other")
    # Weights that somebody removed are not served.
    (folder / "model.safetensors").resolve().unlink()
    with pytest.raises(ModelSourceError, match="check the network"):
        resolve_model("s3://models/llm/good")


def test_an_object_that_changes_while_it_is_read_is_noticed(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.objects["models"] = dict(MODEL)
    read_range = cache.RemoteFile.read

    def read(self: cache.RemoteFile, begin: int, end: int) -> bytes:
        s3.objects["models"]["llm/good/model.safetensors"] = safetensors(NUM_PARAMETERS + 1)
        return read_range(self, begin, end)

    monkeypatch.setattr(cache.RemoteFile, "read", read)
    with pytest.raises(ModelSourceError, match=r"answered PreconditionFailed: it was changed while it was read"):
        resolve_model("s3://models/llm/good")


PROBLEMS = {
    "no such bucket": ("s3://nothing-here/x", "S3 answered NoSuchBucket: check the bucket's name", "ModelNotFound"),
    "empty prefix": ("s3://models/none", "holds no objects: check the prefix", "ModelNotFound"),
    "no such file": ("s3://models/a.gguf", "S3 answered 404: there is no such object or bucket", "ModelNotFound"),
    "no configuration": ("s3://models/bare", r"has no config\.json and no \.gguf file", "ModelNotFound"),
    "no weights": ("s3://models/config", r"has no \.safetensors weights and no \.gguf", "ModelNotFound"),
    "several": ("s3://models/many", r"holds several \.gguf files, of which one .*: a\.gguf, b\.gguf", "ModelNotFound"),
    "denied": ("s3://forbidden/x", "S3 answered AccessDenied; the credentials need s3:GetObj", "ModelAccessDenied"),
    "slow down": ("s3://busy-bucket/x", "S3 answered SlowDown: too many requests", "SourceRateLimited"),
    "too many": ("s3://throttled/x", "S3 answered TooManyRequests: too many requests", "SourceRateLimited"),
    "in trouble": ("s3://broken/x", "S3 answered 500 InternalError", "SourceUnavailable"),
    "elsewhere": ("s3://elsewhere/x", "lies in another region; name it in AWS_REGION", "ModelUnreadable"),
    "no name": ("s3:///x", "names no bucket: write s3://BUCKET/PREFIX", "ModelUnreadable"),
    "a wrong name": ("s3://My_Bucket/x", "names no bucket: write s3://BUCKET/PREFIX", "ModelUnreadable"),
    "broken config": ("s3://models/text", r"has a config\.json that is not JSON", "ModelUnreadable"),
    "missing shard": ("s3://models/lost", r"names files that are not there: b\.saf", "ModelUnreadable"),
}  # fmt: skip
BROKEN = {
    "bare/README.md": b"", "config/config.json": CONFIG_JSON, "many/a.gguf": b"GGUF", "many/b.gguf": b"GGUF",
    "text/config.json": b"{", "text/model.safetensors": safetensors(1),
    "lost/config.json": CONFIG_JSON, "lost/a.safetensors": safetensors(1),
    "lost/model.safetensors.index.json": index(None, "a.safetensors", "b.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize(("address", "message", "reason"), PROBLEMS.values(), ids=PROBLEMS)
def test_every_problem_is_one_sentence(address: str, message: str, reason: str, s3: S3Server) -> None:
    s3.objects["models"] = BROKEN
    with pytest.raises(ModelSourceError, match=message) as error:
        resolve_geometry(address)
    assert str(error.value).startswith(f"{address} ")
    assert "\n" not in str(error.value)
    assert error.value.reason == reason


KEYS = {
    "unknown": ({"AWS_ACCESS_KEY_ID": "OTHER"}, "InvalidAccessKeyId: check AWS_ACCESS_KEY_ID"),
    "wrong": ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "SignatureDoesNotMatch: check AWS_ACCESS_KEY_ID"),
    "half": ({"AWS_SECRET_ACCESS_KEY": None}, "Partial credentials found.*check AWS_ACCESS_KEY_ID"),
    "none": ({"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, "no credentials are known: give AWS_ACCESS"),
}


@pytest.mark.parametrize(("variables", "message"), KEYS.values(), ids=KEYS)
def test_wrong_credentials_are_told_from_none(variables, message, s3: S3Server, monkeypatch) -> None:
    s3.objects["models"] = MODEL
    for name, value in variables.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    with pytest.raises(ModelSourceError, match=message) as error:
        resolve_geometry("s3://models/llm/good")
    assert error.value.reason == "ModelAccessDenied"


def test_a_public_bucket_needs_no_credentials(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    s3.objects["models"] = MODEL
    s3.public.add("models")
    assert resolve_geometry("s3://models/llm/good").num_layers == 2


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [("AWS_ENDPOINT_URL", "minio:9000", "Invalid endpoint"), ("AWS_PROFILE", "none", "profile .*none.* could not")],
)
def test_a_wrong_setting_is_a_sentence(variable, value, message, s3: S3Server, monkeypatch) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ModelSourceError, match=rf"s3://models/x cannot be read: .*{message}"):
        resolve_geometry("s3://models/x")


def test_an_object_store_has_no_revisions(s3: S3Server) -> None:
    with pytest.raises(ModelSourceError, match="has no revisions: only models of the hub"):
        resolve_geometry("s3://models/llm/good", revision="main")


def test_a_folder_that_cannot_be_written_is_named(s3: S3Server, tmp_path: Path, monkeypatch) -> None:
    s3.objects["models"] = MODEL
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(
        ModelSourceError, match=r"cannot be stored in .*/file/octavo/models: Not a directory; XDG_CACHE"
    ):
        resolve_model("s3://models/llm/good")


def test_a_disk_that_is_too_small_is_noticed_before_the_download(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.objects["models"] = MODEL
    usage = cache.shutil.disk_usage("/")
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ModelSourceError, match=r"needs 0\.0 GB in .*, where 0\.0 GB are free: make room"):
        resolve_model("s3://models/llm/good")
    assert "model.safetensors" not in s3.files_read()
