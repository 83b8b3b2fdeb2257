"""Identity of devices: the traps of labels, as a table."""

from dataclasses import replace
from pathlib import Path

import pytest
from octavo_kernels.hardware import BY_NAME, CPU, HARDWARE, identify_gpu, normalise_product


@pytest.mark.parametrize(
    ("product", "compute_capability", "memory_mib", "row", "how"),
    [
        pytest.param("NVIDIA-H100-80GB-HBM3", (9, 0), 81559, "h100", "product", id="H100"),
        pytest.param("NVIDIA H100 80GB HBM3", (9, 0), 81559, "h100", "product", id="the driver's spelling"),
        pytest.param("NVIDIA-GH200-480GB", (9, 0), 97871, "gh200-96gb", "product", id="GH200 is no H200"),
        pytest.param("NVIDIA-H200", (9, 0), 143771, "h200", "product", id="H200"),
        pytest.param("NVIDIA-GB200", (10, 0), 189471, "gb200", "product", id="GB200 is no B200"),
        pytest.param("NVIDIA-B200", (10, 0), 183359, "b200", "product", id="B200"),
        pytest.param("NVIDIA-H100-80GB-HBM3-SHARED", (9, 0), 81559, "h100", "product", id="time-sliced"),
        pytest.param("NVIDIA-A100-SXM4-80GB-MIG-1g.10gb", (8, 0), 9856, "a100-80gb", "product", id="MIG"),
        pytest.param("NVIDIA-H300", (9, 0), 140000, "h200", "compute-capability", id="new name, nearest memory"),
        pytest.param("NVIDIA-X1", (10, 3), 0, "b300", "compute-capability", id="10.3 is not 10.0"),
        pytest.param("NVIDIA-X2", (12, 0), 97000, "rtx-pro-6000", "compute-capability", id="12.0 is not 10.0"),
        pytest.param("NVIDIA-X3", (13, 0), 97000, "generic", "generic", id="unknown capability"),
        pytest.param("NVIDIA-X4", None, 97000, "generic", "generic", id="nothing known"),
    ],
)
def test_identifies(product, compute_capability, memory_mib, row, how) -> None:
    match = identify_gpu(product, compute_capability, memory_mib)
    assert (match.hardware.name, match.how) == (row, how)


def test_capabilities_compare_as_numbers() -> None:
    assert BY_NAME["b200"].compute_capability > BY_NAME["h100"].compute_capability


def test_every_row_is_reachable_by_its_own_products() -> None:
    assert len(BY_NAME) == len(HARDWARE) + 1
    for row in HARDWARE:
        for product in row.products:
            assert normalise_product(f"NVIDIA-{product}") == product
            assert identify_gpu(product).hardware is row
    assert not CPU.is_gpu


REQUIRED = {
    "cpu", "l4", "l40s", "a100-40gb", "a100-40gb-pcie", "a100-80gb", "a100-80gb-pcie", "h100", "h100-pcie", "h100-nvl",
    "h200", "h200-nvl", "gh200-96gb", "gh200-144gb", "b200", "gb200", "b300", "gb300", "rtx-pro-6000",
    "rtx-pro-6000-workstation", "rtx-pro-6000-max-q", "gb10",
}  # fmt: skip


def test_the_table_is_complete_and_each_row_says_where_its_numbers_come_from() -> None:
    assert {row.name for row in HARDWARE} == REQUIRED
    for row in HARDWARE:
        assert row.source
        if row.is_gpu:
            assert min(row.memory_mib, row.num_sms, row.l2_mib, row.host_link_gbps) > 0


def test_rates_agree_with_the_types_that_a_device_computes() -> None:
    """Half the bits, twice the rate (four bits more than twice on Blackwell Ultra): a slipped digit shows."""
    for row in (each for each in HARDWARE if each.is_gpu):
        assert (row.fp8_tflops > 0) == ("float8_e4m3fn" in row.dtypes)
        assert (row.fp4_tflops > 0) == ("nvfp4" in row.dtypes)
        if row.fp8_tflops:
            assert row.fp8_tflops / row.bf16_tflops == pytest.approx(2, rel=0.02)
        if row.fp4_tflops:
            assert 1.98 < row.fp4_tflops / row.fp8_tflops < 3.01


def test_the_link_to_the_host_goes_with_the_cpu() -> None:
    for row in (each for each in HARDWARE if each.is_gpu):
        assert (row.host_link == "nvlink-c2c") == (row.cpu_architectures == {"arm64"})


def test_among_rows_of_one_capability_the_nodes_cpu_decides() -> None:
    found = {arch: identify_gpu("NVIDIA-X5", (9, 0), 96_000, arch).hardware.name for arch in ("amd64", "arm64", "")}
    assert found == {"amd64": "h100-nvl", "arm64": "gh200-96gb", "": "h100-nvl"}


def test_a_clusters_own_rows_are_looked_at_like_the_tables() -> None:
    own = replace(BY_NAME["h100"], name="h800", products=frozenset({"H800"}))
    assert identify_gpu("NVIDIA-H800", (9, 0), 81_559, table=(own, *HARDWARE)).hardware is own


def test_the_page_on_hardware_shows_the_table() -> None:
    page = (Path(__file__).parents[2] / "docs/hardware.md").read_text()
    shown = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `") and "," in line}
    for row in (each for each in HARDWARE if each.compute_capability):
        cells = [cell.strip() for cell in shown[row.name].split("|")]
        rates = " / ".join(
            f"{rate:,.0f}" if rate else "0" for rate in (row.bf16_tflops, row.fp8_tflops, row.fp4_tflops)
        )
        assert cells[2:7] == [
            "{}.{}".format(*row.compute_capability), f"{row.memory_mib:,}", f"{row.memory_bandwidth_gbps:,.0f}", rates,
            f"{row.num_sms}, {row.l2_mib:g}",
        ]  # fmt: skip
        assert cells[8] == row.unverified
