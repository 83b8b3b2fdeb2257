import pytest
from octavo_engine.bench.step_profile import KernelEvent, busy_us, kind_of, summarise


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT", "gemm"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "gemm"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm>", "gemm"),
        ("void gemv2T_kernel_val<int, int, __nv_bfloat16>", "gemm"),
        ("aten::addmm", "gemm"),
        ("aten::mm", "gemm"),
        ("_paged_decode_kernel", "attention"),
        ("void flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits>", "attention"),
        ("add_rms_norm_kernel", "norm, activation, rotary"),
        ("_silu_and_mul_kernel", "norm, activation, rotary"),
        ("rotary_and_write_kv_kernel", "norm, activation, rotary"),
        ("_argmax_kernel", "sampling"),
        ("_sample_tokens_kernel", "sampling"),
        ("Memcpy DtoH (Device -> Pinned)", "memory"),
        ("void at::native::index_elementwise_kernel", "memory"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<long>>", "other"),
    ],
)
def test_a_name_tells_the_kind(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_time_in_which_kernels_overlap_counts_once() -> None:
    events = [KernelEvent("a", 0, 10), KernelEvent("b", 5, 12), KernelEvent("c", 6, 7), KernelEvent("d", 20, 21)]
    assert busy_us(events) == 13
    assert busy_us([]) == 0


def test_shares_are_means_over_the_steps_and_gaps_the_rest() -> None:
    events = [KernelEvent("gemm", 0, 3000), KernelEvent("argmax", 3000, 4000), KernelEvent("gemm", 5000, 6000)]
    profile = summarise(events, num_steps=2, num_tokens=6, wall_s=8e-3)
    assert (profile.wall_ms, profile.busy_ms, profile.gap_ms) == (4.0, 2.5, 1.5)
    assert profile.tokens_per_step == 3
    first, second = profile.kinds
    assert (first.name, first.ms_per_step, first.runs_per_step) == ("gemm", 2.0, 1.0)
    assert (second.name, second.ms_per_step, second.runs_per_step) == ("sampling", 0.5, 0.5)
