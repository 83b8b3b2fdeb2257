"""How many GPUs and nodes a replica takes, and what its pods are told of it."""

from dataclasses import replace

import pytest
from octavo_engine.config import load_config
from octavo_operator.children import Owner
from octavo_operator.claims import observe_slice
from octavo_operator.observe import Key
from octavo_operator.parallelism import Split
from octavo_operator.plan import make_plan
from octavo_operator.render import render
from octavo_operator.running import Running
from operator_samples import (
    DEFAULTS,
    LLAMA_8B,
    LLAMA_70B,
    UNKNOWN,
    ModelGeometry,
    cpu_node,
    gh200_node,
    gpu_device,
    h100_node,
    l4_node,
    llama,
    node,
    resource_slice,
    spec,
)

LLAMA_405B = ModelGeometry(geometry=llama(num_layers=126, hidden_size=16384))
# 71 heads, which nothing divides, as Falcon 7B has.
ODD = ModelGeometry(geometry=replace(llama(num_layers=80), num_heads=71, num_kv_heads=1))
SHARED = node("s", product="NVIDIA-L4-SHARED", memory_mib=23_034, compute="8.9", gpus=8,
              labels={"nvidia.com/gpu.replicas": "2"})  # fmt: skip
SLICED = node("m", product="NVIDIA-H100-80GB-HBM3-MIG-3g.40gb", memory_mib=40_448, compute="9.0", gpus=8)


def planned(model, nodes, running=None, *, has_leader_worker_sets=True, **fields):
    return make_plan(spec(**fields), nodes, model, DEFAULTS, running, has_leader_worker_sets=has_leader_worker_sets)


def two(make):
    return [make(f"{make.__name__}-{number}", gpus=8) for number in range(2)]


# Model, nodes, fields of the spec -> what a replica takes, and what the sentence of why says of it.
SPLITS = {
    "one GPU is enough": (LLAMA_8B, [h100_node()], {}, Split(1), "the only node type that fits"),
    "two GPUs hold it": (LLAMA_70B, [h100_node()], {}, Split(2), "2 GPUs of a node: fewer do not hold the model"),
    "a long context takes more": (
        LLAMA_70B, [h100_node()], {"engine": {"maxModelLen": 65_536}}, Split(4), "4 GPUs of a node: fewer do not",
    ),
    "all of a node": (LLAMA_70B, [l4_node(gpus=8)], {}, Split(8), "8 GPUs of a node: fewer do not hold the model"),
    "one of two nodes has enough": (
        LLAMA_70B, [h100_node("a", gpus=1), h100_node("b", gpus=4)], {}, Split(2), "2 GPUs of a node",
    ),
    "nodes of one GPU": (
        LLAMA_70B, [gh200_node("a"), gh200_node("b")], {}, Split(1, 2, 2), "2 GPUs, 1 in each of 2 nodes: fewer",
    ),
    "two nodes": (LLAMA_405B, two(h100_node), {}, Split(8, 2, 2), "16 GPUs, 8 in each of 2 nodes: fewer"),
    "as asked": (
        LLAMA_8B, [h100_node()], {"parallelism": {"tensor": 4}}, Split(4), "the spec asks for parallelism.tensor: 4",
    ),
    "as asked in GPUs": (
        LLAMA_8B, [h100_node()], {"hardware": {"gpusPerReplica": 8}}, Split(8),
        "the spec asks for hardware.gpusPerReplica: 8",
    ),
    "stages as asked": (
        LLAMA_8B, [h100_node()], {"parallelism": {"pipeline": 2}}, Split(1, 2),
        "the spec asks for parallelism.pipeline: 2",
    ),
    "stages whose heads are divided as asked": (
        LLAMA_8B, two(h100_node), {"parallelism": {"pipeline": 4, "tensor": 4}}, Split(4, 4, 2),
        "parallelism.tensor: 4",
    ),
    "over two nodes if asked": (
        LLAMA_8B, two(l4_node), {"parallelism": {"tensor": 16}}, Split(16, 1, 2), "parallelism.tensor: 16",
    ),
    "of an unknown model": (UNKNOWN, [h100_node()], {"parallelism": {"tensor": 2}}, Split(2), "parallelism.tensor: 2"),
    "an unknown model by itself": (UNKNOWN, [h100_node()], {}, Split(1), "the only node type that fits"),
    "one GPU of a slice": (LLAMA_8B, [SLICED], {"parallelism": {"tensor": 1}}, Split(1), "the only node type"),
}  # fmt: skip


@pytest.mark.parametrize("case", SPLITS)
def test_a_replica_takes_the_fewest_gpus_that_hold_it_or_what_is_asked_for(case):
    model, nodes, fields, split, why = SPLITS[case]
    (variant,) = planned(model, nodes, **fields).variants
    assert variant.split == split
    assert why in variant.why
    assert variant.requests.num_gpus == split.gpus_per_node
    config = variant.config
    assert (config.tensor_parallel_size, config.pipeline_parallel_size, config.num_nodes) == (
        split.tensor, split.pipeline, split.num_nodes,
    )  # fmt: skip
    if variant.capacity:
        assert variant.capacity.total_bytes <= variant.node_type.memory_bytes * 0.9


