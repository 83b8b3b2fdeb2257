"""The operator's roles give what its code asks the API server for, and nothing else."""

from collections.abc import Callable
from typing import Any

import pytest
from octavo_operator.apiserver import (
    CHILD_KINDS,
    EVENT,
    HARDWARE_PROFILE,
    INFERENCE_SERVICE,
    JOB,
    KINDS,
    LEASE,
    NODE,
    POD,
    RESOURCE_SLICE,
    Kind,
)

Manifest = dict[str, Any]
Render = Callable[..., list[Manifest]]
Rights = set[tuple[str, str, str]]

READ = {"get", "list", "watch"}
NEEDED = {
    INFERENCE_SERVICE: READ,
    POD: READ,
    NODE: READ,
    RESOURCE_SLICE: READ,
    HARDWARE_PROFILE: READ,
    JOB: {"get", "create", "patch"},
    EVENT: {"create"},
    LEASE: {"create", "get", "update"},
    **{kind: READ | {"create", "patch", "delete"} for kind in CHILD_KINDS},
}
# Statuses are applied; blockOwnerDeletion asks for the owner's finalizers.
SUBRESOURCES = {
    (INFERENCE_SERVICE.group, "inferenceservices/status"): {"get", "patch"},
    (INFERENCE_SERVICE.group, "inferenceservices/finalizers"): {"update"},
    (HARDWARE_PROFILE.group, "hardwareprofiles/status"): {"get", "patch"},
}


def needed(kinds: dict[Kind, set[str]]) -> Rights:
    return {(kind.group, kind.plural, verb) for kind, verbs in kinds.items() for verb in verbs}


def of_operator(manifests: list[Manifest], *kinds: str) -> Rights:
    """(API group, resource, verb) of the roles that are bound to the operator."""
    bindings = [each for each in manifests if each["kind"] in ("RoleBinding", "ClusterRoleBinding")]
    bound = {(each["roleRef"]["kind"], each["roleRef"]["name"]) for each in bindings}
    return {
        (group, resource, verb)
        for each in manifests
        if each["kind"] in kinds and (each["kind"], each["metadata"]["name"]) in bound
        for rule in each["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def test_every_kind_that_the_operator_knows_has_its_rights_listed_here() -> None:
    assert {kind.name for kind in NEEDED} == set(KINDS)


@pytest.mark.parametrize("watched", ["", "team-a"], ids=["all namespaces", "one namespace"])
def test_the_roles_give_exactly_what_is_needed(render: Render, watched: str) -> None:
    manifests = render(f"watchNamespace={watched}")
    given = of_operator(manifests, "Role", "ClusterRole")
    extra = {(group, name, verb) for (group, name), verbs in SUBRESOURCES.items() for verb in verbs}
    assert given == needed(NEEDED) | extra


def test_for_one_namespace_only_what_belongs_to_the_cluster_is_in_a_cluster_role(render: Render) -> None:
    given = of_operator(render("watchNamespace=team-a"), "ClusterRole")
    own = {kind.plural for kind in KINDS.values() if not kind.is_namespaced}
    assert {resource.partition("/")[0] for _, resource, _ in given} == own


def test_bindings_name_the_account_that_the_pod_runs_as(render: Render) -> None:
    for settings in ((), ("serviceAccount.create=false", "serviceAccount.name=mine")):
        manifests = render(*settings)
        (deployment,) = [each for each in manifests if each["kind"] == "Deployment"]
        account = deployment["spec"]["template"]["spec"]["serviceAccountName"]
        bindings = [each for each in manifests if each["kind"].endswith("Binding")]
        assert len(bindings) == 3
        for each in bindings:
            assert each["subjects"] == [{"kind": "ServiceAccount", "name": account, "namespace": "octavo-system"}]
