"""The NetworkPolicies of engine pods, where the spec asks for them. Pure."""

from octavo_operator.api import InferenceServiceSpec, NetworkPolicy
from octavo_operator.children import Owner, child_metadata, selector_labels, worker_labels
from octavo_operator.decision import Plan
from octavo_operator.observe import Manifest

_DNS: Manifest = {"ports": [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]}
_WEB: Manifest = {"ports": [{"port": 80, "protocol": "TCP"}, {"port": 443, "protocol": "TCP"}]}


def network_policies(owner: Owner, spec: InferenceServiceSpec, plan: Plan) -> list[Manifest]:
    """One for the pods that serve, and one for workers, where replicas have some; none unless asked for."""
    asked = spec.security.network_policy if spec.security else None
    if asked is None:
        return []
    leaders, workers = selector_labels(owner.key), worker_labels(owner.key)
    # Of one engine, and of others of this resource, which labels cannot tell apart.
    group = [{"podSelector": {"matchLabels": each}} for each in (leaders, workers)]
    is_spread = any(each.split.num_nodes > 1 for each in plan.variants)
    serving: Manifest = {"ports": [{"port": "http", "protocol": "TCP"}]}
    if asked.ingress_from is not None:
        serving["from"] = asked.ingress_from
    within = [{"from": group}] if is_spread else []
    egress = [_DNS, *_egress(asked), *([{"to": group}] if is_spread else [])]
    made = [_policy(owner, owner.key.name, leaders, [serving, *within], egress)]
    if is_spread:
        made.append(_policy(owner, f"{owner.key.name}-workers", workers, within, egress))
    return made


def _egress(asked: NetworkPolicy) -> list[Manifest]:
    return [_WEB] if asked.egress is None else asked.egress


def _policy(owner: Owner, name: str, pods: dict[str, str], ingress: list[Manifest], egress: list[Manifest]) -> Manifest:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": child_metadata(owner, name),
        "spec": {
            "podSelector": {"matchLabels": pods},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": ingress,
            "egress": egress,
        },
    }
