"""Everything that can be rendered, and the chart, is taken by the real API server."""

import pytest
import yaml
from api_objects import ApiObjects
from kubectl import Kubectl
from octavo_operator.children import Owner
from octavo_operator.observe import Key
from octavo_operator.plan import make_plan
from octavo_operator.render import render
from operator_samples import DEFAULTS, LLAMA_8B, UNKNOWN, Manifest, cpu_node, gh200_node, h100_node, l4_node, spec

SPECS: dict[str, tuple[object, dict[str, object]]] = {
    "smallest": (LLAMA_8B, {}),
    "geometry unknown": (UNKNOWN, {}),
    "cpu": (LLAMA_8B, {"hardware": {"types": ["cpu"]}}),
    "suspended": (LLAMA_8B, {"suspend": True}),
    "everything": (
        LLAMA_8B,
        {
            "model": {
                "uri": "hf://meta-llama/Llama-3.1-8B-Instruct", "revision": "main", "servedName": "llama",
                "secretRef": {"name": "huggingface"},
            },
            "hardware": {"types": ["h100", "gh200-96gb"], "exclude": ["l4"]},
            "engine": {
                "image": "engine:1", "dtype": "bfloat16", "kvCacheDtype": "float16", "quantization": "int8",
                "maxModelLen": 4096, "maxNumSeqs": 64, "maxNumBatchedTokens": 2048,
                "extraEnv": [{"name": "OCTAVO_LOG_LEVEL", "value": "debug"}],
            },
            "scaling": {"replicas": 3},
            "rollout": {"strategy": "Surge", "progressDeadlineSeconds": 900},
            "scheduling": {
                "tolerations": [{"key": "team", "operator": "Equal", "value": "a", "effect": "NoExecute",
                                 "tolerationSeconds": 60}],
                "affinity": {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [
                    {"weight": 1, "preference": {"matchExpressions": [{"key": "a", "operator": "Exists"}]}}]}},
                "topologySpread": [{"topologyKey": "zone", "maxSkew": 1, "whenUnsatisfiable": "ScheduleAnyway"}],
                "priorityClassName": "high", "runtimeClassName": "nvidia",
            },
            "podTemplate": {"metadata": {"annotations": {"a": "b"}}, "spec": {"hostname": "x"}},
        },
    ),
}  # fmt: skip


def objects_of(case: str, namespace: str) -> list[Manifest]:
    model, fields = SPECS[case]
    nodes = [cpu_node(), l4_node(), h100_node(), gh200_node()]
    return render(Owner(Key(namespace, "llama")), spec(**fields), make_plan(spec(**fields), nodes, model, DEFAULTS))


@pytest.mark.parametrize("case", SPECS)
def test_rendered_objects_pass_a_strict_dry_run(kubectl: Kubectl, namespace: str, case: str) -> None:
    manifests = objects_of(case, namespace)
    assert manifests
    said = kubectl("apply", "--server-side", "--dry-run=server", "--validate=strict", "-f", "-", manifests=manifests)
    assert said.count("serverside-applied (server dry run)") == len(manifests)


@pytest.mark.parametrize("case", SPECS)
def test_the_api_server_accepts_the_spec_and_keeps_it_as_it_is(
    crd: str, objects: ApiObjects, namespace: str, case: str
) -> None:
    _, fields = SPECS[case]
    sent = {"model": {"uri": "hf://meta-llama/Llama-3.1-8B-Instruct"}, **fields}
    manifest = {
        "apiVersion": "octavo.dev/v1alpha1", "kind": "InferenceService",
        "metadata": {"name": "kept", "namespace": namespace}, "spec": sent,
    }  # fmt: skip
    assert objects.apply(manifest)["spec"] == yaml.safe_load(yaml.safe_dump(sent))
