"""Nodes become node types by exact identity. The six checked defects of other operators are a table here."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from octavo_kernels.hardware import HARDWARE
from octavo_operator.api import Scheduling, Toleration
from octavo_operator.claims import observe_slice
from octavo_operator.decision import Defaults
from octavo_operator.nodes import find_node_types, is_tolerated
from octavo_operator.observe import Taint, observe_node
from octavo_operator.offers import compute_capability, find_offers
from octavo_operator.plan import make_plan
from octavo_operator.profiles import HardwareTable
from operator_samples import (
    LLAMA_70B,
    cpu_node,
    gh200_node,
    gpu_device,
    h100_node,
    l4_node,
    node,
    node_manifest,
    resource_slice,
    spec,
)


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
    (offer,) = find_offers(node("n", product=product, gpus=1), HardwareTable())
    name = offer.name
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


MIG_LABELS = {
    "nvidia.com/mig.strategy": "mixed",
    "nvidia.com/mig-1g.10gb.count": "2", "nvidia.com/mig-1g.10gb.memory": "9984",
    "nvidia.com/mig-1g.10gb.product": "NVIDIA-H100-80GB-HBM3-MIG-1g.10gb",
    "nvidia.com/mig-3g.40gb.count": "1", "nvidia.com/mig-3g.40gb.memory": "40448",
    "nvidia.com/mig-3g.40gb.product": "NVIDIA-H100-80GB-HBM3-MIG-3g.40gb",
}  # fmt: skip

# A node -> name of each node type -> (resource, devices, MiB, GB/s, TFLOP/s in bf16, sharers).
PARTS = {
    "MIG, single strategy": (
        node("n", product="NVIDIA-H100-80GB-HBM3-MIG-1g.10gb", memory_mib=9_984, compute="9.0", gpus=7),
        {"h100-mig-1g-10gb": ("nvidia.com/gpu", 7, 9_984, 3_350 / 8, 989 / 7, 1)},
    ),
    "MIG, mixed strategy: several slices and whole GPUs": (
        node("n", product="NVIDIA-H100-80GB-HBM3", memory_mib=81_559, compute="9.0", gpus=6, labels=MIG_LABELS,
             resources={"nvidia.com/mig-1g.10gb": "2", "nvidia.com/mig-3g.40gb": "1"}),
        {
            "h100": ("nvidia.com/gpu", 6, 81_559, 3_350, 989, 1),
            "h100-mig-1g-10gb": ("nvidia.com/mig-1g.10gb", 2, 9_984, 3_350 / 8, 989 / 7, 1),
            "h100-mig-3g-40gb": ("nvidia.com/mig-3g.40gb", 1, 40_448, 3_350 / 2, 989 * 3 / 7, 1),
        },
    ),
    "MIG without the slice's labels": (
        node("n", product="NVIDIA-A100-SXM4-40GB", memory_mib=40_960, compute="8.0",
             resources={"nvidia.com/mig-1g.5gb": "7", "nvidia.com/gpu": "0"}),
        {"a100-40gb-mig-1g-5gb": ("nvidia.com/mig-1g.5gb", 7, 5_120, 1_555 / 8, 312 / 7, 1)},
    ),
    "time-sliced": (
        node("n", product="NVIDIA-L4-SHARED", memory_mib=23_034, compute="8.9", gpus=4,
             labels={"nvidia.com/gpu.replicas": "4"}),
        {"l4-shared": ("nvidia.com/gpu", 4, 5_758, 75, 30.25, 4)},
    ),
    "time-sliced under a name of its own": (
        node("n", product="NVIDIA-L4", memory_mib=23_034, compute="8.9", resources={"nvidia.com/gpu.shared": "2"},
             labels={"nvidia.com/gpu.replicas": "2"}),
        {"l4-shared": ("nvidia.com/gpu.shared", 2, 11_517, 150, 60.5, 2)},
    ),
    "time-sliced MIG": (
        node("n", product="NVIDIA-H100-80GB-HBM3-MIG-1g.10gb-SHARED", memory_mib=9_984, compute="9.0", gpus=14,
             labels={"nvidia.com/gpu.replicas": "2"}),
        {"h100-mig-1g-10gb-shared": ("nvidia.com/gpu", 14, 4_992, 3_350 / 16, 989 / 14, 2)},
    ),
    "MIG of a GPU with quarters": (
        node("n", product="NVIDIA-RTX-PRO-6000-Blackwell-Server-Edition-MIG-1g.24gb", memory_mib=24_192,
             compute="12.0", gpus=4),
        {"rtx-pro-6000-mig-1g-24gb": ("nvidia.com/gpu", 4, 24_192, 1_597 / 4, 125, 1)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PARTS)
def test_parts_of_a_gpu_are_types_of_their_own(case):
    observed, expected = PARTS[case]
    found = {
        each.name: (
            each.resource, each.num_devices, each.memory_bytes >> 20, each.hardware.memory_bandwidth_gbps,
            each.hardware.bf16_tflops, each.num_sharers,
        )
        for each in find_node_types([observed]).types
    }  # fmt: skip
    assert found == {name: pytest.approx(numbers) for name, numbers in expected.items()}


def test_a_slice_is_asked_for_by_its_own_name_and_excluded_by_its_gpus():
    found = only_type(PARTS["MIG, single strategy"][0])
    assert not found.is_called("h100")
    assert found.belongs_to("h100")
    assert found.is_called("h100-mig-1g-10gb")
    assert not found.is_called("h100-mig-3g-40gb")


def claimable(name, *devices, **settings):
    _, found = observe_slice(resource_slice(name, *devices))
    return replace(node(name, **settings), claimable=found)


H100_DEVICES = [gpu_device(f"gpu-{index}", "NVIDIA H100 80GB HBM3", "9.0", 81_559) for index in range(8)]


def test_devices_that_only_dra_offers_are_recognised_by_their_attributes():
    found = only_type(claimable("n", *H100_DEVICES))
    assert (found.name, found.num_devices, found.memory_bytes >> 20, found.resource) == ("h100", 8, 81_559, "")
    assert found.claim.device_class == "gpu.nvidia.com"
    assert found.claim.selector == "device.attributes['gpu.nvidia.com'].productName == 'NVIDIA H100 80GB HBM3'"


def test_a_claimable_slice_is_a_type_of_its_own():
    devices = [gpu_device("mig-0", "NVIDIA H100 80GB HBM3", "9.0", 9_984, profile="1g.10gb"), *H100_DEVICES[:1]]
    found = {each.name: each for each in find_node_types([claimable("n", *devices)]).types}
    assert set(found) == {"h100", "h100-mig-1g-10gb"}
    sliced = found["h100-mig-1g-10gb"]
    assert (sliced.claim.device_class, sliced.hardware.bf16_tflops) == ("mig.nvidia.com", pytest.approx(989 / 7))
    assert sliced.claim.selector.endswith("&& device.attributes['gpu.nvidia.com'].profile == '1g.10gb'")


def test_gh200_is_not_h200_for_dra_either():
    found = only_type(claimable("n", gpu_device("gpu-0", "NVIDIA GH200 480GB", "9.0", 97_871), arch="arm64"))
    assert (found.name, found.arch) == ("gh200-96gb", "arm64")


def test_the_device_plugin_is_used_where_both_offer_the_gpus():
    both = replace(h100_node("n"), claimable=claimable("n", *H100_DEVICES).claimable)
    assert (only_type(both).resource, only_type(both).claim) == ("nvidia.com/gpu", None)


@pytest.mark.parametrize(
    "manifest",
    [
        resource_slice("n", *H100_DEVICES, driver="tpu.google.com"),
        {"spec": {"driver": "gpu.nvidia.com", "allNodes": True, "devices": H100_DEVICES}},
        {"spec": {}},
    ],
)
def test_slices_of_other_drivers_or_of_no_node_offer_nothing(manifest):
    assert observe_slice(manifest) == ("", ())


DRIVERS = {
    "old": (h100_node("n", driver=550), "offers h100, but its NVIDIA driver 550 is too old: the engine's image brings "
            "CUDA 13, which needs driver 580 or above"),
    "the last too old": (h100_node("n", driver=579), "its NVIDIA driver 579 is too old"),
    "old, by DRA": (claimable("n", gpu_device("gpu-0", "NVIDIA L4", "8.9", 23_034, driver="535.183.1")),
                    "offers l4, but its NVIDIA driver 535 is too old"),
}  # fmt: skip


@pytest.mark.parametrize("case", DRIVERS)
def test_a_driver_that_the_engine_would_crash_on_is_refused_before_scheduling(case):
    observed, sentence = DRIVERS[case]
    found = find_node_types([observed])
    assert not found.types
    assert sentence in found.unusable[0].why
    assert find_node_types([observed], min_driver_major=0).types


def test_a_driver_is_demanded_of_nodes_where_all_tell_theirs():
    told, silent = h100_node("a", driver=580), h100_node("b")
    assert only_type(told).min_driver_major == 580
    assert only_type(told, silent).min_driver_major == 0
    assert only_type(told, h100_node("c", driver=999)).min_driver_major == 580


def test_nodes_with_an_old_driver_do_not_hide_the_others():
    found = find_node_types([h100_node("a", driver=550), h100_node("b", driver=580)])
    assert [(each.name, each.num_nodes) for each in found.types] == [("h100", 1)]
    assert found.unusable[0].names == ("a",)


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
        node("n", product="NVIDIA-L4", compute="8.9"), None, "offers no nvidia.com/gpu: neither the device plugin",
    ),
    "a profile that the GPU lacks": (
        node("n", product="NVIDIA-L4", compute="8.9", resources={"nvidia.com/mig-1g.6gb": "4"}), None,
        "offers slices that its GPU cannot have: NVIDIA L4 has no MIG profile 1g.6gb",
    ),
    "a profile that nobody knows": (
        node("n", product="NVIDIA-B200-MIG-1x", compute="10.0", gpus=4), None, "unknown MIG profile 1x",
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
