"""What serves stays as it is where only the cluster changed; a plan says so, and takes the change up when told to."""

from dataclasses import replace

import pytest
from octavo_operator.children import Owner
from octavo_operator.decision import Defaults
from octavo_operator.observe import Key
from octavo_operator.plan import make_plan
from octavo_operator.profiles import read_profiles
from octavo_operator.render import render
from octavo_operator.running import Running, observe_running, recall, remember, spec_hash
from operator_samples import DEFAULTS, LLAMA_8B, cpu_node, gh200_node, h100_node, hardware_profile, l4_node, spec

OWNER = Owner(Key("default", "llama"), "uid")
AUTOMATIC = {"rollout": {"replan": "Automatic"}}
NAMED = {"hardware": {"types": ["h100", "l4"]}, "scaling": {"replicas": 4}}


def planned(asked, nodes, running=None, defaults=DEFAULTS, table=None):
    return make_plan(asked, nodes, LLAMA_8B, defaults, running, table)


def serves(asked, made, *, ready=None, unfinished=(), annotations=None):
    """What the next pass observes once the plan was applied and its pods (of the types `ready`) are ready."""
    objects = render(replace(OWNER, annotations=annotations or {}), asked, made)
    deployments = [each for each in objects if each["kind"] == "Deployment"]
    for each in deployments:
        name = each["metadata"]["labels"]["octavo.dev/node-type"]
        num = each["spec"]["replicas"] if ready is None or name in ready else 0
        done = 0 if name in unfinished else num
        each["metadata"]["generation"] = 1
        each["status"] = {"observedGeneration": 1, "replicas": num, "updatedReplicas": done, "readyReplicas": num,
                          "availableReplicas": num}  # fmt: skip
    config_maps = [each for each in objects if each["kind"] == "ConfigMap"]
    in_use = {each.node_type.name: each.replicas for each in made.variants}
    return lambda now, its_annotations=None: observe_running(
        deployments, config_maps, [], in_use, {}, spec_hash(now, its_annotations or {})
    )


def types_of(made):
    return {each.node_type.name: each.replicas for each in made.variants}


def manifests(asked, made):
    return render(OWNER, asked, made)


def test_a_variant_is_remembered_as_it_is():
    (variant,) = planned(spec(), [gh200_node()]).variants
    config_map = {"metadata": {"name": "x", "labels": {"octavo.dev/node-type": "gh200-96gb"},
                               "annotations": {"octavo.dev/variant": remember(variant)}}}  # fmt: skip
    found = recall([config_map], frozenset({"gh200-96gb"}))["gh200-96gb"]
    assert (found.config, found.capacity, found.requests, found.identity) == (
        variant.config, variant.capacity, variant.requests, variant.identity,
    )  # fmt: skip
    assert not recall([config_map], frozenset({"h100"}))
    config_map["metadata"]["annotations"]["octavo.dev/variant"] = "{}"
    assert not recall([config_map], frozenset({"gh200-96gb"}))


def test_a_node_more_or_less_changes_no_object():
    asked = spec()
    before = planned(asked, [h100_node("a")])
    after = planned(
        asked, [h100_node("a"), h100_node("b"), h100_node("c", ready="False")], serves(asked, before)(asked)
    )
    assert manifests(asked, before) == manifests(asked, after)
    assert after.outdated == ""


def test_faster_hardware_is_told_of_and_not_taken():
    asked = spec()
    before = planned(asked, [h100_node()])
    after = planned(asked, [h100_node(), gh200_node()], serves(asked, before)(asked))
    assert types_of(after) == {"h100": 1}
    assert after.outdated == "a plan made now would run on gh200-96gb x1 instead of h100 x1"
    assert manifests(asked, before) == manifests(asked, after)


