"""Models in container registries: artifacts and images, in a local registry that speaks the distribution protocol."""

import base64
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_server import CONFIG, NUM_PARAMETERS, index, safetensors
from octavo_engine.errors import ModelSourceError
from octavo_engine.model_source import resolve_geometry, resolve_model
from octavo_engine.remote import archives, cache
from registry_server import (
    IDENTITY_TOKEN,
    INDEX,
    PASSWORD,
    TAR,
    TITLE,
    USER,
    Layer,
    RegistryServer,
    compressed,
    digest,
    file_layers,
    tar,
)

CONFIG_JSON = json.dumps(CONFIG).encode()
FILES = {
    "config.json": CONFIG_JSON, "tokenizer.json": b"{}", "model.safetensors": safetensors(NUM_PARAMETERS),
}  # fmt: skip
# Too large to be read by accident: 8 MB of weights.
LARGE = {
    "config.json": json.dumps({**CONFIG, "vocab_size": 20_000}).encode(), "generation_config.json": b"{}",
    "model.safetensors": safetensors(1_960_000),
}  # fmt: skip
MODEL_PACK = "org.cncf.model.filepath"


def below(folder: str, files: dict[str, bytes]) -> dict[str, bytes]:
    return {f"{folder}/{name}": content for name, content in files.items()}


def model_pack(files: dict[str, bytes]) -> list[Layer]:
    """Weights as they are, everything else in archives."""
    raw = "application/vnd.cncf.model.weight.v1.raw"
    in_tar = "application/vnd.cncf.model.weight.config.v1.tar"
    return [
        Layer(content, raw, {MODEL_PACK: name})
        if name.endswith(".safetensors")
        else Layer(tar({name: content}), in_tar, {MODEL_PACK: name})
        for name, content in files.items()
    ]


