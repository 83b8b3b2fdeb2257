"""What the planner chooses, and what it says."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from octavo_engine.capacity import Limits, plan_capacity
from octavo_engine.geometry import geometry_from_config
from octavo_operator.modelgeometry import read_geometry
from octavo_operator.nodes import find_node_types
from octavo_operator.observe import ModelGeometry
from octavo_operator.placement import device_price
from octavo_operator.plan import make_plan
from octavo_operator.profiles import read_profiles
from octavo_operator.running import Running
from operator_samples import (
    DEFAULTS,
    LLAMA_8B,
    LLAMA_70B,
    UNKNOWN,
    cpu_node,
    gh200_node,
    h100_node,
    hardware_profile,
    l4_node,
    llama,
    node,
    spec,
)

ALL_NODES = (cpu_node(), l4_node(gpus=4), h100_node(), gh200_node())


def planned(model=LLAMA_8B, nodes=ALL_NODES, running=None, **fields):
    return make_plan(spec(**fields), list(nodes), model, DEFAULTS, running)


def types_of(made):
    return {each.node_type.name: each.replicas for each in made.variants}


def rejected(made):
    return {each.node_type: each.why for each in made.rejected}


def test_chooses_the_fastest_node_type_that_fits():
    made = planned()
    assert types_of(made) == {"gh200-96gb": 1}
    assert "the fastest of 3 that fit" in made.variants[0].why
    assert "predicted to be" in rejected(made)["h100"]


def test_prefers_a_gpu_over_a_cpu_and_says_how_to_have_the_cpu():
    made = planned(nodes=[cpu_node(), h100_node()])
    assert types_of(made) == {"h100": 1}
    assert "hardware.types: [cpu]" in rejected(made)["cpu"]


def test_takes_the_cpu_where_there_is_no_gpu_or_where_it_is_asked_for():
    assert types_of(planned(nodes=[cpu_node()])) == {"cpu": 1}
    assert types_of(planned(hardware={"types": ["cpu"]})) == {"cpu": 1}
    assert types_of(planned(nodes=[cpu_node(), l4_node()], hardware={"exclude": ["l4"]})) == {"cpu": 1}


def test_spreads_over_named_types_up_to_their_devices():
    nodes = [h100_node(gpus=2), gh200_node()]
    named = {"types": ["h100", "gh200-96gb"]}
    assert types_of(planned(nodes=nodes, hardware=named, scaling={"replicas": 3})) == {"h100": 2, "gh200-96gb": 1}
    assert types_of(planned(nodes=nodes, hardware=named, scaling={"replicas": 2})) == {"h100": 1, "gh200-96gb": 1}
    assert types_of(planned(nodes=nodes, hardware=named)) == {"gh200-96gb": 1}


def test_does_not_spread_over_a_type_on_which_the_model_does_not_fit():
    made = planned(LLAMA_70B, [l4_node(), node("b", product="NVIDIA-B200", memory_mib=183_359, gpus=8)],
                   hardware={"types": ["l4", "b200"]}, scaling={"replicas": 2})  # fmt: skip
    assert types_of(made) == {"b200": 2}
    assert "needs" in rejected(made)["l4"]


def test_says_what_would_fit():
    made = planned(LLAMA_70B, [l4_node()])
    assert made.problem is not None
    assert made.problem.reason == "ModelDoesNotFit"
    assert "the smallest GPU that would fit is NVIDIA B200" in made.problem.message


def test_says_what_was_asked_for_and_what_there_is():
    made = planned(hardware={"types": ["b300"]})
    assert made.problem is not None
    assert made.problem.reason == "NoFittingHardware"
    assert "hardware.types asks for b300; the cluster has cpu, gh200-96gb, h100, l4" in made.problem.message


def test_waits_for_nodes_that_are_away():
    made = planned(nodes=[h100_node(ready="False")])
    assert made.problem is not None
    assert made.problem.reason == "HardwareAway"
    assert planned(nodes=[]).problem.reason == "NoNodes"


def test_keeps_what_runs_while_its_nodes_are_away_unless_another_type_fits():
    away = h100_node(ready="False")
    running = Running(node_types=frozenset({"h100"}))
    assert types_of(planned(nodes=[away], running=running)) == {"h100": 1}
    assert types_of(planned(nodes=[away, l4_node(), gh200_node()], running=running)) == {"gh200-96gb": 1}


def test_does_not_move_what_serves_because_a_faster_type_appeared():
    running = Running(node_types=frozenset({"h100"}), serving=frozenset({"h100"}))
    made = planned(running=running)
    assert types_of(made) == {"h100": 1}
    assert "moving it would restart it" in rejected(made)["gh200-96gb"]
    assert types_of(planned(running=running, hardware={"types": ["gh200-96gb"]})) == {"gh200-96gb": 1}


def test_an_unsupported_model_is_a_problem_of_its_own():
    made = planned(ModelGeometry(problem="GGUF architecture 'x' is not supported", is_unsupported=True))
    assert made.problem is not None
    assert made.problem.reason == "ModelNotSupported"
    assert not made.variants


def test_without_a_geometry_the_engine_decides():
    made = planned(UNKNOWN, engine={"maxNumSeqs": 5})
    (variant,) = made.variants
    assert variant.node_type.name == "gh200-96gb"
    assert variant.capacity is None
    assert (variant.config.max_num_seqs, variant.config.max_model_len, variant.config.num_kv_blocks) == (5, None, None)


def test_the_engine_can_start_from_what_was_planned():
    """The engine repeats the calculation with the memory that it is given, and must come to the same blocks."""
    (variant,) = planned(nodes=[cpu_node()], engine={"maxModelLen": 4096, "quantization": "int8"}).variants
    config = variant.config
    again = plan_capacity(
        LLAMA_8B.geometry,
        variant.node_type.hardware,
        int(config.memory_gib * (1 << 30)),
        dtype=config.dtype,
        kv_cache_dtype=config.kv_cache_dtype,
        limits=Limits(config.max_model_len, config.max_num_seqs, config.max_num_batched_tokens, config.num_kv_blocks,
                      config.block_size, config.quantization),
        memory_utilization=config.memory_utilization,
    )  # fmt: skip
    assert again.num_kv_blocks == variant.capacity.num_kv_blocks
    assert variant.requests.memory_bytes == int(config.memory_gib * (1 << 30))


def test_surges_only_where_a_place_is_free():
    small = {"engine": {"quantization": "int8", "maxModelLen": 2048}}

    def surges(gpus, running=None, **fields):
        return planned(nodes=[l4_node(gpus=gpus)], running=running, **small, **fields).variants[0].is_surge

    assert surges(2)
    assert not surges(1)
    # Once its own replica is there it is the same.
    assert surges(2, Running(num_in_use={"l4": 1}, num_replicas={"l4": 1}))
    assert not surges(1, Running(num_in_use={"l4": 1}, num_replicas={"l4": 1}))
    assert not surges(2, Running(num_in_use={"l4": 1}))
    assert not surges(9, Running(stuck=frozenset({"l4"})))
    assert surges(1, rollout={"strategy": "Surge"})


def test_suspend_keeps_the_variant_and_takes_its_replicas():
    made = planned(suspend=True, scaling={"replicas": 4})
    assert types_of(made) == {"gh200-96gb": 0}


def test_a_replica_more_is_no_new_plan_but_an_edit_of_the_engine_is():
    base = planned().hash
    assert planned(scaling={"replicas": 7}).hash == base
    assert planned(engine={"maxNumSeqs": 3}).hash != base
    assert planned(engine={"image": "other"}).hash != base


PREFERENCES = {
    # Of a gh200-96gb, two h100, seven slices of an h100 and four l4, fastest first; the cheapest is l4.
    "named, evenly": ({"types": ["h100", "l4"]}, 3, {"h100": 2, "l4": 1}),
    "in the order of the list": ({"types": ["l4", "h100"], "preference": "Listed"}, 5, {"l4": 4, "h100": 1}),
    "in the other order": ({"types": ["h100", "l4"], "preference": "Listed"}, 5, {"h100": 2, "l4": 3}),
    "fastest first": ({"preference": "Fastest"}, 4, {"gh200-96gb": 1, "h100": 2, "h100-mig-1g-10gb": 1}),
    "cheapest first": ({"preference": "Cheapest"}, 5, {"l4": 4, "h100": 1}),
    "more than there is room for": (
        {"preference": "Fastest", "exclude": ["h100"]},
        9,
        {"gh200-96gb": 5, "l4": 4},
    ),
    "past slices": (
        {"preference": "Fastest", "exclude": ["gh200-96gb"]},
        12,
        {"h100": 2, "h100-mig-1g-10gb": 7, "l4": 3},
    ),
    "none asked for": ({}, 3, {"gh200-96gb": 3}),
    "a slice by its own name": ({"types": ["h100-mig-1g-10gb"]}, 1, {"h100-mig-1g-10gb": 1}),
}
SLICED = node("mig", product="NVIDIA-H100-80GB-HBM3-MIG-1g.10gb", memory_mib=9_984, compute="9.0", gpus=7)
MIXED = (l4_node(gpus=4), h100_node(gpus=2), gh200_node(), SLICED)
# Price of an hour: the L4 is slower by 13x and cheaper by 20x.
PRICES, _ = read_profiles(
    [hardware_profile("l4", pricePerHour="0.20"), hardware_profile("h100", pricePerHour="4"),
     hardware_profile("gh200-96gb", pricePerHour="8.50")]
)  # fmt: skip
SMALL = {"engine": {"quantization": "int8", "maxModelLen": 2048, "maxNumSeqs": 8}}
TINY = ModelGeometry(geometry=llama(num_layers=8, hidden_size=2048))


@pytest.mark.parametrize("case", PREFERENCES)
def test_shares_replicas_by_preference(case):
    hardware, replicas, expected = PREFERENCES[case]
    fields = {"hardware": hardware, "scaling": {"replicas": replicas}, **SMALL}
    made = make_plan(spec(**fields), list(MIXED), TINY, DEFAULTS, table=PRICES)
    assert types_of(made) == expected
    assert all(each.why for each in made.variants)


def test_devices_on_which_other_models_serve_are_no_room():
    nodes = [h100_node("h", gpus=2), l4_node("l", gpus=4)]
    taken = Running(num_in_use={"h100": 2}, num_taken={("h", "h100"): 2})
    made = planned(TINY, nodes, taken, **SMALL)
    assert types_of(made) == {"l4": 1}
    assert rejected(made)["h100"] == "fits, but other models serve on all of its devices"
    waiting = Running(num_in_use={"h100": 2})
    assert types_of(planned(TINY, nodes, waiting, **SMALL)) == {"h100": 1}
    elsewhere = Running(num_taken={("another", "h100"): 2})
    assert types_of(planned(TINY, nodes, elsewhere, **SMALL)) == {"h100": 1}
    half = Running(num_taken={("h", "h100"): 1})
    fields = {"hardware": {"types": ["h100", "l4"], "preference": "Listed"}, "scaling": {"replicas": 3}, **SMALL}
    assert types_of(planned(TINY, nodes, half, **fields)) == {"h100": 1, "l4": 2}
    everything = Running(num_taken={("h", "h100"): 2, ("l", "l4"): 4})
    assert types_of(planned(TINY, nodes, everything, **SMALL)) == {"h100": 1}


def test_says_the_price_that_decided():
    made = make_plan(spec(hardware={"preference": "Cheapest"}, **SMALL), list(MIXED), TINY, DEFAULTS, table=PRICES)
    assert "0.20 an hour" in made.variants[0].why
    assert "hardware.preference Cheapest puts l4 first (0.20 an hour)" in rejected(made)["h100"]


def test_without_prices_the_cheapest_is_the_fastest_and_says_so():
    made = make_plan(spec(hardware={"preference": "Cheapest"}, **SMALL), list(MIXED), TINY, DEFAULTS)
    assert types_of(made) == {"gh200-96gb": 1}
    assert "no HardwareProfile states its price" in made.variants[0].why


def test_a_share_of_a_device_costs_its_part():
    shared = node("s", product="NVIDIA-L4-SHARED", memory_mib=23_034, compute="8.9", gpus=4,
                  labels={"nvidia.com/gpu.replicas": "4"})  # fmt: skip
    (found,) = find_node_types([shared], table=PRICES).types
    assert device_price(found, PRICES) == pytest.approx(0.05)


def test_a_sharer_is_told_its_part_of_the_memory():
    shared = node("s", product="NVIDIA-H100-80GB-HBM3-SHARED", memory_mib=81_559, compute="9.0", gpus=2,
                  labels={"nvidia.com/gpu.replicas": "2"})  # fmt: skip
    (variant,) = make_plan(spec(), [shared], LLAMA_8B, DEFAULTS).variants
    assert variant.config.memory_gib == pytest.approx((81_559 // 2) / 1024)
    assert variant.capacity.total_bytes < (81_559 // 2) << 20
    (whole,) = make_plan(spec(), [h100_node()], LLAMA_8B, DEFAULTS).variants
    assert whole.config.memory_gib is None


def test_a_name_that_means_nothing_is_told_with_what_would():
    made = planned(hardware={"types": ["h300", "l4"]}, **SMALL)
    assert types_of(made) == {"l4": 1}
    assert "no row of the hardware table: cpu, l4, " in rejected(made)["h300"]


def test_only_old_drivers_say_so_and_a_users_own_image_may_have_them():
    old = [h100_node(driver=550)]
    made = planned(nodes=old)
    assert made.problem is not None
    assert made.problem.reason == "NoFittingHardware"
    assert "its NVIDIA driver 550 is too old: the engine's image brings CUDA 13" in made.problem.message
    assert types_of(planned(nodes=old, engine={"image": "my/engine:cuda12"})) == {"h100": 1}


def test_gh200_and_b200_differ_in_image_architecture_kernels_and_limits_for_stated_reasons():
    b200 = node("b200", product="NVIDIA-B200", memory_mib=183_359, compute="10.0", gpus=8, driver=580)
    fields = {"hardware": {"types": ["gh200-96gb", "b200"]}, "scaling": {"replicas": 2}}
    made = make_plan(spec(**fields), [gh200_node(driver=580), b200], LLAMA_8B, DEFAULTS)
    by_name = {each.node_type.name: each for each in made.variants}
    gh200, b200 = by_name["gh200-96gb"], by_name["b200"]
    assert (gh200.node_type.arch, b200.node_type.arch) == ("arm64", "amd64")
    variants = (gh200.node_type.hardware.kernel_variant, b200.node_type.hardware.kernel_variant)
    assert variants == ("grace-hopper", "blackwell")
    assert gh200.capacity.num_kv_blocks < b200.capacity.num_kv_blocks
    assert gh200.capacity.predicted_decode_ms != b200.capacity.predicted_decode_ms
    assert all("hardware.types names it" in each.why for each in made.variants)


node_sets = st.lists(
    st.sampled_from([cpu_node, l4_node, h100_node, gh200_node]).flatmap(
        lambda make: st.builds(
            lambda number, gpus, ready: (
                make(f"{make.__name__}-{number}", ready=ready)
                if make is cpu_node
                else make(f"{make.__name__}-{number}", gpus=gpus, ready=ready)
            ),
            st.integers(0, 5),
            st.integers(1, 8),
            st.sampled_from(["True", "False"]),
        )
    ),
    max_size=6,
    unique_by=lambda each: each.name,
)


@given(
    node_sets,
    st.sampled_from([LLAMA_8B, LLAMA_70B, UNKNOWN]),
    st.integers(0, 12),
    st.none() | st.lists(st.sampled_from(["cpu", "l4", "h100", "gh200-96gb", "b200"]), min_size=1, unique=True),
)
def test_a_plan_is_complete_and_repeatable(nodes, model, replicas, named):
    fields = {"scaling": {"replicas": replicas}} | ({"hardware": {"types": named}} if named else {})
    made = planned(model, nodes, **fields)
    again = planned(model, list(reversed(nodes)), **fields)
    assert (made.hash, made.variants, made.rejected) == (again.hash, again.variants, again.rejected)
    assert bool(made.variants) != bool(made.problem)
    if made.variants:
        assert made.num_replicas == replicas
    explained = {each.node_type for each in made.rejected} | {each.node_type.name for each in made.variants}
    for each in made.variants:
        assert each.why
        assert each.node_type.num_nodes > 0
        if named:
            assert each.node_type.name in named
    assert all(each.why for each in made.rejected)
    assert explained or not nodes


QWEN3_MOE = geometry_from_config(
    {
        "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 2048, "intermediate_size": 6144,
        "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960, "num_experts": 128,
        "num_experts_per_tok": 8, "dtype": "bfloat16",
    }
)  # fmt: skip


def test_a_model_that_no_engine_runs_is_planned_all_the_same_to_show_its_memory():
    model = read_geometry(lambda address: QWEN3_MOE, "hf://Qwen/Qwen3-30B-A3B")
    made = planned(model, nodes=[cpu_node(memory="64Gi"), l4_node(gpus=8), h100_node()])
    assert made.problem.reason == "ModelNotSupported"
    assert made.problem.message.startswith("the architecture Qwen3MoeForCausalLM is not supported; supported: Falcon")
    assert rejected(made)["h100"].startswith("it would fit on one GPU: 56.9 GiB of weights, and KV cache for ")
    assert rejected(made)["l4"].startswith("it would fit on 4 GPUs of a node: 14.2 GiB of weights in each")
    assert rejected(made)["cpu"].startswith("Qwen3MoeForCausalLM in float32 needs ")


def test_says_how_many_gpus_would_hold_a_model_that_all_nodes_do_not():
    made = planned(LLAMA_70B, [l4_node(gpus=1), h100_node(gpus=1)])
    assert made.problem.reason == "ModelDoesNotFit"
    assert rejected(made)["h100"].endswith("; it would fit on 2 GPUs, 1 in each of 2 nodes")
    assert rejected(made)["l4"].endswith("; it would fit on 8 GPUs, 1 in each of 8 nodes")
