"""Models in an object store and in a registry: a Job reads them with the engine's credentials, and no engine fails."""

import json
from collections.abc import Iterator

import pytest
from api_objects import ApiObjects
from hub_server import CONFIG, NUM_PARAMETERS, safetensors
from operator_harness import GetService, Manifest, OperatorProcess, condition, inference_service, wait_for
from registry_server import RegistryServer, file_layers, serve_registry
from s3_server import S3Server, serve_s3

FILES = {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": safetensors(NUM_PARAMETERS)}


@pytest.fixture
def s3() -> Iterator[S3Server]:
    with serve_s3() as server:
        server.objects["models"] = {f"tiny/{name}": content for name, content in FILES.items()}
        yield server


@pytest.fixture
def registry() -> Iterator[RegistryServer]:
    with serve_registry() as server:
        server.push("ai/tiny", "v1", file_layers(FILES))
        server.private.add("ai/tiny")
        yield server


def secret(name: str, namespace: str, kind: str, data: dict[str, str]) -> Manifest:
    metadata = {"name": name, "namespace": namespace}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "type": kind, "stringData": data}


@pytest.mark.usefixtures("cluster")
def test_secrets_open_object_stores_and_registries(
    operator_process: OperatorProcess,
    objects: ApiObjects,
    namespace: str,
    get_service: GetService,
    s3: S3Server,
    registry: RegistryServer,
) -> None:
    login = {".dockerconfigjson": registry.docker_config()}
    objects.apply(secret("keys", namespace, "Opaque", s3.environment()))
    objects.apply(secret("login", namespace, "kubernetes.io/dockerconfigjson", login))
    address = f"oci://{registry.host}/ai/tiny:v1"
    models = {
        "store": {"uri": "s3://models/tiny", "secretRef": {"name": "keys"}},
        "registry": {"uri": address, "secretRef": {"name": "login"}},
        "stranger": {"uri": address},
        "nothing": {"uri": "s3://models/none", "secretRef": {"name": "keys"}},
    }
    for name, model in models.items():
        replicas = 0 if name in ("store", "registry") else 1
        objects.apply(inference_service(name, namespace, model=model, scaling={"replicas": replicas}))
    for name in ("store", "registry"):
        found = wait_for(get_service, name, "True", "ScaledToZero", 120)
        assert condition(found, "ModelFits")["reason"] == "Fits"
        (variant,) = found["status"]["plan"]["variants"]
        assert variant["maxModelLen"] == 64
    assert registry.num_sent < len(FILES["model.safetensors"])
    refused = condition(wait_for(get_service, "stranger", "False", "ModelAccessDenied", 120), "Ready")["message"]
    assert f"{address} cannot be read: {registry.host} answered 401: it does not exist, or no credentials" in refused
    absent = condition(wait_for(get_service, "nothing", "False", "ModelNotFound", 120), "Ready")["message"]
    assert "s3://models/none holds no objects: check the prefix" in absent
    owners = {each["metadata"]["ownerReferences"][0]["name"] for each in objects.list("Deployment", namespace)}
    assert owners == {"store", "registry"}
