"""What the planner chooses, and what it says."""

from hypothesis import given
from hypothesis import strategies as st
from octavo_engine.capacity import Limits, plan_capacity
from octavo_operator.observe import ModelGeometry, Running
from octavo_operator.plan import make_plan
from operator_samples import (
    DEFAULTS,
    LLAMA_8B,
    LLAMA_70B,
    UNKNOWN,
    cpu_node,
    gh200_node,
    h100_node,
    l4_node,
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
    tight = [l4_node(gpus=1)]
    small = {"engine": {"quantization": "int8", "maxModelLen": 2048}}
    free = planned(nodes=tight, **small)
    full = planned(nodes=tight, running=Running(num_in_use={"l4": 1}), **small)
    stuck = planned(nodes=[l4_node(gpus=9)], running=Running(stuck=frozenset({"l4"})), **small)
    assert [each.variants[0].is_surge for each in (free, full, stuck)] == [True, False, False]
    forced = {"rollout": {"strategy": "Surge"}}
    assert planned(nodes=tight, running=Running(num_in_use={"l4": 1}), **small, **forced).variants[0].is_surge


def test_suspend_keeps_the_variant_and_takes_its_replicas():
    made = planned(suspend=True, scaling={"replicas": 4})
    assert types_of(made) == {"gh200-96gb": 0}


def test_a_replica_more_is_no_new_plan_but_an_edit_of_the_engine_is():
    base = planned().hash
    assert planned(scaling={"replicas": 7}).hash == base
    assert planned(engine={"maxNumSeqs": 3}).hash != base
    assert planned(engine={"image": "other"}).hash != base


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
