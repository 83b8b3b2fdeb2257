"""What is known only ever gets newer, whatever order lists, watches and answers come in."""

from octavo_operator.apiserver import DEPLOYMENT, INFERENCE_SERVICE, LEADER_WORKER_SET, POD
from octavo_operator.objectstore import ObjectStore
from octavo_operator.observe import Key
from operator_samples import node_manifest

OWNER = Key("ns", "llama")


def deployment(version, name="llama-cpu", uid="d", **labels):
    own = {"octavo.dev/inference-service": "llama", "octavo.dev/node-type": "cpu", **labels}
    return {
        "metadata": {
            "name": name, "namespace": "ns", "uid": uid, "resourceVersion": str(version), "generation": 1,
            "labels": own,
        },
        "spec": {"replicas": 2},
        "status": {"readyReplicas": 1, "observedGeneration": 1},
    }  # fmt: skip


def version(store):
    found = store.child(OWNER, DEPLOYMENT, "llama-cpu")
    return found and int(found["metadata"]["resourceVersion"])


def test_an_older_event_does_not_replace_a_newer_answer():
    store = ObjectStore()
    assert store.put(DEPLOYMENT, deployment(9))
    assert not store.put(DEPLOYMENT, deployment(10 - 2))
    assert store.put(DEPLOYMENT, deployment(10))
    assert version(store) == 10


def test_a_list_does_not_bring_back_what_was_deleted_meanwhile():
    store = ObjectStore()
    store.put(DEPLOYMENT, deployment(5))
    store.remove(DEPLOYMENT, deployment(7))
    assert store.replace(DEPLOYMENT, [deployment(5)], 6) == []
    assert version(store) is None
    assert store.put(DEPLOYMENT, deployment(8, uid="another"))


def test_a_list_does_not_drop_what_was_made_after_it():
    store = ObjectStore()
    store.put(DEPLOYMENT, deployment(9))
    assert store.replace(DEPLOYMENT, [], 8) == []
    assert version(store) == 9
    (vanished,) = store.replace(DEPLOYMENT, [], 9)
    assert vanished["metadata"]["name"] == "llama-cpu"
    assert version(store) is None


def test_a_list_tells_what_the_watch_did_not():
    store = ObjectStore()
    store.put(DEPLOYMENT, deployment(1))
    unseen = store.replace(DEPLOYMENT, [deployment(1), deployment(3, "llama-l4", "e")], 4)
    assert [each["metadata"]["name"] for each in unseen] == ["llama-l4"]


def test_other_resources_engines_take_places_once_they_serve():
    def pod(version, name, owner, status):
        labels = {"octavo.dev/inference-service": owner, "octavo.dev/node-type": "cpu"}
        metadata = {"name": name, "namespace": "ns", "uid": name, "resourceVersion": str(version), "labels": labels}
        return {"metadata": metadata, "spec": {"nodeName": "n"}, "status": {"conditions": [
            {"type": "Ready", "status": status}]}}  # fmt: skip

    store = ObjectStore()
    for version, each in enumerate([("a", "other", "True"), ("b", "other", "False"), ("c", OWNER.name, "True")]):
        store.put(POD, pod(version, *each))
    assert store.running(OWNER, "").num_taken == {("n", "cpu"): 1}


def test_running_sums_over_all_resources():
    store = ObjectStore()
    store.put(DEPLOYMENT, deployment(1))
    store.put(DEPLOYMENT, deployment(2, "other-cpu", "e", **{"octavo.dev/inference-service": "other"}))
    running = store.running(OWNER, "")
    assert running.node_types == running.serving == frozenset({"cpu"})
    assert running.num_in_use == {"cpu": 4}


def test_a_pod_with_several_gpus_takes_all_of_them_and_a_group_those_of_its_nodes():
    labels = {"octavo.dev/inference-service": "other", "octavo.dev/node-type": "h100"}
    metadata = {"namespace": "ns", "labels": labels, "annotations": {"octavo.dev/gpus": "4"}}
    ready = {"conditions": [{"type": "Ready", "status": "True"}]}
    pod = {"metadata": {**metadata, "name": "a", "uid": "a", "resourceVersion": "1"}, "spec": {"nodeName": "n"},
           "status": ready}  # fmt: skip
    worker_labels = {"octavo.dev/worker-of": "other", "octavo.dev/node-type": "h100"}
    worker = {**pod, "metadata": {**pod["metadata"], "name": "b", "uid": "b", "labels": worker_labels}}
    template = {"metadata": {"annotations": {"octavo.dev/gpus": "4"}}}
    groups = {
        "metadata": {"name": "g", "namespace": "ns", "uid": "g", "resourceVersion": "2", "labels": labels},
        "spec": {"replicas": 3, "leaderWorkerTemplate": {"size": 2, "leaderTemplate": template}},
    }
    store = ObjectStore()
    for kind, each in ((POD, pod), (POD, worker), (LEADER_WORKER_SET, groups)):
        store.put(kind, each)
    running = store.running(OWNER, "")
    assert running.num_taken == {("n", "h100"): 8}
    assert running.num_in_use == {"h100": 24}


def test_a_heartbeat_of_a_node_is_no_change():
    def seen(resource_version, **settings):
        manifest = node_manifest("n", **settings)
        manifest["metadata"]["resourceVersion"] = str(resource_version)
        return manifest

    store = ObjectStore()
    assert store.put_node(seen(1))
    assert not store.put_node(seen(2))
    assert store.put_node(seen(3, ready="False"))
    assert not store.put_node(seen(2))
    assert store.replace_nodes([], 3)
    assert store.nodes() == []


def test_resources_are_found_by_key():
    store = ObjectStore()
    resource = {"metadata": {"name": "llama", "namespace": "ns", "uid": "u", "resourceVersion": "1"}}
    store.put(INFERENCE_SERVICE, resource)
    assert store.resource_keys() == [OWNER]
    store.remove(INFERENCE_SERVICE, resource)
    assert store.resource(OWNER) is None
