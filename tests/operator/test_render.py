"""Manifests: whole, deterministic, safe by default, and compared with what is live."""

import random
from copy import deepcopy
from dataclasses import replace

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from octavo_engine.config import load_config
from octavo_operator.children import Owner
from octavo_operator.claims import observe_slice
from octavo_operator.merge import differs, merge
from octavo_operator.observe import Key
from octavo_operator.plan import make_plan
from octavo_operator.render import MANIFEST_HASH, remembered_geometry, render
from operator_samples import (
    DEFAULTS,
    LLAMA_8B,
    LLAMA_70B,
    UNKNOWN,
    cpu_node,
    gh200_node,
    gpu_device,
    h100_node,
    node,
    resource_slice,
    spec,
)

OWNER = Owner(Key("models", "llama"), "uid-1")


def rendered(nodes=None, model=LLAMA_8B, owner=OWNER, **fields):
    made = make_plan(spec(**fields), nodes or [h100_node()], model, DEFAULTS)
    return render(owner, spec(**fields), made)


def pod_of(objects):
    return next(each for each in objects if each["kind"] == "Deployment")["spec"]["template"]


def container_of(objects):
    return next(each for each in pod_of(objects)["spec"]["containers"] if each["name"] == "engine")


def test_renders_the_same_objects_in_the_same_order_whatever_the_order_of_nodes():
    nodes = [h100_node(f"n{number}") for number in range(4)] + [gh200_node()]
    named = {"hardware": {"types": ["h100", "gh200-96gb"]}, "scaling": {"replicas": 4}}
    first = rendered(nodes, **named)
    random.Random(1).shuffle(nodes)
    assert rendered(nodes, **named) == first
    assert [each["kind"] for each in first] == [
        "ServiceAccount", "ConfigMap", "ConfigMap", "Service", "Deployment", "Deployment",
    ]  # fmt: skip


def test_renders_nothing_where_nothing_fits():
    assert rendered(hardware={"types": ["b300"]}) == []


def test_every_object_is_owned_labelled_and_hashed():
    for each in rendered():
        metadata = each["metadata"]
        (owner,) = metadata["ownerReferences"]
        assert (owner["uid"], owner["controller"], owner["blockOwnerDeletion"]) == ("uid-1", True, True)
        assert metadata["labels"]["octavo.dev/inference-service"] == "llama"
        assert metadata["annotations"][MANIFEST_HASH]


def test_the_engine_reads_the_config_map(tmp_path):
    objects = rendered()
    config_map = next(each for each in objects if each["kind"] == "ConfigMap")
    file = tmp_path / "engine.yaml"
    file.write_text(config_map["data"]["engine.yaml"])
    config = load_config({}, {}, file)
    assert config.model == "hf://meta-llama/Llama-3.1-8B-Instruct"
    assert config.device == "cuda"
    assert "host" not in config_map["data"]["engine.yaml"]
    assert container_of(objects)["command"] == ["octavo", "serve", "--config", "/etc/octavo/engine.yaml"]


def test_an_edit_of_the_configuration_rolls_the_pods_and_a_replica_more_does_not():
    base, edited, scaled = rendered(), rendered(engine={"maxNumSeqs": 2}), rendered(scaling={"replicas": 2})
    assert pod_of(base) != pod_of(edited)
    assert pod_of(base) == pod_of(scaled)


def test_pods_are_restricted():
    pod = pod_of(rendered())["spec"]
    assert pod["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    assert pod["automountServiceAccountToken"] is False
    security = pod["containers"][0]["securityContext"]
    assert security == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    writable = {each["mountPath"] for each in pod["containers"][0]["volumeMounts"] if not each.get("readOnly")}
    assert writable == {"/tmp", "/cache", "/dev/shm"}
    assert pod["terminationGracePeriodSeconds"] > 30


def test_gpu_pods_are_pinned_to_the_product_and_the_architecture():
    objects = rendered([gh200_node()])
    affinity = pod_of(objects)["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert affinity["nodeSelectorTerms"] == [{"matchExpressions": [
        {"key": "kubernetes.io/arch", "operator": "In", "values": ["arm64"]},
        {"key": "nvidia.com/gpu.product", "operator": "In", "values": ["NVIDIA-GH200-480GB"]},
    ]}]  # fmt: skip
    assert container_of(objects)["resources"]["limits"] == {"nvidia.com/gpu": "1"}
    assert pod_of(objects)["spec"]["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists"}]


