"""Llama 3.1 8B on one node of each kind: what is planned, to the block, and the sentence of why.

A change of the hardware table or of the capacity model shows here: each number that moves wants to be looked at.
"""

from dataclasses import replace

import pytest
from octavo_kernels.hardware import BY_NAME
from octavo_operator.claims import observe_slice
from octavo_operator.plan import make_plan
from operator_samples import DEFAULTS, LLAMA_8B, gpu_device, node, resource_slice, spec


def node_of(name, **settings):
    """Eight devices of a row of the table, as GPU feature discovery labels them."""
    row = BY_NAME[name]
    capability = "{}.{}".format(*row.compute_capability)
    common = {"memory_mib": row.memory_mib, "compute": capability, "gpus": 8, "driver": 580}
    (product,) = row.products
    arch = min(row.cpu_architectures)
    return node(name, **{"product": f"NVIDIA-{product}", "arch": arch, **common, **settings})


# Row -> CPU architecture, kernels, KV blocks of 16 tokens, sequences at once, tokens in a step.
PLANNED = {
    "l4": ("amd64", "ada", 1_769, 112, 1_024),
    "l40s": ("amd64", "ada", 11_739, 200, 4_096),
    "a100-40gb": ("amd64", "ampere", 8_942, 416, 4_096),
    "a100-80gb": ("amd64", "ampere", 27_729, 256, 4_096),
    "h100": ("amd64", "hopper", 26_707, 512, 8_192),
    "h200": ("amd64", "hopper", 54_702, 512, 8_192),
    "gh200-96gb": ("arm64", "grace-hopper", 34_047, 512, 8_192),
    "gh200-144gb": ("arm64", "grace-hopper", 56_079, 512, 8_192),
    "b200": ("amd64", "blackwell", 72_517, 512, 8_192),
    "gb200": ("arm64", "blackwell", 75_267, 512, 8_192),
    "gb300": ("arm64", "blackwell", 113_773, 512, 8_192),
    "rtx-pro-6000": ("amd64", "blackwell-workstation", 34_397, 472, 4_096),
    "gb10": ("arm64", "blackwell-workstation", 46_700, 112, 1_024),
}


@pytest.mark.parametrize("name", PLANNED)
def test_plans_each_device_with_its_own_numbers(name):
    (variant,) = make_plan(spec(), [node_of(name)], LLAMA_8B, DEFAULTS).variants
    capacity = variant.capacity
    assert (
        variant.node_type.arch,
        variant.config.kernel_variant,
        capacity.num_kv_blocks,
        capacity.max_num_seqs,
        capacity.max_num_batched_tokens,
    ) == PLANNED[name]
    assert (variant.node_type.name, variant.why) == (name, "the only node type that fits")


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
        node("n", gpus=4), "generic", "Llama",
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