# Model, nodes, fields -> reason of the problem, and what is said of the node type.
REFUSED = {
    "a slice": (LLAMA_8B, [SLICED], {"parallelism": {"tensor": 2}}, "an engine on a slice or a share of a GPU is not"),
    "a share": (
        LLAMA_8B, [SHARED], {"hardware": {"gpusPerReplica": 2}},
        "hardware.gpusPerReplica: 2 asks for several GPUs, and an engine on a slice or a share of a GPU is not spread",
    ),
    "slices of a model that is too large": (LLAMA_70B, [SLICED], {}, "needs"),
    "a CPU": (LLAMA_8B, [cpu_node()], {"parallelism": {"tensor": 2}}, "an engine on a CPU is not spread"),
    "heads that do not divide": (
        LLAMA_8B, [h100_node()], {"parallelism": {"tensor": 3}}, "32 heads cannot be divided among 3 devices",
    ),
    "no degree divides the heads": (
        ODD, [h100_node(gpus=2)], {"hardware": {"gpusPerReplica": 2}}, "its GPUs divide the 71 heads of the model",
    ),
    "more than there is": (
        LLAMA_8B, two(h100_node), {"hardware": {"gpusPerReplica": 32}},
        "hardware.gpusPerReplica: 32 cannot be had: there are 2 nodes of this type with up to 8 GPUs each",
    ),
    "an uneven share": (
        LLAMA_8B, [h100_node("a", gpus=8), h100_node("b", gpus=2)], {"hardware": {"gpusPerReplica": 10}},
        "a replica has the same number on each of its nodes",
    ),
    "of an unknown model": (
        UNKNOWN, [h100_node()], {"parallelism": {"tensor": 9}},
        "parallelism.tensor: 9 cannot be had: there are 1 nodes of this type with up to 8 GPUs each, a replica has",
    ),
    "more stages than GPUs": (
        LLAMA_8B, two(h100_node), {"parallelism": {"pipeline": 32}},
        "parallelism.pipeline: 32 cannot be had: there are 2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_says_why_a_replica_cannot_be_spread_so(case):
    model, nodes, fields, sentence = REFUSED[case]
    made = planned(model, nodes, **fields)
    assert made.problem is not None
    assert made.problem.reason == "ModelDoesNotFit"
    (why,) = [each.why for each in made.rejected]
    assert sentence in why
    assert not fields or sentence in made.problem.message


def test_over_nodes_only_where_leader_worker_sets_are():
    nodes = two(h100_node)
    made = planned(LLAMA_405B, nodes, has_leader_worker_sets=False)
    assert made.problem.reason == "LeaderWorkerSetMissing"
    assert made.problem.message.startswith("on h100 the model takes 16 GPUs, 8 in each of 2 nodes, and an engine over")
    assert planned(LLAMA_70B, nodes, has_leader_worker_sets=False).variants[0].split == Split(2)
    elsewhere = planned(LLAMA_70B, [gh200_node("a"), gh200_node("b"), h100_node()], has_leader_worker_sets=False)
    assert [each.node_type.name for each in elsewhere.variants] == ["h100"]


def test_one_node_comes_before_several_however_fast_these_are():
    made = planned(LLAMA_70B, [gh200_node("a"), gh200_node("b"), l4_node(gpus=8)])
    assert [each.node_type.name for each in made.variants] == ["l4"]


def test_room_is_where_one_node_has_all_of_a_replicas_gpus_free():
    nodes = [h100_node("a", gpus=2), h100_node("b", gpus=2), l4_node("l", gpus=8)]
    halves = Running(num_taken={("a", "h100"): 1, ("b", "h100"): 1})
    made = planned(LLAMA_70B, nodes, halves)
    assert [each.node_type.name for each in made.variants] == ["l4"]
    one = Running(num_taken={("a", "h100"): 2})
    assert [each.node_type.name for each in planned(LLAMA_70B, nodes, one).variants] == ["h100"]
    listed = {"hardware": {"types": ["h100", "l4"], "preference": "Listed"}, "scaling": {"replicas": 3}}
    spread = planned(LLAMA_70B, nodes, one, **listed)
    assert {each.node_type.name: each.replicas for each in spread.variants} == {"h100": 2, "l4": 1}


def test_a_rollout_starts_beside_the_old_pods_only_with_all_gpus_of_a_replica():
    def surges(num_in_use):
        running = Running(num_in_use={"h100": num_in_use}, num_replicas={"h100": 1})
        (variant,) = planned(LLAMA_70B, [h100_node(gpus=6)], running).variants
        return variant.is_surge

    assert [surges(num) for num in (2, 4, 5, 6)] == [True, True, False, False]


OWNER = Owner(Key("default", "llama"), "uid")


def objects_of(model, nodes, **fields):
    made = planned(model, nodes, **fields)
    return {each["kind"]: each for each in render(OWNER, spec(**fields), made)}


def test_a_pod_with_several_gpus_has_shared_memory_and_its_part_of_the_host():
    (one,) = planned(LLAMA_8B, [h100_node()]).variants
    template = objects_of(LLAMA_70B, [h100_node()])["Deployment"]["spec"]["template"]
    container = template["spec"]["containers"][0]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "2"}
    assert container["resources"]["requests"]["cpu"] == "8"
    assert {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}} in template["spec"]["volumes"]
    assert template["metadata"]["annotations"]["octavo.dev/gpus"] == "2"
    alone = objects_of(LLAMA_8B, [h100_node()])["Deployment"]["spec"]["template"]
    assert {"name": "shm", "emptyDir": {"medium": "Memory"}} in alone["spec"]["volumes"]
    assert "octavo.dev/gpus" not in alone["metadata"]["annotations"]
    assert one.requests.num_gpus == 1


