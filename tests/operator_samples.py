"""Nodes, models and specs for tests of the operator's decisions."""

from collections.abc import Mapping
from typing import Any

from octavo_engine.geometry import Geometry
from octavo_operator.api import InferenceServiceSpec
from octavo_operator.decision import Defaults
from octavo_operator.observe import ModelGeometry, ObservedNode, observe_node

Manifest = dict[str, Any]

DEFAULTS = Defaults(engine_image="octavo/engine:test")


def llama(num_layers: int = 32, hidden_size: int = 4096) -> Geometry:
    """Llama 3.1 8B, or another size."""
    return Geometry(
        architecture="LlamaForCausalLM",
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=hidden_size // 128,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=hidden_size * 7 // 2,
        vocab_size=128_256,
        max_position_embeddings=131_072,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


LLAMA_8B = ModelGeometry(geometry=llama())
LLAMA_70B = ModelGeometry(geometry=llama(num_layers=80, hidden_size=8192))
UNKNOWN = ModelGeometry(problem="the hub cannot be reached")


def node_manifest(
    name: str,
    *,
    product: str = "",
    memory_mib: int = 0,
    compute: str = "",
    gpus: int = 0,
    resources: Mapping[str, str] | None = None,
    driver: int = 0,
    arch: str = "amd64",
    cpu: str = "64",
    memory: str = "512Gi",
    ready: str = "True",
    labels: Mapping[str, str] | None = None,
    **spec: Any,
) -> Manifest:
    """A Node as `kubectl get node -o yaml` shows it, with the labels of GPU feature discovery."""
    all_labels = {"kubernetes.io/arch": arch, "kubernetes.io/os": "linux", **(labels or {})}
    if product:
        all_labels["nvidia.com/gpu.product"] = product
    if memory_mib:
        all_labels["nvidia.com/gpu.memory"] = str(memory_mib)
    if compute:
        all_labels["nvidia.com/gpu.compute.major"], all_labels["nvidia.com/gpu.compute.minor"] = compute.split(".")
    if driver:
        all_labels["nvidia.com/cuda.driver.major"] = str(driver)
    allocatable = {"cpu": cpu, "memory": memory, "pods": "110", **(resources or {})}
    if gpus:
        allocatable["nvidia.com/gpu"] = str(gpus)
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": all_labels},
        "spec": spec,
        "status": {"allocatable": allocatable, "conditions": [{"type": "Ready", "status": ready}]},
    }


def node(name: str, **settings: Any) -> ObservedNode:
    return observe_node(node_manifest(name, **settings))


def cpu_node(name: str = "cpu-0", **settings: Any) -> ObservedNode:
    return node(name, **settings)


def l4_node(name: str = "l4-0", gpus: int = 1, **settings: Any) -> ObservedNode:
    return node(name, product="NVIDIA-L4", memory_mib=23_034, compute="8.9", gpus=gpus, **settings)


def h100_node(name: str = "h100-0", gpus: int = 8, **settings: Any) -> ObservedNode:
    return node(name, product="NVIDIA-H100-80GB-HBM3", memory_mib=81_559, compute="9.0", gpus=gpus, **settings)


def gh200_node(name: str = "gh200-0", gpus: int = 1, **settings: Any) -> ObservedNode:
    settings = {"arch": "arm64", "memory": "480Gi", **settings}
    return node(name, product="NVIDIA-GH200-480GB", memory_mib=97_871, compute="9.0", gpus=gpus, **settings)


def resource_slice(node_name: str, *devices: Manifest, driver: str = "gpu.nvidia.com") -> Manifest:
    """A ResourceSlice as a DRA driver publishes it."""
    return {
        "apiVersion": "resource.k8s.io/v1",
        "kind": "ResourceSlice",
        "metadata": {"name": f"{node_name}-{driver}"},
        "spec": {
            "driver": driver,
            "nodeName": node_name,
            "pool": {"name": node_name, "generation": 1, "resourceSliceCount": 1},
            "devices": list(devices),
        },
    }


def gpu_device(
    name: str, product: str, compute: str, memory_mib: int, *, driver: str = "580.95.5", profile: str = ""
) -> Manifest:
    """A device of a ResourceSlice, with the attributes of NVIDIA's driver."""
    attributes: Manifest = {
        "type": {"string": "mig" if profile else "gpu"},
        "productName": {"string": product},
        "cudaComputeCapability": {"version": f"{compute}.0"},
        "driverVersion": {"version": driver},
        "cudaDriverVersion": {"version": "13.0.0"},
    }
    if profile:
        attributes["profile"] = {"string": profile}
    return {"name": name, "attributes": attributes, "capacity": {"memory": {"value": f"{memory_mib}Mi"}}}


def hardware_profile(name: str, created: str = "", **fields: Any) -> Manifest:
    """A HardwareProfile as a user writes it, in camelCase."""
    metadata = {"name": name, **({"creationTimestamp": created} if created else {})}
    return {"apiVersion": "octavo.dev/v1alpha1", "kind": "HardwareProfile", "metadata": metadata, "spec": fields}


def spec(**fields: Any) -> InferenceServiceSpec:
    """A spec as a user writes it, in camelCase."""
    return InferenceServiceSpec.model_validate({"model": {"uri": "hf://meta-llama/Llama-3.1-8B-Instruct"}, **fields})
