"""HardwareProfiles become rows of the table, or say why they do not."""

import pytest
from octavo_kernels.hardware import BY_NAME, HARDWARE
from octavo_operator.nodes import find_node_types
from octavo_operator.plan import make_plan
from octavo_operator.profile_report import count_nodes, profile_conditions
from octavo_operator.profiles import HardwareTable, ProfileVerdict, read_profiles
from operator_samples import DEFAULTS, LLAMA_8B, cpu_node, h100_node, hardware_profile, node, spec

H20 = {
    "products": ["NVIDIA-H20"], "basedOn": "h100", "memoryMib": 97_871, "memoryBandwidthGbps": 4_000,
    "bf16Tflops": 148, "fp8Tflops": 296,
}  # fmt: skip
COMPLETE = {
    "products": ["ACME-1"], "computeCapability": "9.0", "memoryMib": 50_000, "memoryBandwidthGbps": 2_000,
    "bf16Tflops": 500, "kernelVariant": "hopper",
}  # fmt: skip


def table_of(*profiles):
    table, verdicts = read_profiles(profiles)
    assert not [each for each in verdicts if each.problem]
    return table


def h20_node(**settings):
    return node("h20-0", product="NVIDIA-H20", memory_mib=97_871, compute="9.0", gpus=8, **settings)


def test_without_profiles_the_table_is_the_built_in_one():
    assert table_of().rows == HARDWARE


def test_a_profile_adds_a_device_that_the_table_lacks():
    table = table_of(hardware_profile("h20", **H20))
    row = table.row("h20")
    assert (row.memory_mib, row.memory_bandwidth_gbps, row.bf16_tflops, row.num_sms) == (97_871, 4_000, 148, 132)
    assert (row.kernel_variant, row.compute_capability, row.products) == ("hopper", (9, 0), {"H20"})
    before, after = (find_node_types([h20_node()], table=each).types[0] for each in (HardwareTable(), table))
    assert (before.name, before.hardware_name, before.hardware.name) == ("h20", "generic", "h100-nvl")
    assert (after.name, after.hardware_name, after.hardware.name, after.is_exact) == ("h20", "h20", "h20", True)


def test_a_complete_profile_needs_no_base():
    row = table_of(hardware_profile("acme", **COMPLETE)).row("acme")
    assert (row.title, row.compute_capability, row.memory_mib) == ("acme", (9, 0), 50_000)
    assert "float8_e4m3fn" not in row.dtypes


def test_a_profile_of_a_rows_name_changes_that_row_and_nothing_else():
    table = table_of(hardware_profile("h100", memoryBandwidthGbps=3_000))
    assert [row.name for row in table.rows].count("h100") == 1
    row = table.row("h100")
    assert (row.memory_bandwidth_gbps, row.bf16_tflops, row.products) == (3_000, 989, BY_NAME["h100"].products)
    slower = make_plan(spec(), [h100_node()], LLAMA_8B, DEFAULTS, table=table).variants[0].capacity
    faster = make_plan(spec(), [h100_node()], LLAMA_8B, DEFAULTS).variants[0].capacity
    assert slower.predicted_decode_ms == pytest.approx(faster.predicted_decode_ms * 3_350 / 3_000)


def test_a_row_that_is_based_on_another_keeps_its_own_products():
    table = table_of(hardware_profile("h100", basedOn="h200", memoryMib=81_559))
    assert table.row("h100").products == BY_NAME["h100"].products
    assert table.row("h200") == BY_NAME["h200"]
    assert table.row("h100").memory_bandwidth_gbps == 4_800


def test_a_clusters_own_cpus_have_their_own_rates():
    table = table_of(hardware_profile("cpu", memoryBandwidthGbps=400, bf16Tflops=6))
    found = find_node_types([cpu_node()], table=table).types[0]
    assert (found.hardware.memory_bandwidth_gbps, found.hardware.name) == (400, "cpu")