def halves(content: bytes) -> tuple[bytes, bytes]:
    return content[: len(content) // 2], content[len(content) // 2 :]


# How a model is pushed -> its layers.
FORMS: dict[str, Callable[[dict[str, bytes]], list[Layer]]] = {
    "a layer per file": lambda files: file_layers({**files, "README.md": b"unwanted"}),
    "a layer per file in a folder": lambda files: file_layers(below("my-model", files)),
    "a folder by ORAS": lambda files: [
        Layer(compressed(tar(below("m", files))), f"{TAR}+gzip", {TITLE: "m", "io.deis.oras.content.unpack": "true"})
    ],
    "ModelPack": model_pack,
    "ModelKit": lambda files: [
        Layer(compressed(tar({name: content})), "application/vnd.kitops.modelkit.model.v1.tar+gzip")
        for name, content in files.items()
    ],
    "image": lambda files: [
        Layer(compressed(tar({"etc/config.json": b"{}", "bin/sh": b"#!"})), f"{TAR}+gzip"),
        Layer(compressed(tar(below("models", files))), f"{TAR}+gzip"),
    ],
    "image whose layer has several members": lambda files: [
        Layer(b"".join(map(compressed, halves(tar(below("models", files))))), f"{TAR}+gzip")
    ],
    "image of Docker": lambda files: [
        Layer(compressed(tar(below("models", files))), "application/vnd.docker.image.rootfs.diff.tar.gzip")
    ],
    "uncompressed image": lambda files: [Layer(tar(below("./models", files)), TAR)],
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_each_form_brings_what_an_engine_reads(form, registry: RegistryServer) -> None:
    registry.push("org/model", "v1", form(FILES))
    address = f"oci://{registry.host}/org/model:v1"
    heard: list[float] = []
    files = resolve_model(address, on_progress=lambda fraction, text: heard.append(fraction))
    assert sorted(path.name for path in files.path.iterdir()) == sorted(FILES)
    for name, content in FILES.items():
        assert (files.path / name).read_bytes() == content
    assert heard == sorted(heard)
    assert resolve_geometry(address).hidden_size == 48
    # What is there is not fetched again, and no credentials went to where blobs lie.
    registry.asked.clear()
    assert resolve_model(address).path == files.path
    assert not [path for path, _ in registry.asked if "/blobs/" in path]
    assert not registry.leaked


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_geometry_needs_no_weights(form, registry: RegistryServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "_HEAD_BYTES", 1 << 20)
    monkeypatch.setattr(archives, "_STREAM_BUFFER_BYTES", 1 << 14)
    registry.push("org/model", "v1", form(LARGE))
    geometry = resolve_geometry(f"oci://{registry.host}/org/model:v1")
    assert geometry.vocab_size == 20_000
    # Weights of zeros are small once they are compressed, so it is the requests that count.
    largest = max(registry.blobs.values(), key=len)
    assert registry.num_sent < max(1 << 20, len(largest) // 2)
    # Only what lies in a compressed layer has no header that can be read without what comes before it.
    assert geometry.checkpoint_bytes in (None, 4 * 1_960_000)


@pytest.mark.parametrize("form", ["a layer per file", "ModelPack", "uncompressed image"])
def test_the_bytes_of_uncompressed_weights_are_known(form: str, registry: RegistryServer) -> None:
    registry.push("org/model", "v1", FORMS[form](LARGE))
    assert resolve_geometry(f"oci://{registry.host}/org/model:v1").checkpoint_bytes == 4 * 1_960_000


def test_weights_before_the_configuration_are_not_read_to_their_end(
    registry: RegistryServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "_MOST_STREAMED_BYTES", 1 << 20)
    monkeypatch.setattr(archives, "_STREAM_BUFFER_BYTES", 1 << 12)
    monkeypatch.setattr(archives, "_HEAD_BYTES", 1 << 12)
    # Random bytes, which gzip does not shorten.
    files = {"models/a.safetensors": os.urandom(4 << 20), "models/config.json": LARGE["config.json"]}
    registry.push("org/model", "v1", [Layer(compressed(tar(files)), f"{TAR}+gzip")])
    with pytest.raises(ModelSourceError, match=r"no config\.json at the beginning of its compressed layers") as error:
        resolve_geometry(f"oci://{registry.host}/org/model:v1")
    assert error.value.reason == "InspectionFailed"
    assert registry.num_sent < 1 << 20


@pytest.mark.parametrize("form", ["Docker's", "image"])
def test_a_gguf_file_is_a_model(form: str, registry: RegistryServer, gguf_file: bytes) -> None:
    layers = {
        "Docker's": [
            Layer(gguf_file, "application/vnd.docker.ai.gguf.v3"),
            Layer(b"Apache-2.0", "application/vnd.docker.ai.license"),
        ],
        "image": [Layer(compressed(tar({"models/tiny.gguf": gguf_file})), f"{TAR}+gzip")],
    }[form]
    registry.push("ai/tiny", "latest", layers)
    address = f"oci://{registry.host}/ai/tiny"
    assert resolve_geometry(address).vocab_size == 1500
    assert registry.num_sent < 0.05 * len(gguf_file)
    assert resolve_model(address).path.read_bytes() == gguf_file


def test_a_higher_layer_hides_what_lies_below(registry: RegistryServer) -> None:
    lower = below("models", {**FILES, "old.safetensors": b"", "vocab.json": b"{}"})
    upper = {"models/.wh.old.safetensors": b"", "models/tokenizer.json": b'{"new": 1}'}
    opaque = {"models/.wh..wh..opq": b"", **below("models", FILES)}
    registry.push("org/model", "changed", [Layer(tar(lower), TAR), Layer(tar(upper), TAR)])
    registry.push("org/model", "replaced", [Layer(tar(lower), TAR), Layer(tar(opaque), TAR)])
    registry.push("org/model", "removed", [Layer(tar(lower), TAR), Layer(tar({".wh.models": b""}), TAR)])
    changed = resolve_model(f"oci://{registry.host}/org/model:changed").path
    assert (changed / "tokenizer.json").read_bytes() == b'{"new": 1}'
    assert (changed / "vocab.json").exists()
    replaced = resolve_model(f"oci://{registry.host}/org/model:replaced").path
    assert sorted(path.name for path in replaced.iterdir()) == sorted(FILES)
    with pytest.raises(ModelSourceError, match=r"has no config\.json and no \.gguf file"):
        resolve_model(f"oci://{registry.host}/org/model:removed")


def test_an_index_leads_to_a_manifest(registry: RegistryServer) -> None:
    wanted = registry.push("org/model", "one", file_layers(FILES))
    attestation = registry.push("org/model", "two", file_layers({"x": b""}))
    entries = [
        {"digest": attestation, "platform": {"os": "unknown", "architecture": "unknown"}},
        {"digest": wanted, "platform": {"os": "linux", "architecture": "riscv64"}},
    ]
    content = registry.push_manifest("org/model", "v1", INDEX, {"mediaType": INDEX, "manifests": entries})
    for reference in (":v1", f"@{content}", f":gone@{wanted}"):
        assert resolve_geometry(f"oci://{registry.host}/org/model{reference}").num_layers == 2


def test_damaged_blobs_are_refused_and_fetched_anew(registry: RegistryServer) -> None:
    for form in ("a layer per file", "image"):
        layers = FORMS[form](FILES)
        registry.push("org/model", "v1", layers)
        name = digest(layers[-1].content if form == "image" else FILES["model.safetensors"])
        good = registry.blobs[name]
        registry.blobs[name] = good[:-1] + bytes([good[-1] ^ 1])
        with pytest.raises(ModelSourceError, match=r"(not sha256:.* is damaged|not a readable tar archive)"):
            resolve_model(f"oci://{registry.host}/org/model:v1")
        registry.blobs[name] = good
        folder = resolve_model(f"oci://{registry.host}/org/model:v1").path
        assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_a_manifest_that_is_not_the_one_of_its_digest_is_refused(registry: RegistryServer) -> None:
    wanted = registry.push("org/model", "v1", file_layers(FILES))
    registry.manifests["org/model", wanted] = (registry.manifests["org/model", wanted][0], b"{}")
    with pytest.raises(ModelSourceError, match=f"sent a manifest without the digest {wanted}"):
        resolve_geometry(f"oci://{registry.host}/org/model@{wanted}")


def test_a_server_in_trouble_is_asked_again(registry: RegistryServer) -> None:
    registry.push("org/model", "v1", file_layers(FILES))
    registry.flaky["/v2/org/model/manifests/v1"] = 2
    registry.flaky[f"/v2/org/model/blobs/{digest(FILES['config.json'])}"] = 2
    assert resolve_geometry(f"oci://{registry.host}/org/model:v1").num_layers == 2


def test_a_link_in_a_layer_is_refused(registry: RegistryServer) -> None:
    made = io.BytesIO(tar(below("models", FILES)))
    with tarfile.open(fileobj=made, mode="a") as opened:
        link = tarfile.TarInfo("models/tokenizer.json")
        link.type, link.linkname = tarfile.SYMTYPE, "../blobs/tokenizer.json"
        opened.addfile(link)
    registry.push("org/model", "v1", [Layer(compressed(made.getvalue()), f"{TAR}+gzip")])
    with pytest.raises(ModelSourceError, match=r"has models/tokenizer\.json as a link in a layer"):
        resolve_model(f"oci://{registry.host}/org/model:v1")


def test_an_identity_token_does_not_follow_a_redirection(registry: RegistryServer, tmp_path: Path, monkeypatch) -> None:
    registry.push("org/model", "v1", file_layers(FILES))
    registry.private.add("org/model")
    registry.tokens_elsewhere = True
    content = {"auths": {registry.host: {"identitytoken": IDENTITY_TOKEN}}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    with pytest.raises(ModelSourceError, match="answered 307 to the credentials"):
        resolve_model(f"oci://{registry.host}/org/model:v1")
    assert "/elsewhere" not in [path for path, _ in registry.asked]


def test_an_interrupted_archive_starts_anew(registry: RegistryServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "RANGE_BYTES", 4096)
    layers = FORMS["uncompressed image"](FILES)
    registry.push("org/model", "v1", layers)
    path = f"/v2/org/model/blobs/{digest(layers[0].content)}"
    read = cache.RemoteFile.read

    def read_beginning(self: cache.RemoteFile, begin: int, end: int) -> bytes:
        if begin > 8192:
            raise KeyError
        return read(self, begin, end)

    monkeypatch.setattr(cache.RemoteFile, "read", read_beginning)
    with pytest.raises(KeyError):
        resolve_model(f"oci://{registry.host}/org/model:v1")
    assert path in [each for each, _ in registry.asked]
    monkeypatch.setattr(cache.RemoteFile, "read", read)
    folder = resolve_model(f"oci://{registry.host}/org/model:v1").path
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_a_registry_that_is_away_is_bridged_by_what_is_there(registry: RegistryServer, caplog) -> None:
    registry.push("org/model", "v1", file_layers(FILES))
    address = f"oci://{registry.host}/org/model:v1"
    folder = resolve_model(address).path
    registry.shutdown()
    registry.server_close()
    assert resolve_model(address).path == folder
    assert "serving what it held when it was last asked" in caplog.text
    with pytest.raises(
        ModelSourceError, match=r"cannot be reached over HTTP .* check the name and the network"
    ) as error:
        resolve_geometry(address)
    assert error.value.reason == "SourceUnavailable"


CREDENTIALS = {
    "a pod's Secret": lambda registry, folder: {".dockerconfigjson": registry.docker_config()},
    "docker login": lambda registry, folder: {"DOCKER_CONFIG": write(folder / "config.json", registry.docker_config())},
    "podman login": lambda registry, folder: {
        "REGISTRY_AUTH_FILE": f"{write(folder / 'auth.json', registry.docker_config())}/auth.json"
    },
    "a helper": lambda registry, folder: {
        "DOCKER_CONFIG": write(
            folder / "config.json", json.dumps({"auths": {registry.host: {}}, "credsStore": "test"})
        ),
        "PATH": write(
            folder / "docker-credential-test",
            f'#!/bin/sh\nread host\necho \'{{"Username": "{USER}", "Secret": "{PASSWORD}"}}\'\n',
        ),
    },
    "an identity token": lambda registry, folder: {
        ".dockerconfigjson": json.dumps({"auths": {registry.host: {"identitytoken": IDENTITY_TOKEN}}})
    },
    "a path and stars": lambda registry, folder: {
        ".dockerconfigjson": json.dumps(
            {
                "auths": {
                    "127.0.0.2": {"auth": "bm86bm8="},
                    f"http://{registry.host}/other": {"auth": "bm86bm8="},
                    f"http://127.0.*.1:{registry.server_port}/org": {"username": USER, "password": PASSWORD},
                }
            }
        )
    },
}


def write(file: Path, text: str) -> str:
    file.write_text(text)
    file.chmod(0o755)
    return str(file.parent)


@pytest.mark.parametrize("source", CREDENTIALS.values(), ids=CREDENTIALS)
def test_credentials_come_from_where_tools_keep_them(source, registry: RegistryServer, tmp_path, monkeypatch) -> None:
    registry.push("org/model", "v1", file_layers(FILES))
    registry.private.add("org/model")
    for name, value in source(registry, tmp_path).items():
        monkeypatch.setenv(name, value)
    assert resolve_geometry(f"oci://{registry.host}/org/model:v1").num_layers == 2
    assert not registry.leaked


def test_a_registry_may_ask_for_the_password_itself(registry: RegistryServer, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.push("org/model", "v1", file_layers(FILES))
    registry.basic.add("org/model")
    monkeypatch.setenv(".dockerconfigjson", registry.docker_config())
    assert resolve_geometry(f"oci://{registry.host}/org/model:v1").num_layers == 2
    assert not registry.leaked


@pytest.mark.parametrize("is_basic", [False, True], ids=["token", "basic"])
@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "Secret of the type kubernetes.io/dockerconfigjson in spec.model.secretRef"),
        ("wrong", "(answered 401 to the credentials|answered 401: it does not exist, or the credentials may not)"),
        ("{", r"\.dockerconfigjson is no configuration of Docker"),
        ("noise", r"an `auth` in \.dockerconfigjson is not base64 of NAME:PASSWORD"),
    ],
    ids=["none", "wrong", "broken", "noise"],
)
def test_missing_and_wrong_credentials_are_told(
    config, message: str, is_basic: bool, registry: RegistryServer, monkeypatch
) -> None:
    registry.push("org/model", "v1", file_layers(FILES))
    (registry.basic if is_basic else registry.private).add("org/model")
    noise = json.dumps({"auths": {registry.host: {"auth": base64.b64encode(b"no colon").decode()}}})
    texts = {"wrong": registry.docker_config("wrong"), "noise": noise}
    if config is not None:
        monkeypatch.setenv(".dockerconfigjson", texts.get(config, config))
    with pytest.raises(ModelSourceError, match=message) as error:
        resolve_geometry(f"oci://{registry.host}/org/model:v1")
    assert error.value.reason == "ModelAccessDenied"


PROBLEMS = {
    "no tag": ("org/model:v9", "answered 404: there is no such repository, tag or digest", "ModelNotFound"),
    "no repository": ("org/none:v1", "answered 404: there is no such repository, tag or digest", "ModelNotFound"),
    "forbidden": ("forbidden/model:v1", "answered 403: it does not exist, or no credentials are", "ModelAccessDenied"),
    "refused": ("no/token:v1", "answered 401: it does not exist, or no credentials are known", "ModelAccessDenied"),
    "too many": ("busy/model:v1", "answered 429: too many requests; credentials may raise", "SourceRateLimited"),
    "in trouble": ("broken/model:v1", "answered 500", "SourceUnavailable"),
    "no names": ("org/unnamed:v1", "holds no files that can be told: push one layer per file", "ModelNotFound"),
    "no model": ("org/readme:v1", r"has no config\.json and no \.gguf file", "ModelNotFound"),
    "two models": ("org/two:v1", "holds several models, in a, b: one is served at a time", "ModelUnreadable"),
    "zstd": ("org/zstd:v1", "has layers compressed by zstd, which is not read", "ModelUnreadable"),
    "no archive": ("org/text:v1", "has a layer that is not a readable tar archive", "ModelUnreadable"),
    "outside": ("org/outside:v1", r"names a file \.\./config\.json, which is no path inside", "ModelUnreadable"),
    "other manifest": ("org/other:v1", "is of a type that is not known", "ModelUnreadable"),
    "no manifest": ("org/html:v1", "answers with something that is no manifest", "ModelUnreadable"),
    "lost shard": ("org/lost:v1", r"index\.json that names files that are not there: b\.saf", "ModelUnreadable"),
}  # fmt: skip


@pytest.fixture
def odd_artifacts(registry: RegistryServer) -> RegistryServer:
    """A registry with artifacts that are no models."""
    registry.push("org/model", "v1", file_layers(FILES))
    registry.push("org/unnamed", "v1", [Layer(b"x")])
    registry.push("org/readme", "v1", file_layers({"README.md": b""}))
    registry.push("org/two", "v1", file_layers(below("a", FILES) | below("b", FILES)))
    registry.push("org/zstd", "v1", [Layer(b"x", f"{TAR}+zstd")])
    registry.push("org/text", "v1", [Layer(b"no archive" * 100, TAR)])
    registry.push("org/outside", "v1", file_layers({"../config.json": CONFIG_JSON}))
    registry.push_manifest("org/other", "v1", INDEX, {"schemaVersion": 1, "fsLayers": []})
    registry.manifests["org/html", "v1"] = (INDEX, b"<html>")
    lost = {"config.json": CONFIG_JSON, "model.safetensors.index.json": index(None, "a.safetensors", "b.safetensors")}
    registry.push("org/lost", "v1", file_layers({**lost, "a.safetensors": safetensors(1)}))
    return registry


@pytest.mark.parametrize("resolve", [resolve_geometry, resolve_model], ids=["geometry", "model"])
@pytest.mark.parametrize(("name", "message", "reason"), PROBLEMS.values(), ids=PROBLEMS)
def test_every_problem_is_one_sentence(resolve, name, message, reason, odd_artifacts: RegistryServer) -> None:
    address = f"oci://{odd_artifacts.host}/{name}"
    with pytest.raises(ModelSourceError, match=message) as error:
        resolve(address)
    assert str(error.value).startswith(f"{address} ")
    assert "\n" not in str(error.value)
    assert error.value.reason == reason


def test_a_registry_without_ranges_is_refused_before_it_sends_all(registry: RegistryServer) -> None:
    registry.push("org/model", "v1", file_layers(LARGE))
    registry.no_ranges = True
    with pytest.raises(ModelSourceError, match="does not answer requests for parts of a file"):
        resolve_geometry(f"oci://{registry.host}/org/model:v1")


@pytest.mark.parametrize(
    "address", ["oci://", "oci://model", "oci://org/model:v1", "oci://ghcr.io/Org/Model", "oci://a.b/"]
)
def test_an_address_names_registry_and_repository(address: str) -> None:
    with pytest.raises(ModelSourceError, match=r"names no artifact: write oci://REGISTRY/REPOSITORY:TAG"):
        resolve_model(address)


def test_only_loopback_is_asked_without_encryption(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelSourceError, match=r"registry\.invalid:5000 cannot be reached over HTTPS"):
        resolve_geometry("oci://registry.invalid:5000/org/model")
