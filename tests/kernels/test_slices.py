"""What MIG profiles and time-sliced shares have of their device, with NVIDIA's own profile tables as the measure."""

import pytest
from octavo_kernels.hardware import BY_NAME, HARDWARE
from octavo_kernels.slices import mig_slice, parse_mig_profile, profile_of, time_share

# Device -> profile -> (compute slices, memory slices of eight, or of four on the RTX PRO 6000).
PROFILES = {
    "a100-40gb": {"1g.5gb": (1, 1), "1g.10gb": (1, 2), "2g.10gb": (2, 2), "3g.20gb": (3, 4), "7g.40gb": (7, 8)},
    "a100-80gb": {"1g.10gb": (1, 1), "1g.20gb": (1, 2), "2g.20gb": (2, 2), "4g.40gb": (4, 4), "7g.80gb": (7, 8)},
    "h100": {"1g.10gb": (1, 1), "1g.20gb": (1, 2), "2g.20gb": (2, 2), "3g.40gb": (3, 4), "7g.80gb": (7, 8)},
    "h100-nvl": {"1g.12gb": (1, 1), "1g.24gb": (1, 2), "3g.47gb": (3, 4), "7g.94gb": (7, 8)},
    "h200": {"1g.18gb": (1, 1), "1g.35gb": (1, 2), "3g.71gb": (3, 4), "7g.141gb": (7, 8)},
    "gh200-96gb": {"1g.12gb": (1, 1), "1g.24gb": (1, 2), "3g.48gb": (3, 4), "7g.96gb": (7, 8)},
    "b200": {"1g.23gb": (1, 1), "1g.45gb": (1, 2), "3g.90gb": (3, 4), "7g.180gb": (7, 8)},
    "b300": {"1g.34gb": (1, 1), "2g.67gb": (2, 2), "3g.135gb": (3, 4), "7g.269gb": (7, 8)},
    "rtx-pro-6000": {"1g.24gb": (1, 1), "2g.48gb": (2, 2), "4g.96gb": (4, 4)},
}


@pytest.mark.parametrize(("name", "profile"), [(name, each) for name, found in PROFILES.items() for each in found])
def test_a_slice_has_what_its_profile_says(name, profile):
    row = BY_NAME[name]
    compute, memory = PROFILES[name][profile]
    num_parts = 4 if name == "rtx-pro-6000" else 8
    found = mig_slice(row, parse_mig_profile(profile))
    assert found.memory_bandwidth_gbps == row.memory_bandwidth_gbps * memory / num_parts
    assert found.memory_mib == row.memory_mib * memory // num_parts
    assert found.bf16_tflops == pytest.approx(row.bf16_tflops * compute / row.num_slices)
    assert found.num_sms == row.num_sms * compute // row.num_slices
    assert (found.name, found.kernel_variant, found.num_slices) == (row.name, row.kernel_variant, 0)


@pytest.mark.parametrize(
    ("product", "profile"),
    [
        ("NVIDIA-H100-80GB-HBM3-MIG-1g.10gb", "1g.10gb"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "1g.10gb"),
        ("NVIDIA-A100-SXM4-40GB-MIG-3g.20gb-SHARED", "3g.20gb"),
        ("NVIDIA-L4-SHARED", ""),
        ("", ""),
    ],
)
def test_a_slices_product_names_its_profile(product, profile):
    assert profile_of(product) == profile


def test_a_slices_memory_is_what_the_label_says():
    found = mig_slice(BY_NAME["h100"], parse_mig_profile("1g.10gb"), 9_984)
    assert found.memory_mib == 9_984
    assert found.memory_bandwidth_gbps == 3_350 / 8


@pytest.mark.parametrize("name", ["", "1g", "10gb", "1g.10gb-SHARED", "xg.10gb", "1g.10gb.mee"])
def test_what_is_no_profile(name):
    assert parse_mig_profile(name) is None


@pytest.mark.parametrize("name", ["1g.10gb.me", "1g.10gb+me", "1g.24gb+gfx", "1g.10gb.me.all"])
def test_media_extensions_change_no_number(name):
    profile = parse_mig_profile(name)
    assert profile is not None
    assert profile.num_slices == 1


@pytest.mark.parametrize(("name", "profile"), [("l4", "1g.6gb"), ("rtx-pro-6000", "7g.96gb"), ("h100", "0g.10gb")])
def test_a_device_without_the_profile_is_an_error(name, profile):
    with pytest.raises(ValueError, match="has no MIG profile"):
        mig_slice(BY_NAME[name], parse_mig_profile(profile))


def test_sharers_divide_time_and_memory():
    found = time_share(BY_NAME["l4"], 4)
    assert (found.memory_mib, found.memory_bandwidth_gbps, found.bf16_tflops) == (5_758, 75, 30.25)
    assert found.num_sms == BY_NAME["l4"].num_sms


def test_whole_slices_of_every_mig_device_lie_within_it():
    for row in (each for each in HARDWARE if each.num_slices):
        smallest = mig_slice(row, parse_mig_profile(f"1g.{row.memory_mib // 1024 // 8}gb"))
        assert 0 < smallest.memory_mib < row.memory_mib
        assert 0 < smallest.num_sms < row.num_sms
