"""What is planned on one node of each kind, to the block, and the sentence of why; and of published models on clusters.

A change of the hardware table or of the capacity model shows here: each number that moves wants to be looked at. The
figures are in `node_fixtures.yaml`; this writes them anew:

    PYTHONPATH=tests .venv/bin/python tests/operator/test_node_fixtures.py
"""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from octavo_engine.geometry import geometry_from_config, why_not_served
from octavo_kernels.hardware import BY_NAME
from octavo_operator.claims import observe_slice
from octavo_operator.observe import ModelGeometry
from octavo_operator.plan import make_plan
from octavo_operator.report import plan_status
from operator_samples import DEFAULTS, LLAMA_8B, cpu_node, gpu_device, node, resource_slice, spec
from published_models import PUBLISHED


def node_of(name, **settings):
    """Eight devices of a row of the table, as GPU feature discovery labels them."""
    row = BY_NAME[name]
    capability = "{}.{}".format(*row.compute_capability)
    common = {"memory_mib": row.memory_mib, "compute": capability, "gpus": 8, "driver": 580}
    (product,) = row.products
    arch = min(row.cpu_architectures)
    return node(name, **{"product": f"NVIDIA-{product}", "arch": arch, **common, **settings})


FIGURES = Path(__file__).with_name("node_fixtures.yaml")
DEVICES = (
    "l4", "l40s", "a100-40gb", "a100-80gb", "h100", "h200", "gh200-96gb", "gh200-144gb", "b200", "gb200", "gb300",
    "rtx-pro-6000", "gb10",
)  # fmt: skip


@pytest.fixture(scope="module")
def expected():
    return yaml.safe_load(FIGURES.read_text())


def device_figures(name):
    """Of Llama 3.1 8B on eight of a row's devices."""
    (variant,) = make_plan(spec(), [node_of(name)], LLAMA_8B, DEFAULTS).variants
    assert (variant.node_type.name, variant.why) == (name, "the only node type that fits")
    capacity = variant.capacity
    return {
        "arch": variant.node_type.arch, "kernels": variant.config.kernel_variant, "blocks": capacity.num_kv_blocks,
        "seqs": capacity.max_num_seqs, "tokens": capacity.max_num_batched_tokens,
    }  # fmt: skip


@pytest.mark.parametrize("name", DEVICES)
def test_plans_each_device_with_its_own_numbers(name, expected):
    assert device_figures(name) == expected["devices"][name]


_, CLAIMABLE = observe_slice(resource_slice("n", gpu_device("gpu-0", "NVIDIA B200", "10.0", 183_359)))

# A node -> node type and why it is used, or why the node is not.
WHY = {
    "a successor that the table lacks": (
        node("n", product="NVIDIA-H300", memory_mib=140_000, compute="9.0", gpus=8),
        "h300", "the only node type that fits (product H300 is not in the hardware table; compute capability 9.0 and "
        "140000 MiB)",
    ),
    "an unknown product beside a Grace CPU": (
        node("n", product="NVIDIA-GH200-X", memory_mib=97_000, compute="9.0", gpus=1, arch="arm64"),
        "gh200-x", "the only node type that fits (product GH200-X is not in the hardware table; compute capability 9.0 "
        "and 97000 MiB)",
    ),
    "no label but the resource": (
        node("n", gpus=4), "generic", "the only node type that fits (product unknown is not in the hardware table); "
        "a replica takes 2 GPUs of a node: fewer do not hold the model",
    ),
    "DRA alone": (replace(node("n"), claimable=CLAIMABLE), "b200", "the only node type that fits"),
    "a slice that is too small": (
        node_of("h100", product="NVIDIA-H100-80GB-HBM3-MIG-1g.10gb", memory_mib=9_984), "h100-mig-1g-10gb",
        "NVIDIA H100 SXM MIG 1g.10gb offers",
    ),
    "a slice that is large enough": (
        node_of("h100", product="NVIDIA-H100-80GB-HBM3-MIG-3g.40gb", memory_mib=40_448), "h100-mig-3g-40gb",
        "the only node type that fits",
    ),
    "a driver of the series before": (
        node_of("h200", driver=575), "h200",
        "offers h200, but its NVIDIA driver 575 is too old: the engine's image brings CUDA 13, which needs driver 580",
    ),
    "cordoned": (node_of("h200", unschedulable=True), "h200", "none of its 1 nodes is ready and takes pods"),
}  # fmt: skip


