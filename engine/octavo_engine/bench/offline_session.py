"""Brings up an engine in this process, runs workloads through it, and says how near each came to its lower bound."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import torch

from octavo_engine.bench import offline_report
from octavo_engine.bench.ceilings import measure_cpu_rates
from octavo_engine.bench.gpu_ceilings import measure_gpu_ceilings
from octavo_engine.bench.machine import describe_machine
from octavo_engine.bench.models import BenchModel
from octavo_engine.bench.offline import OfflinePlan, OfflineResult, measure_workload
from octavo_engine.bench.roofline import ModelWork, Rates, model_work
from octavo_engine.bench.step_profile import StepProfile, profile_steps
from octavo_engine.bench.workloads import Workload, make_requests
from octavo_engine.capacity import activation_dtype, resolve_kv_cache_dtype
from octavo_engine.config import EngineConfig
from octavo_engine.core import EngineCore
from octavo_engine.device import Device, open_device, resolve_dtype
from octavo_engine.errors import ConfigError
from octavo_engine.garbage_collection import spare_old_objects

# Prompts of a profile come from a seed that no timed run uses.
_PROFILE_SEED = 2000


@dataclass(frozen=True, slots=True)
class ProfilePlan:
    """Steps to profile after each workload; 0: none. num_skipped: as `profile_steps` takes it."""

    num_steps: int = 0
    num_skipped: int | None = None


@dataclass(frozen=True, slots=True)
class WorkloadReport:
    """What a workload came to, as JSON and as a row of a table."""

    result: OfflineResult
    record: dict[str, object]
    profile: StepProfile | None = field(default=None)


def run_session(
    model: BenchModel,
    config: EngineConfig,
    workloads: Sequence[Workload],
    plan: OfflinePlan,
    profile_plan: ProfilePlan,
    rates: Rates | None,
    on_report: Callable[[WorkloadReport], None],
) -> None:
    """Run the workloads one after the other on one engine; `on_report` gets each as soon as it is done.

    config: its `model` is the address of the model's files; without `max_model_len`, the workloads' longest is taken
    rates:  of the machine; None: measured first
    Raises ConfigError if a workload is longer than the model's context, and what an engine raises at its start.
    """
    config = _with_context(config, model, workloads)
    device = open_device(config)
    dtype = str(resolve_dtype(config, model.geometry, device)).removeprefix("torch.")
    if rates is None:
        rates = _measure_rates(device, dtype)
    core = EngineCore(config, lambda phase: None)
    spare_old_objects()  # as an engine process does
    work = _work(model, config, device, dtype)
    engine = _describe_engine(core, config, device, dtype)
    for workload in workloads:
        result = measure_workload(core, workload, plan, model.geometry.vocab_size)
        record = offline_report.offline_record(result, result.floors(work, rates), rates)
        profile = _profile(core, workload, plan, profile_plan, model.geometry.vocab_size)
        if profile:
            record["profile"] = offline_report.profile_record(profile)
        on_report(WorkloadReport(result, {**record, **engine}, profile))


def _with_context(config: EngineConfig, model: BenchModel, workloads: Sequence[Workload]) -> EngineConfig:
    longest = max(workload.longest_context for workload in workloads)
    limit = config.max_model_len or model.geometry.max_position_embeddings
    if longest > limit:
        raise ConfigError(f"the workloads need a context of {longest} tokens, and {model.name} has {limit}")
    return config if config.max_model_len else config.model_copy(update={"max_model_len": longest})


def _measure_rates(device: Device, dtype: str) -> Rates:
    if device.hardware.is_gpu:
        return measure_gpu_ceilings(sustained_s=0.5).rates
    return measure_cpu_rates(activation_dtype(dtype, device.hardware))


def _work(model: BenchModel, config: EngineConfig, device: Device, dtype: str) -> ModelWork:
    return model_work(
        model.geometry,
        dtype=dtype,
        kv_cache_dtype=resolve_kv_cache_dtype(config.kv_cache_dtype, dtype, device.hardware),
        quantization=config.quantization,
    )


def _describe_engine(core: EngineCore, config: EngineConfig, device: Device, dtype: str) -> dict[str, object]:
    ready = core.ready()
    return {
        "engine": {
            "config": config.model_dump(mode="json", exclude_defaults=True, exclude={"model"}),
            "dtype": dtype,
            "hardware": ready.hardware,
            "gpu": torch.cuda.get_device_name() if device.hardware.is_gpu else None,
            "kernels": ready.kernels,
            "num_kv_blocks": ready.num_kv_blocks,
            "max_num_seqs": ready.max_num_seqs,
            "max_num_batched_tokens": ready.max_num_batched_tokens,
        },
        "machine": asdict(describe_machine()),
    }


def _profile(
    core: EngineCore, workload: Workload, plan: OfflinePlan, profile_plan: ProfilePlan, vocab_size: int
) -> StepProfile | None:
    if not profile_plan.num_steps:
        return None
    requests = make_requests(workload, _PROFILE_SEED, num_requests=plan.num_requests, vocab_size=vocab_size)
    return profile_steps(core, requests, profile_plan.num_steps, profile_plan.num_skipped)