def test_a_profile_takes_a_product_from_the_tables_row():
    table = table_of(hardware_profile("h100-tuned", basedOn="h100", products=["NVIDIA-H100-80GB-HBM3"]))
    assert find_node_types([h100_node()], table=table).types[0].name == "h100-tuned"


REJECTED = {
    "no base, no numbers": ({"products": ["X"], "memoryMib": 1}, "Incomplete", "computeCapability, memoryBandwidth"),
    "recognised by nothing": ({"basedOn": "h100", "memoryMib": 1}, "Incomplete", "nothing would be recognised"),
    "unknown base": ({"basedOn": "h300", "products": ["X"]}, "UnknownBase", "h300"),
    "float8 on Ampere": (
        {"basedOn": "a100-80gb", "products": ["X"], "fp8Tflops": 600}, "Contradiction", "8.0 computes no float8",
    ),
    "float4 on Hopper": (
        {"basedOn": "h100", "products": ["X"], "fp4Tflops": 600}, "Contradiction", "9.0 computes no float4",
    ),
    "kernels of a newer device": (
        {"basedOn": "h100", "products": ["X"], "kernelVariant": "blackwell"}, "Contradiction",
        "kernel variant blackwell is made for compute capability 10.0 and above, not for 9.0",
    ),
    "typing error": ({"basedOn": "h100", "product": ["X"]}, "InvalidSpec", "spec.product"),
    "no memory": ({"basedOn": "h100", "products": ["X"], "memoryMib": 0}, "InvalidSpec", "spec.memoryMib"),
}  # fmt: skip


@pytest.mark.parametrize("case", REJECTED)
def test_a_profile_that_cannot_be_true_is_left_out_with_a_reason(case):
    fields, reason, sentence = REJECTED[case]
    table, (verdict,) = read_profiles([hardware_profile("x", **fields)])
    assert table.rows == HARDWARE
    assert verdict.reason == reason
    assert sentence in verdict.problem


@pytest.mark.parametrize(("name", "fields"), [("cpu", {"memoryMib": 5}), ("generic", {"memoryMib": 5})])
def test_names_that_mean_something_else(name, fields):
    _, (verdict,) = read_profiles([hardware_profile(name, **fields)])
    assert verdict.problem


def test_of_two_profiles_for_one_product_the_older_is_used():
    newer = hardware_profile("a", "2026-02-01T00:00:00Z", **H20)
    older = hardware_profile("b", "2026-01-01T00:00:00Z", **H20)
    table, verdicts = read_profiles([newer, older])
    assert table.row("b") is not None
    assert table.row("a") is None
    by_name = {each.name: each for each in verdicts}
    assert by_name["a"].reason == "ProductTaken"
    assert by_name["a"].problem == "product H20 belongs to HardwareProfile b, which is older"
    assert not by_name["b"].problem


def test_conditions_are_kstatus_and_keep_their_times():
    good = profile_conditions(ProfileVerdict("x"), 3, 2, {"Ready": ("True", "then")}, "now")
    assert [(each.type, each.status, each.last_transition_time) for each in good] == [
        ("Ready", "True", "then"), ("Stalled", "False", "now"),
    ]  # fmt: skip
    bad = profile_conditions(ProfileVerdict("x", "Incomplete", "why"), 0, 2, {"Ready": ("True", "then")}, "now")
    assert [(each.status, each.reason, each.message, each.last_transition_time) for each in bad] == [
        ("False", "Incomplete", "why", "now"), ("True", "Incomplete", "why", "now"),
    ]  # fmt: skip


def test_counts_the_nodes_of_each_row():
    table = table_of(hardware_profile("h20", **H20))
    strange = node("z", product="NVIDIA-Z9", gpus=1)
    assert count_nodes([h20_node(), h100_node("a"), h100_node("b"), cpu_node(), strange], table) == {
        ("h20", "product"): 1, ("h100", "product"): 2, ("cpu", "cpu"): 1, ("generic", "generic"): 1,
    }  # fmt: skip