def test_changed_labels_restart_nothing():
    """A driver update renames the product and changes what it reports of its memory."""
    asked = spec()
    before = planned(asked, [h100_node(driver=580)])
    labels = {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3-SHARED", "nvidia.com/gpu.replicas": "2"}
    changed = [replace(h100_node(driver=580), labels={**h100_node(driver=580).labels, **labels})]
    after = planned(asked, changed, serves(asked, before)(asked))
    assert types_of(after) == {"h100": 1}
    assert "would run on h100-shared x1 instead of h100 x1" in after.outdated
    old, new = (manifests(asked, made)[-1]["spec"]["template"] for made in (before, after))
    assert old == new


def test_a_changed_row_of_the_table_is_told_with_what_it_changes():
    asked = spec()
    before = planned(asked, [h100_node()])
    table, _ = read_profiles([hardware_profile("h100", kernelVariant="ampere")])
    after = planned(asked, [h100_node()], serves(asked, before)(asked), table=table)
    assert after.variants[0].identity == before.variants[0].identity
    assert after.outdated.startswith("a plan made now would start other engines on h100: ")
    fresh = planned(spec(**AUTOMATIC), [h100_node()], serves(asked, before)(asked), table=table)
    assert fresh.variants[0].node_type.hardware.kernel_variant == "ampere"


def test_a_new_version_of_the_operator_restarts_no_engine_by_itself():
    asked = spec()
    before = planned(asked, [h100_node()])
    after = planned(asked, [h100_node()], serves(asked, before)(asked), Defaults("octavo/engine:next"))
    assert after.variants[0].image == "octavo/engine:test"
    assert "image octavo/engine:test -> octavo/engine:next" in after.outdated


TAKES_UP = {
    "the policy": (spec(**AUTOMATIC), {}),
    "an edit of the spec": (spec(engine={"maxNumSeqs": 8}), {}),
    "the annotation": (spec(), {"octavo.dev/replan": "2026-01-01"}),
}


@pytest.mark.parametrize("case", TAKES_UP)
def test_a_new_plan_is_taken_up_by(case):
    asked, annotations = TAKES_UP[case]
    before = planned(spec(), [h100_node()])
    running = serves(spec(), before)(asked, annotations)
    after = planned(asked, [h100_node(), gh200_node()], running)
    assert types_of(after) == {"gh200-96gb": 1}
    assert after.outdated == ""


def test_scaling_and_suspending_ask_for_no_new_plan():
    before = planned(spec(), [h100_node()])
    for fields in ({"scaling": {"replicas": 3}}, {"suspend": True}, {"planOnly": True}):
        asked = spec(**fields)
        after = planned(asked, [h100_node(), gh200_node()], serves(spec(), before)(asked))
        assert list(types_of(after)) == ["h100"]
        assert after.outdated


def test_what_no_longer_serves_is_planned_anew():
    asked = spec()
    before = planned(asked, [h100_node()])
    running = serves(asked, before, ready=())(asked)
    assert types_of(planned(asked, [h100_node(ready="False"), l4_node()], running)) == {"l4": 1}


def test_replicas_that_serve_stay_where_they_are_when_a_type_arrives_and_new_ones_go_there():
    before = planned(spec(**NAMED), [h100_node()])
    assert types_of(before) == {"h100": 4}
    arrived = [h100_node(), l4_node(gpus=8)]
    kept = planned(spec(**NAMED), arrived, serves(spec(**NAMED), before)(spec(**NAMED)))
    assert types_of(kept) == {"h100": 4}
    assert "would run on" in kept.outdated
    more = spec(**{**NAMED, "scaling": {"replicas": 6}})
    assert types_of(planned(more, arrived, serves(spec(**NAMED), before)(more))) == {"h100": 4, "l4": 2}


def test_automatic_takes_one_node_type_after_the_other():
    asked = spec(**NAMED, **AUTOMATIC)
    nodes = [h100_node(), l4_node(gpus=8)]
    new = Defaults("octavo/engine:next")
    before = planned(asked, nodes)
    images = {each.node_type.name: each.image for each in before.variants}
    assert set(images.values()) == {"octavo/engine:test"}

    first = planned(asked, nodes, serves(asked, before)(asked), new)
    assert {each.node_type.name: each.image for each in first.variants} == {
        "h100": "octavo/engine:next", "l4": "octavo/engine:test",
    }  # fmt: skip
    assert first.outdated == "engines on l4 follow when h100 are done"

    during = planned(asked, nodes, serves(asked, first, unfinished={"h100"})(asked), new)
    assert {each.node_type.name: each.image for each in during.variants} == {
        "h100": "octavo/engine:next", "l4": "octavo/engine:test",
    }  # fmt: skip
    second = planned(asked, nodes, serves(asked, first)(asked), new)
    assert {each.image for each in second.variants} == {"octavo/engine:next"}
    assert second.outdated == ""


def test_nodes_that_come_and_go_do_not_change_what_a_rollout_would_do():
    """Places for two of two replicas: no surge. More of them change nothing until there is something to roll out."""
    asked = spec(scaling={"replicas": 2})
    before, tight = planned(asked, [h100_node(gpus=3)]), planned(asked, [h100_node(gpus=2)])
    assert (before.variants[0].is_surge, tight.variants[0].is_surge) == (True, False)
    more = planned(asked, [h100_node(gpus=8)], serves(asked, tight)(asked))
    assert manifests(asked, more) == manifests(asked, tight)
    fewer = planned(asked, [h100_node(gpus=1)], serves(asked, before)(asked))
    assert manifests(asked, fewer) == manifests(asked, before)
    automatic = spec(scaling={"replicas": 2}, **AUTOMATIC)
    kept = planned(automatic, [h100_node(gpus=8)], serves(automatic, tight)(automatic))
    assert not kept.variants[0].is_surge
    edited = spec(scaling={"replicas": 2}, engine={"maxNumSeqs": 3})
    assert planned(edited, [h100_node(gpus=8)], serves(asked, tight)(edited)).variants[0].is_surge


def test_automatic_keeps_what_serves_where_a_new_plan_has_nowhere_to_run():
    asked = spec(**AUTOMATIC)
    before = planned(asked, [h100_node()])
    after = planned(asked, [h100_node(driver=550)], serves(asked, before)(asked))
    assert types_of(after) == {"h100": 1}
    assert "would find nothing to run on" in after.outdated


def test_the_spec_hash_is_of_what_an_engine_is():
    base = spec_hash(spec(), {})
    for fields in ({"scaling": {"replicas": 9}}, {"suspend": True}, AUTOMATIC, {"planOnly": False}):
        assert spec_hash(spec(**fields), {}) == base, fields
    assert spec_hash(spec(engine={"maxNumSeqs": 1}), {}) != base
    assert spec_hash(spec(), {"octavo.dev/replan": "1"}) != base
    assert spec_hash(spec(), {"unrelated": "1"}) == base


def test_without_memory_is_as_if_nothing_served():
    running = Running(serving=frozenset({"cpu"}), node_types=frozenset({"cpu"}), kept={"cpu": None})
    assert running.without_memory() == Running(node_types=frozenset({"cpu"}))
    assert planned(spec(), [cpu_node()], running.without_memory()).variants