def node_terms(objects):
    affinity = pod_of(objects)["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    (term,) = affinity["nodeSelectorTerms"]
    return {each["key"]: (each["operator"], each.get("values")) for each in term["matchExpressions"]}


def test_where_nodes_tell_their_driver_a_sufficient_one_is_demanded():
    terms = node_terms(rendered([h100_node(driver=580), h100_node("old", driver=550)]))
    assert terms["nvidia.com/cuda.driver.major"] == ("Gt", ["579"])
    assert "nvidia.com/cuda.driver.major" not in node_terms(rendered([h100_node()]))


def test_old_and_new_spellings_of_one_product_are_one_type():
    old = node("old", product="A100-SXM4-40GB", memory_mib=40_960, compute="8.0", gpus=8)
    new = node("new", product="NVIDIA-A100-SXM4-40GB", memory_mib=40_960, compute="8.0", gpus=8)
    terms = node_terms(rendered([old, new]))
    assert terms["nvidia.com/gpu.product"] == ("In", ["A100-SXM4-40GB", "NVIDIA-A100-SXM4-40GB"])


def test_a_mig_slice_is_asked_for_by_its_own_resource():
    sliced = node("n", product="NVIDIA-H100-80GB-HBM3", memory_mib=81_559, compute="9.0",
                  resources={"nvidia.com/mig-3g.40gb": "2"},
                  labels={"nvidia.com/mig-3g.40gb.memory": "40448"})  # fmt: skip
    objects = rendered([sliced])
    assert container_of(objects)["resources"]["limits"] == {"nvidia.com/mig-3g.40gb": "1"}
    assert node_terms(objects)["nvidia.com/gpu.product"] == ("In", ["NVIDIA-H100-80GB-HBM3"])
    assert objects[-1]["metadata"]["name"] == "llama-h100-mig-3g-40gb"


def test_devices_that_only_dra_offers_are_claimed():
    _, devices = observe_slice(resource_slice("n", gpu_device("gpu-0", "NVIDIA H100 80GB HBM3", "9.0", 81_559)))
    objects = rendered([replace(node("n"), claimable=devices)])
    assert [each["kind"] for each in objects] == [
        "ServiceAccount", "ConfigMap", "ResourceClaimTemplate", "Service", "Deployment",
    ]  # fmt: skip
    template = objects[2]
    (request,) = template["spec"]["spec"]["devices"]["requests"]
    assert request == {
        "name": "gpu",
        "exactly": {
            "deviceClassName": "gpu.nvidia.com",
            "selectors": [{"cel": {"expression":
                           "device.attributes['gpu.nvidia.com'].productName == 'NVIDIA H100 80GB HBM3'"}}],
            "allocationMode": "ExactCount",
            "count": 1,
        },
    }  # fmt: skip
    pod = pod_of(objects)["spec"]
    assert pod["resourceClaims"] == [{"name": "gpu", "resourceClaimTemplateName": template["metadata"]["name"]}]
    resources = container_of(objects)["resources"]
    assert resources["claims"] == [{"name": "gpu"}]
    assert "limits" not in resources
    assert set(resources["requests"]) == {"cpu", "memory"}
    assert list(node_terms(objects)) == ["kubernetes.io/arch"]


def test_each_variant_starts_with_its_own_kernels_limits_and_architecture():
    """GH200 is Hopper beside a Grace CPU, B200 is Blackwell beside an x86 one: nothing of the one is right there."""
    b200 = node("b", product="NVIDIA-B200", memory_mib=183_359, compute="10.0", gpus=8, driver=580)
    fields = {"hardware": {"types": ["gh200-96gb", "b200"]}, "scaling": {"replicas": 2},
              "scheduling": {"runtimeClassName": "nvidia"}}  # fmt: skip
    objects = rendered([gh200_node(), b200], **fields)
    configs = {
        each["metadata"]["labels"]["octavo.dev/node-type"]: yaml.safe_load(each["data"]["engine.yaml"])
        for each in objects
        if each["kind"] == "ConfigMap"
    }
    assert {name: each["kernel_variant"] for name, each in configs.items()} == {
        "gh200-96gb": "grace-hopper", "b200": "blackwell",
    }  # fmt: skip
    pods = {
        each["metadata"]["labels"]["octavo.dev/node-type"]: each["spec"]["template"]["spec"]
        for each in objects
        if each["kind"] == "Deployment"
    }
    for name, arch in (("gh200-96gb", "arm64"), ("b200", "amd64")):
        required = pods[name]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        (term,) = required["nodeSelectorTerms"]
        assert {"key": "kubernetes.io/arch", "operator": "In", "values": [arch]} in term["matchExpressions"]
        assert pods[name]["runtimeClassName"] == "nvidia"
        assert {"name": "shm", "emptyDir": {"medium": "Memory"}} in pods[name]["volumes"]
        assert {"key": "nvidia.com/gpu", "operator": "Exists"} in pods[name]["tolerations"]
    (service,) = [each for each in objects if each["kind"] == "Service"]
    assert "octavo.dev/node-type" not in service["spec"]["selector"]


def test_cpu_pods_stay_off_gpu_nodes():
    pod = pod_of(rendered([cpu_node()]))["spec"]
    terms = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert {"key": "nvidia.com/gpu.product", "operator": "DoesNotExist"} in terms[0]["matchExpressions"]
    assert "tolerations" not in pod


def test_the_users_affinity_is_narrowed_term_by_term():
    zone = {"key": "zone", "operator": "In", "values": ["a"]}
    terms = [{"matchExpressions": [zone]}, {"matchExpressions": [{**zone, "values": ["b"]}]}]
    affinity = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}}
    pod = pod_of(rendered(scheduling={"affinity": affinity}))["spec"]
    required = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert [term["matchExpressions"][-1]["values"] for term in required] == [["a"], ["b"]]
    assert all(len(term["matchExpressions"]) == 3 for term in required)


