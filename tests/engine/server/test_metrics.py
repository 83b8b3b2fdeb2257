from engine.server.server_process import ServerProcess, running_server
from prometheus_client.parser import text_string_to_metric_families

ALIASES = {
    "vllm:num_requests_waiting",
    "vllm:num_requests_running",
    "vllm:kv_cache_usage_perc",
    "vllm:request_queue_time_seconds",
    "vllm:time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds",
    "vllm:request_time_per_output_token_seconds",
    "vllm:e2e_request_latency_seconds",
    "vllm:request_prompt_tokens",
    "vllm:request_generation_tokens",
    "vllm:prompt_tokens",
    "vllm:generation_tokens",
    "vllm:request_success",
    "vllm:prefix_cache_queries",
    "vllm:prefix_cache_hits",
    "vllm:num_preemptions",
    "vllm:lora_requests_info",
    "vllm:cache_config_info",
}


def families(server: ServerProcess) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Metric family -> sample name and labels -> value."""
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(server.get("/metrics").text):
        assert family.documentation
        assert family.name not in found, "a family must come once"
        samples = found[family.name] = {}
        for sample in family.samples:
            samples[(("", sample.name), *sorted(sample.labels.items()))] = sample.value
    return found


def test_names_and_labels_that_others_read(echo_server: ServerProcess) -> None:
    echo_server.client.completions.create(model="fake", prompt="ab", max_tokens=3)
    found = families(echo_server)
    assert set(found) >= ALIASES
    assert set(found) >= {"octavo_step_roofline_ratio", "octavo_kv_blocks", "octavo_engine_info", "octavo_memory_bytes"}
    for family, samples in found.items():
        assert all(("model_name", "fake") in labels for labels in samples), family
    phases = [dict(labels)["phase"] for labels in found["octavo_startup_phase_seconds"]]
    assert phases == ["starting", "loading", "warming_up"]
    info = next(iter(found["octavo_engine_info"]))
    assert ("hardware", "fake") in info
    assert ("kernels", "attention=echo") in info
    samples = [(dict(labels), size) for labels, size in found["octavo_memory_bytes"].items()]
    memory = {(labels["pool"], labels["kind"]): size for labels, size in samples}
    assert memory["weights", "predicted"] == 1000
    assert memory["weights", "actual"] == 1010


def test_counts_of_one_request() -> None:
    with running_server("EchoCore") as server:
        server.client.completions.create(model="fake", prompt="abc", n=2, max_tokens=5)
        server.client.completions.create(model="fake", prompt="ab", max_tokens=2000, stop="ba")
        found = families(server)
        label = ("model_name", "fake")

        def value(family: str, suffix: str, *labels: tuple[str, str]) -> float:
            return found[family][(("", family + suffix), *sorted([label, *labels]))]

        for prefix in ("octavo_", "vllm:"):
            assert value(f"{prefix}time_to_first_token_seconds", "_count") == 3
            assert value(f"{prefix}request_queue_time_seconds", "_count") == 2, "one for each prompt"
            assert value(f"{prefix}request_queue_time_seconds", "_sum") == 0.5
            assert value(f"{prefix}inter_token_latency_seconds", "_count") >= 4 * 2 + 2
            assert value(f"{prefix}e2e_request_latency_seconds", "_count") == 3
            assert value(f"{prefix}request_prompt_tokens", "_sum") == 3 + 3 + 2
            assert value(f"{prefix}request_success", "_total", ("finished_reason", "length")) == 2
            assert value(f"{prefix}request_success", "_total", ("finished_reason", "stop")) == 1
            assert value(f"{prefix}generation_tokens", "_total") >= 13
        blocks = {dict(labels)["state"]: number for labels, number in found["octavo_kv_blocks"].items()}
        assert blocks == {"used": 0, "cached": 0, "free": 1000}
