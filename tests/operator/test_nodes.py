"""Nodes become node types by exact identity. The six checked defects of other operators are a table here."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from octavo_kernels.hardware import HARDWARE
from octavo_operator.api import Scheduling, Toleration
from octavo_operator.nodes import compute_capability, find_node_types, is_tolerated, node_type_name
from octavo_operator.observe import Taint, observe_node
from octavo_operator.plan import Defaults, make_plan
from operator_samples import LLAMA_70B, cpu_node, gh200_node, h100_node, l4_node, node, node_manifest, spec


def only_type(*nodes):
    (found,) = find_node_types(nodes).types
    return found


# Each is a defect that an operator in the field had; the node is the one that it got wrong.
SIX_DEFECTS = {
    "GH200 is not H200, although its name contains it": (
        gh200_node(), ("gh200-96gb", (9, 0), 97_871, "arm64"),
    ),
    "GB200 is not B200, although its name contains it": (
        node("n", product="NVIDIA-GB200", memory_mib=189_471, compute="10.0", gpus=4, arch="arm64"),
        ("gb200", (10, 0), 189_471, "arm64"),
    ),
    "compute capability 10.0 is above 9.0, although its text is below": (
        node("n", product="NVIDIA-B999", memory_mib=180_000, compute="10.0", gpus=8),
        ("b999", (10, 0), 180_000, "amd64"),
    ),
    "GPU memory is the GPU's, not the node's": (
        l4_node(memory="2Ti"), ("l4", (8, 9), 23_034, "amd64"),
    ),
    "compute capability is read from nvidia.com/gpu.compute.*, not cuda.compute.*": (
        node("n", product="NVIDIA-H800", memory_mib=81_559, compute="9.0", gpus=8,
             labels={"nvidia.com/cuda.compute.major": "7", "nvidia.com/cuda.compute.minor": "5"}),
        ("h800", (9, 0), 81_559, "amd64"),
    ),
    "Blackwell 12.0 is not Blackwell 10.0": (
        node("n", product="NVIDIA-RTX-PRO-6000-Blackwell-Server-Edition", memory_mib=97_887, compute="12.0", gpus=8),
        ("rtx-pro-6000", (12, 0), 97_887, "amd64"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("defect", SIX_DEFECTS)
def test_recognises_what_others_got_wrong(defect):
    observed, (name, capability, memory_mib, arch) = SIX_DEFECTS[defect]
    found = only_type(observed)
    assert (found.name, found.hardware.compute_capability, found.memory_bytes >> 20, found.arch) == (
        name, capability, memory_mib, arch,
    )  # fmt: skip


@pytest.mark.parametrize("family", ["undefined", "blackwell", "hopper"])
def test_the_family_label_decides_nothing(family):
    labels = {"nvidia.com/gpu.family": family}
    found = only_type(node("n", product="NVIDIA-B200", memory_mib=183_359, compute="10.0", gpus=8, labels=labels))
    assert found.hardware.name == "b200"


def test_a_large_host_does_not_make_a_small_gpu_fit():
    made = make_plan(spec(), [l4_node(memory="4Ti")], LLAMA_70B, Defaults("image"))
    assert made.problem is not None
    assert made.problem.reason == "ModelDoesNotFit"


def test_every_row_of_the_table_is_recognised_by_its_own_label():
    for row in HARDWARE:
        for product in row.products:
            arch = sorted(row.cpu_architectures)[0]
            observed = node("n", product=f"NVIDIA-{product}", memory_mib=row.memory_mib, gpus=1, arch=arch)
            assert only_type(observed).name == row.name


@given(st.integers(0, 99), st.integers(0, 9))
def test_compute_capability_is_two_numbers(major, minor):
    labels = {"nvidia.com/gpu.compute.major": str(major), "nvidia.com/gpu.compute.minor": str(minor)}
    assert compute_capability(labels) == (major, minor)


@given(st.text(max_size=80))
def test_any_product_makes_a_dns_label(product):
    name = node_type_name(node("n", product=product, gpus=1))
    assert name
    assert len(name) <= 63
    assert name[0].isalnum()
    assert name[-1].isalnum()
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


def test_a_node_without_a_gpu_is_of_the_type_cpu():
    found = only_type(cpu_node(cpu="16", memory="64Gi"))
    assert (found.name, found.is_gpu, found.memory_bytes, found.cpu_millicores) == ("cpu", False, 64 << 30, 16_000)


def test_cpu_types_differ_by_architecture():
    found = find_node_types([cpu_node("a"), cpu_node("b", arch="arm64")]).types
    assert [each.name for each in found] == ["cpu", "cpu-arm64"]


def test_a_mig_slice_and_a_shared_gpu_are_types_of_their_own():
    sliced = node("a", product="NVIDIA-H100-80GB-HBM3-MIG-1g.10gb", memory_mib=9_984, compute="9.0", gpus=7)
    shares = {"nvidia.com/gpu.replicas": "4"}
    shared = node("b", product="NVIDIA-L4-SHARED", memory_mib=23_034, compute="8.9", gpus=4, labels=shares)
    by_name = {each.name: each for each in find_node_types([sliced, shared, l4_node(), h100_node()]).types}
    assert set(by_name) == {"h100", "h100-mig-1g-10gb", "l4", "l4-shared"}
    assert by_name["h100-mig-1g-10gb"].memory_bytes >> 20 == 9_984
    assert by_name["l4-shared"].memory_bytes >> 20 == 23_034 // 4


def test_groups_nodes_and_counts_devices_of_ready_ones():
    nodes = [
        h100_node("a"),
        h100_node("b"),
        h100_node("c", ready="False"),
        h100_node("d", ready="Unknown"),
        h100_node("e", unschedulable=True),
    ]
    found = only_type(*nodes)
    assert (found.num_nodes, found.num_away, found.num_devices) == (2, 3, 16)


UNUSABLE = {
    "tainted": (cpu_node(taints=[{"key": "team", "value": "x", "effect": "NoSchedule"}]), None, "team=x:NoSchedule"),
    "selector": (cpu_node(), Scheduling(node_selector={"zone": "a"}), "lacks the label zone=a"),
    "no device plugin": (
        node("n", product="NVIDIA-L4", compute="8.9"), None, "offers no nvidia.com/gpu: the device plugin",
    ),
    "windows": (cpu_node(labels={"kubernetes.io/os": "windows"}), None, "runs windows"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNUSABLE)
def test_explains_nodes_that_do_not_count(case):
    observed, scheduling, why = UNUSABLE[case]
    found = find_node_types([observed], scheduling)
    assert not found.types
    assert why in found.unusable[0].why


def test_the_gpu_taint_is_tolerated_on_gpu_nodes_whatever_its_value():
    tainted = {"taints": [{"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}]}
    assert find_node_types([gh200_node(**tainted)]).types
    assert not find_node_types([cpu_node(**tainted)]).types


TOLERATIONS = [
    ({"operator": "Exists"}, True),
    ({"key": "a", "operator": "Exists"}, True),
    ({"key": "a", "value": "1"}, True),
    ({"key": "a", "operator": "Equal", "value": "1", "effect": "NoSchedule"}, True),
    ({"key": "a", "value": "2"}, False),
    ({"key": "b", "operator": "Exists"}, False),
    ({"key": "a", "operator": "Exists", "effect": "NoExecute"}, False),
]


@pytest.mark.parametrize(("toleration", "expected"), TOLERATIONS)
def test_tolerates_as_the_scheduler_does(toleration, expected):
    tolerations = [Toleration.model_validate(toleration)]
    assert is_tolerated(Taint("a", "1", "NoSchedule"), tolerations, is_gpu=False) is expected


def test_a_heartbeat_changes_nothing_that_a_plan_reads():
    before, after = node_manifest("n"), node_manifest("n")
    after["status"]["conditions"][0]["lastHeartbeatTime"] = "2026-01-01T00:00:00Z"
    after["metadata"]["resourceVersion"] = "2"
    after["metadata"]["labels"]["nvidia.com/gfd.timestamp"] = "1700000000"
    assert observe_node(before) == observe_node(after)
    after["status"]["allocatable"]["memory"] = "1Gi"
    assert observe_node(before) != observe_node(after)
