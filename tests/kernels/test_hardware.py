"""Identity of devices: the traps of labels, as a table."""

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