@pytest.mark.parametrize("case", WHY)
def test_says_why_of_each_node(case):
    observed, name, sentence = WHY[case]
    made = make_plan(spec(), [observed], LLAMA_8B, DEFAULTS)
    said = {each.node_type.name: each.why for each in made.variants} | {
        each.node_type: each.why for each in made.rejected
    }
    ((found, why),) = said.items()
    assert found == name
    assert sentence in why


MODELS = ("Llama-3.1-8B", "Llama-3.3-70B", "Qwen3-30B-A3B", "Qwen2.5-0.5B", "Falcon-40B", "GPT-NeoX-20B", "DeepSeek-V3")
SLICES = {
    "nvidia.com/mig-1g.10gb.memory": "9984", "nvidia.com/mig-1g.10gb.count": "4",
    "nvidia.com/mig-3g.40gb.memory": "40448", "nvidia.com/mig-3g.40gb.count": "1",
}  # fmt: skip
CLUSTERS = {
    "one GH200": [node_of("gh200-96gb", gpus=1, cpu="72", memory="480Gi")],
    "a tray of 4 GB200": [node_of("gb200", gpus=4, cpu="144", memory="960Gi")],
    "8 B200": [node_of("b200", cpu="224", memory="2Ti")],
    "8 H100": [node_of("h100", cpu="192", memory="2Ti")],
    "2 H200 and a GH200": [
        node_of("h200", gpus=2, cpu="192", memory="2Ti"), node_of("gh200-96gb", gpus=1, cpu="72", memory="480Gi"),
    ],
    "L4": [node_of("l4", gpus=1, cpu="16", memory="64Gi")],
    "RTX PRO 6000": [node_of("rtx-pro-6000", gpus=1, cpu="64", memory="256Gi")],
    "H100 with slices 1g.10gb and 3g.40gb": [
        node_of("h100", gpus=0, cpu="192", memory="2Ti", labels=SLICES,
                resources={"nvidia.com/mig-1g.10gb": "4", "nvidia.com/mig-3g.40gb": "1"}),
    ],
    "CPU only": [cpu_node(cpu="32", memory="128Gi")],
    "no node": [],
}  # fmt: skip


def plan_on(model, cluster):
    geometry = geometry_from_config(PUBLISHED[model][0])
    problem = why_not_served(geometry)
    known = ModelGeometry(geometry, problem, is_unsupported=bool(problem))
    return plan_status(make_plan(spec(), CLUSTERS[cluster], known, DEFAULTS))


def figures(model, cluster):
    """The plan in few lines: each number of a variant, and each sentence."""
    made = plan_on(model, cluster)
    found = {}
    for each in made.variants or []:
        values = each.model_dump(mode="json", by_alias=True, exclude_none=True)
        left_out = ("replicas", "image", "product", "predicted", "limitsWhy")
        line = {name: value for name, value in values.items() if name not in left_out}
        found["runs"] = line | {"decodeMs": each.predicted.decode_ms, "ttftMs": each.predicted.ttft_ms}
    if made.rejected:
        found["rejected"] = {each.node_type: each.why for each in made.rejected}
    if made.problem:
        found["problem"] = made.problem.reason
    return found


@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize("model", MODELS)
def test_plans_published_models_to_the_byte(model, cluster, expected):
    assert figures(model, cluster) == expected[model][cluster]


def test_a_gh200_and_a_b200_differ_for_stated_reasons():
    (grace,), (blackwell,) = (plan_on("Llama-3.1-8B", each).variants for each in ("one GH200", "8 B200"))
    assert (grace.arch, grace.kernel_variant) == ("arm64", "grace-hopper")
    assert (blackwell.arch, blackwell.kernel_variant) == ("amd64", "blackwell")
    assert "equal at 247" in grace.limits_why.max_num_seqs
    assert "equal at 281" in blackwell.limits_why.max_num_seqs
    assert "the prompts take 116 ms" in grace.limits_why.max_num_batched_tokens
    assert "the prompts take 51 ms" in blackwell.limits_why.max_num_batched_tokens
    for each in (grace, blackwell):
        assert each.limits_why.kv_blocks == "what weights, activations, graphs and runtime leave of the memory"
    assert grace.kv_blocks < blackwell.kv_blocks


if __name__ == "__main__":
    data = {"devices": {name: device_figures(name) for name in DEVICES}}
    data |= {model: {cluster: figures(model, cluster) for cluster in CLUSTERS} for model in MODELS}
    header = "# Generated by test_node_fixtures.py, which says how. Look at each number that moves.\n"
    FIGURES.write_text(header + yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=120))