def test_a_claim_is_for_as_many_devices_and_has_a_name_of_its_own():
    devices = [gpu_device(f"gpu-{index}", "NVIDIA H100 80GB HBM3", "9.0", 81_559) for index in range(4)]
    _, claimable = observe_slice(resource_slice("n", *devices))
    nodes = [replace(node("n", cpu="128"), claimable=claimable)]
    several, one = objects_of(LLAMA_70B, nodes), objects_of(LLAMA_8B, nodes)
    exactly = several["ResourceClaimTemplate"]["spec"]["spec"]["devices"]["requests"][0]["exactly"]
    assert (exactly["allocationMode"], exactly["count"]) == ("ExactCount", 2)
    names = {each["ResourceClaimTemplate"]["metadata"]["name"] for each in (several, one)}
    assert len(names) == 2
    pod = several["Deployment"]["spec"]["template"]["spec"]
    assert pod["resourceClaims"][0]["resourceClaimTemplateName"] in names


def test_a_replica_over_nodes_is_a_group_whose_leader_alone_is_found():
    template = {"spec": {"containers": [{"name": "engine", "env": [{"name": "NCCL_IB_HCA", "value": "mlx5"}]}]}}
    scheduling = {"topologySpread": [{"topologyKey": "zone", "maxSkew": 1, "whenUnsatisfiable": "DoNotSchedule"}]}
    fields = {"scaling": {"replicas": 3}, "podTemplate": template, "scheduling": scheduling}
    objects = objects_of(LLAMA_405B, two(h100_node), **fields)
    assert "Deployment" not in objects
    groups = objects["LeaderWorkerSet"]
    assert groups["metadata"]["name"] == "llama-h100-group"
    assert groups["spec"]["replicas"] == 3
    made = groups["spec"]["leaderWorkerTemplate"]
    assert (made["size"], made["restartPolicy"]) == (2, "RecreateGroupOnPodRestart")
    leader, worker = made["leaderTemplate"], made["workerTemplate"]
    selector = objects["Service"]["spec"]["selector"]
    assert selector.items() <= leader["metadata"]["labels"].items()
    assert not selector.items() <= worker["metadata"]["labels"].items()
    assert worker["metadata"]["labels"]["octavo.dev/worker-of"] == "llama"
    assert leader["spec"]["containers"] == worker["spec"]["containers"]
    assert {"name": "NCCL_IB_HCA", "value": "mlx5"} in worker["spec"]["containers"][0]["env"]
    assert "topologySpreadConstraints" in leader["spec"]
    assert "topologySpreadConstraints" not in worker["spec"]
    terms = [
        each["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
        for each in (leader, worker)
    ]
    assert terms[0] == terms[1]
    products = [each for each in terms[0][0]["matchExpressions"] if each["key"] == "nvidia.com/gpu.product"]
    assert products[0]["values"] == ["NVIDIA-H100-80GB-HBM3"]


def test_the_engine_reads_its_place_in_the_group(tmp_path):
    """From the ConfigMap, which is the same for all pods, and from what the set's controller tells each of them."""
    config_map = objects_of(LLAMA_405B, two(h100_node))["ConfigMap"]
    file = tmp_path / "engine.yaml"
    file.write_text(config_map["data"]["engine.yaml"])
    address = "llama-h100-group-0.llama-h100-group.default"
    environment = {"LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": "1", "LWS_LEADER_ADDRESS": address}
    config = load_config({}, environment, file)
    assert (config.num_nodes, config.node_rank, config.leader_address) == (2, 1, address)
    assert (config.tensor_parallel_size, config.pipeline_parallel_size) == (8, 2)


def test_names_of_groups_leave_room_for_what_is_made_of_them():
    owner = Owner(Key("default", "a" * 40))
    made = planned(LLAMA_405B, two(h100_node))
    other = replace(owner, key=Key("default", "a" * 39 + "b"))
    names = {render(each, spec(), made)[-1]["metadata"]["name"] for each in (owner, other)}
    assert len(names) == 2
    assert all(len(name) <= 48 for name in names)
