"""How the operator scales: `make bench-operator`.

A real API server on loopback, 200 nodes that run no processes, 1,000 InferenceServices. Measured: the first full
reconcile, what changed node labels cost, the operator's memory, and its writes as the API server's audit log has them.
Everything that is started ends with the command.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "cluster")]

from api_objects import ApiObjects  # noqa: E402
from audit import AuditLog  # noqa: E402
from control_plane import ControlPlane  # noqa: E402
from operator_harness import OperatorProcess, condition, inference_service  # noqa: E402
from process_node import NodeHost, NodeSpec  # noqa: E402

Manifest = dict[str, Any]

_NAMESPACE: Final = "bench"
_USER: Final = "octavo-operator"
_LIMIT_S: Final = 900.0
_QUIET_S: Final = 30.0
# Of a hundred nodes and of a hundred resources.
_NODES: Final = {"h100": 50, "l4": 40, "gh200": 10}
_TYPES: Final[dict[str, list[str] | None]] = {"h100": ["h100"], "l4": ["l4"], "any": None}
_SHARES: Final = {"h100": 30, "l4": 20, "any": 50}


@dataclass(frozen=True, slots=True)
class Product:
    """A node type as GPU feature discovery labels it."""

    name: str
    memory_mib: int
    compute: str
    num_gpus: int
    architecture: str = "amd64"

    def labels(self) -> dict[str, str]:
        """The labels of a node."""
        major, _, minor = self.compute.partition(".")
        return {
            "nvidia.com/gpu.product": self.name,
            "nvidia.com/gpu.memory": str(self.memory_mib),
            "nvidia.com/gpu.compute.major": major,
            "nvidia.com/gpu.compute.minor": minor,
            "nvidia.com/cuda.driver.major": "580",
        }


_PRODUCTS: Final = {
    "h100": Product("NVIDIA-H100-80GB-HBM3", 81_559, "9.0", 8),
    "l4": Product("NVIDIA-L4", 23_034, "8.9", 4),
    "gh200": Product("NVIDIA-GH200-480GB", 97_871, "9.0", 1, "arm64"),
}
_NEW_PRODUCT: Final = Product("NVIDIA-H200", 143_771, "9.0", 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--services", type=int, default=1000)
    parser.add_argument("--nodes", type=int, default=200)
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="octavo-bench-") as folder,
        ControlPlane(audits_writes=True) as plane,
        NodeHost(plane.node_kubeconfig, plane.state) as host,
    ):
        objects = ApiObjects(plane.kubeconfig)
        try:
            _measure(plane, host, objects, Path(folder) / "operator.log", options.services, options.nodes)
        finally:
            objects.close()


def _measure(
    plane: ControlPlane, host: NodeHost, objects: ApiObjects, log: Path, num_services: int, num_nodes: int
) -> None:
    nodes = _add_nodes(host, num_nodes)
    names = _apply_services(plane, objects, num_services)
    print(f"{num_services} resources, {num_nodes} nodes", flush=True)
    operator = OperatorProcess(plane.user_kubeconfig(_USER, "system:masters"), log, "--no-leader-election")
    audit = AuditLog(plane.audit_log, _USER)
    start_s = time.monotonic()
    with operator:
        planned_s = _wait(lambda: _all(objects, _is_planned), start_s)
        _report("every resource planned, its children made and its status written", planned_s, audit, num_services)
        serving_s = _wait(lambda: _all(objects, _serves), start_s)
        _report("every resource serves (with starting the pods)", serving_s, audit, num_services)
        time.sleep(_QUIET_S)
        audit.read()
        time.sleep(_QUIET_S)
        _report(f"{_QUIET_S:.0f} s in which nothing changes", _QUIET_S, audit, num_services)
        _relabel(objects, nodes["h100"][:10])
        start_s = time.monotonic()
        changed_s = _wait(lambda: _all(objects, _is_outdated, names["any"]), start_s)
        _report(f"ten nodes get another GPU: {len(names['any'])} resources say that their plan is outdated",
                changed_s, audit, len(names["any"]))  # fmt: skip
        print(f"memory, at the most: {operator.peak_memory_bytes() / 2**20:.0f} MiB", flush=True)


def _add_nodes(host: NodeHost, num_nodes: int) -> dict[str, list[str]]:
    names = {kind: [f"{kind}-{number}" for number in range(num_nodes * share // 100)] for kind, share in _NODES.items()}
    host.add(
        *(
            NodeSpec(
                name,
                labels=_PRODUCTS[kind].labels(),
                capacity={
                    "cpu": "128", "memory": "1Ti", "pods": "250",
                    "nvidia.com/gpu": str(_PRODUCTS[kind].num_gpus),
                },
                is_hollow=True,
                architecture=_PRODUCTS[kind].architecture,
                becomes_ready=lambda _pod: True,
            )
            for kind in names
            for name in names[kind]
        )
    )  # fmt: skip
    return names


def _apply_services(plane: ControlPlane, objects: ApiObjects, num_services: int) -> dict[str, list[str]]:
    command = [
        str(plane.kubectl),
        f"--kubeconfig={plane.kubeconfig}",
        "apply",
        "--server-side",
        "-f",
        str(ROOT / "crds"),
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    objects.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": _NAMESPACE}})
    _wait(lambda: objects.is_established("inferenceservices.octavo.dev"), time.monotonic())
    names: dict[str, list[str]] = {}
    for kind, share in _SHARES.items():
        names[kind] = [f"{kind}-{number:04}" for number in range(num_services * share // 100)]
        hardware = {"hardware": {"types": _TYPES[kind]}} if _TYPES[kind] else {}
        for name in names[kind]:
            objects.apply(inference_service(name, _NAMESPACE, **hardware))
    return names


def _relabel(objects: ApiObjects, nodes: Sequence[str]) -> None:
    for name in nodes:
        objects.merge("Node", name, {"metadata": {"labels": _NEW_PRODUCT.labels()}})


def _all(objects: ApiObjects, holds: Callable[[Manifest], bool], names: Sequence[str] | None = None) -> bool:
    found = objects.list("InferenceService", _NAMESPACE, api="octavo.dev/v1alpha1")
    wanted = None if names is None else set(names)
    return all(holds(each) for each in found if wanted is None or each["metadata"]["name"] in wanted)


def _is_planned(found: Manifest) -> bool:
    return bool((found.get("status") or {}).get("observedGeneration")) and bool(found["status"].get("plan"))


def _serves(found: Manifest) -> bool:
    return condition(found, "Ready").get("status") == "True"


def _is_outdated(found: Manifest) -> bool:
    return condition(found, "PlanOutdated").get("status") == "True"


def _wait(holds: Callable[[], bool], start_s: float) -> float:
    """Seconds from `start_s` until it holds. A list of a thousand objects is work for this process, too."""
    while not holds():
        if time.monotonic() - start_s > _LIMIT_S:
            raise SystemExit(f"not within {_LIMIT_S:.0f} s")
        time.sleep(1)
    return time.monotonic() - start_s


def _report(what: str, seconds: float, audit: AuditLog, num_resources: int) -> None:
    writes = audit.read()
    events = writes.pop("events", 0)
    total = sum(writes.values())
    detail = ", ".join(f"{count} {target}" for target, count in writes.most_common())
    print(
        f"{what}: {seconds:.1f} s; {total} writes ({total / num_resources:.2f} a resource: {detail or 'none'}), "
        f"{events} events",
        flush=True,
    )


if __name__ == "__main__":
    main()