def test_pod_template_is_merged_last_by_name_and_cannot_lose_the_pods():
    template = {
        "metadata": {"labels": {"team": "search", "octavo.dev/inference-service": "other"}},
        "spec": {
            "hostIPC": False,
            "containers": [
                {"name": "engine", "env": [{"name": "HF_HOME", "value": "/models"}],
                 "volumeMounts": [{"name": "models", "mountPath": "/models"}]},
                {"name": "sidecar", "image": "sidecar"},
            ],
            "volumes": [{"name": "models", "persistentVolumeClaim": {"claimName": "models"}}],
        },
    }  # fmt: skip
    objects = rendered(podTemplate=template)
    pod = pod_of(objects)
    assert pod["metadata"]["labels"]["team"] == "search"
    assert pod["metadata"]["labels"]["octavo.dev/inference-service"] == "llama"
    assert [each["name"] for each in pod["spec"]["containers"]] == ["engine", "sidecar"]
    engine = container_of(objects)
    assert [each["value"] for each in engine["env"] if each["name"] == "HF_HOME"] == ["/models"]
    assert engine["image"] == "octavo/engine:test"
    assert {"/models", "/etc/octavo"} <= {each["mountPath"] for each in engine["volumeMounts"]}
    assert {"models", "config"} <= {each["name"] for each in pod["spec"]["volumes"]}


def test_the_geometry_is_remembered_for_this_model_alone():
    config_maps = [each for each in rendered() if each["kind"] == "ConfigMap"]
    address = "hf://meta-llama/Llama-3.1-8B-Instruct"
    assert remembered_geometry(config_maps, address) == LLAMA_8B.geometry
    assert remembered_geometry(config_maps, "hf://other/model") is None
    unknown = [each for each in rendered(model=UNKNOWN) if each["kind"] == "ConfigMap"]
    assert remembered_geometry(unknown, address) is None
    broken = deepcopy(config_maps)
    broken[0]["metadata"]["annotations"]["octavo.dev/geometry"] = "{"
    assert remembered_geometry(broken, address) is None


def test_without_a_cluster_objects_name_no_owner():
    assert all("ownerReferences" not in each["metadata"] for each in rendered(owner=Owner(Key("default", "x"))))


LIVE = {"a": {"b": 1, "added": 2}, "list": [{"name": "x", "v": 1, "more": 3}, {"name": "y"}], "plain": [1, 2]}


@pytest.mark.parametrize(
    ("desired", "expected"),
    [
        ({"a": {"b": 1}}, False),
        ({"a": {"b": 2}}, True),
        ({"a": {"c": 1}}, True),
        ({"list": [{"name": "x", "v": 1}]}, False),
        ({"list": [{"name": "x", "v": 2}]}, True),
        ({"list": [{"name": "z"}]}, True),
        ({"plain": [1, 2]}, False),
        ({"plain": [1]}, True),
        ({"plain": [2, 1]}, True),
        ({"a": None}, True),
    ],
)
def test_differs_sees_our_fields_only(desired, expected):
    assert differs(desired, LIVE) is expected


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=12,
)
mappings = st.dictionaries(st.text(max_size=5), json_values, max_size=4)


@given(mappings, mappings)
def test_what_was_merged_in_does_not_differ(base, patch):
    merged = merge(base, patch)
    assert not differs(patch, merged)
    assert merge(merged, patch) == merged


def policies_of(objects):
    return {each["metadata"]["name"]: each["spec"] for each in objects if each["kind"] == "NetworkPolicy"}


def test_makes_network_policies_only_where_asked():
    assert not policies_of(rendered())
    assert not policies_of(rendered(security={}))
    (policy,) = policies_of(rendered(security={"networkPolicy": {}})).values()
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert policy["podSelector"]["matchLabels"]["octavo.dev/inference-service"] == "llama"
    assert policy["ingress"] == [{"ports": [{"port": "http", "protocol": "TCP"}]}]
    assert {port["port"] for rule in policy["egress"] for port in rule["ports"]} == {53, 80, 443}


def test_a_network_policy_lets_in_and_out_what_the_spec_says():
    gateway = {"namespaceSelector": {"matchLabels": {"team": "gateway"}}}
    storage = {"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}], "ports": [{"port": 9000, "protocol": "TCP"}]}
    asked = {"networkPolicy": {"ingressFrom": [gateway], "egress": [storage]}}
    (policy,) = policies_of(rendered(security=asked)).values()
    assert [each["from"] for each in policy["ingress"]] == [[gateway]]
    assert policy["egress"][1:] == [storage]
    (closed,) = policies_of(rendered(security={"networkPolicy": {"egress": []}})).values()
    assert {port["port"] for rule in closed["egress"] for port in rule["ports"]} == {53}


def test_the_pods_of_a_replica_over_nodes_reach_each_other():
    nodes = [h100_node("a", gpus=1), h100_node("b", gpus=1)]
    policies = policies_of(rendered(nodes, LLAMA_70B, security={"networkPolicy": {"egress": []}}))
    assert set(policies) == {"llama", "llama-workers"}
    workers = policies["llama-workers"]
    assert workers["podSelector"]["matchLabels"]["octavo.dev/worker-of"] == "llama"
    peers = [{"podSelector": each["podSelector"]} for each in policies.values()]
    assert workers["ingress"] == [{"from": peers}]
    for each in policies.values():
        assert each["ingress"][-1] == {"from": peers}
        assert each["egress"][-1] == {"to": peers}
