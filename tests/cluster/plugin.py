"""Fixtures that give tests a real Kubernetes. A test that uses one of them carries the mark `cluster`.

The control plane starts with the first test that asks for it and serves the whole session; a test keeps to its
own `namespace`, and to nodes of its own if it needs special ones.
"""

import itertools
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import binaries
import pytest
from api_objects import ApiObjects
from container import BackOff
from control_plane import ControlPlane
from forward import Forward
from kube_client import Manifest
from kubectl import Kubectl
from leader_worker_sets import LeaderWorkerSets
from process_node import NodeHost, NodeSpec
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

PROCESS_NODE = "process-0"


class HollowNodes(Protocol):
    """Registers `count` hollow nodes and returns their names."""

    def __call__(
        self,
        count: int = 1,
        *,
        labels: Mapping[str, str] | None = None,
        capacity: Mapping[str, str] | None = None,
        taints: Sequence[Mapping[str, str]] = (),
        architecture: str = "amd64",
        becomes_ready: Callable[[Manifest], bool] | None = None,
    ) -> list[str]: ...


class Forwarding(Protocol):
    """Forwards a free loopback port to a Service until the test ends."""

    def __call__(self, service: str, namespace: str, service_port: int | str | None = None) -> Forward: ...


# Modules that have a control plane of their own where tests run in parallel: a good third of the time of all that need
# one.
SECOND_CLUSTER = (
    "test_chart.py", "test_docs.py", "test_gitops.py", "test_hub.py", "test_inspection.py", "test_remote_models.py",
)  # fmt: skip
# What takes longest comes first, so that no process waits for another at the end.
FIRST_GROUPS = ("cluster", "tests/engine/test_core.py", "second cluster")


def group_of(nodeid: str) -> str:
    """What one process runs as a whole: a module, whose fixtures it sets up once, or all that share a control plane."""
    module = nodeid.partition("::")[0]
    if "/cluster/" not in module:
        return module
    return "second cluster" if module.endswith(SECOND_CLUSTER) else "cluster"


class GroupScheduling(LoadScopeScheduling):  # type: ignore[misc]
    """Gives each process whole groups, in the order of collection."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)

    def _reschedule(self, node: WorkerController) -> None:
        """Give a process groups until it has work: it begins a test when it knows of the next one, or of the end.

        After a crash there are groups with one test to run, or none, and nobody asks again for whoever was given one.
        """
        super()._reschedule(node)
        while not node.shutting_down and self._pending_of(self.assigned_work[node]) < 2:
            super()._reschedule(node)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cluster: runs against a real Kubernetes API server")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> GroupScheduling:
    config.option.loadscopereorder = False
    return GroupScheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "control_plane" in getattr(item, "fixturenames", ()):
            item.add_marker("cluster")
    ranks = {group: rank for rank, group in enumerate(FIRST_GROUPS)}
    items.sort(key=lambda item: ranks.get(group_of(item.nodeid), len(ranks)))


def pytest_runtestloop(session: pytest.Session) -> None:
    """Build what tests will ask for before the first one: where nothing is cached it takes longer than a test may."""
    wanted = {name for item in session.items for name in getattr(item, "fixturenames", ())}
    builds = [
        ("control_plane", binaries.control_plane_binaries),
        ("helm", binaries.helm_binary),
        ("leader_worker_sets", binaries.lws_folder),
    ]
    if session.config.option.collectonly:
        return
    with session.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        for fixture, build in builds:
            if fixture in wanted:
                build()


@pytest.fixture(scope="session")
def control_plane() -> Iterator[ControlPlane]:
    """etcd, API server, controller manager and scheduler; writes are audited."""
    with ControlPlane(programs=binaries.control_plane_binaries(), audits_writes=True) as running:
        yield running


@pytest.fixture(scope="session")
def kubeconfig(control_plane: ControlPlane) -> Path:
    """The administrator's kubeconfig."""
    return control_plane.kubeconfig


@pytest.fixture(scope="session")
def kubectl(control_plane: ControlPlane) -> Kubectl:
    return Kubectl(control_plane.kubectl, control_plane.kubeconfig)


@pytest.fixture(scope="session")
def objects(kubeconfig: Path) -> Iterator[ApiObjects]:
    """Objects of the API server as plain manifests."""
    api_objects = ApiObjects(kubeconfig)
    yield api_objects
    api_objects.close()


@pytest.fixture(scope="session")
def node_host(control_plane: ControlPlane) -> Iterator[NodeHost]:
    """Where the nodes run; `add` and `remove` take nodes of any kind."""
    with NodeHost(control_plane.node_kubeconfig, control_plane.state) as host:
        yield host


@pytest.fixture(scope="session")
def cluster(control_plane: ControlPlane, node_host: NodeHost) -> ControlPlane:
    """The control plane with one process node, on which pods really run."""
    node_host.add(NodeSpec(PROCESS_NODE, back_off=BackOff(base_s=1.0, limit_s=10.0)))
    return control_plane


@pytest.fixture
def namespace(objects: ApiObjects) -> Iterator[str]:
    """A namespace of the test's own. It is deleted afterwards, without waiting until it is gone."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    objects.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    yield name
    objects.delete("Namespace", name)


@pytest.fixture
def hollow_nodes(node_host: NodeHost, objects: ApiObjects) -> Iterator[HollowNodes]:
    """A factory of hollow nodes, which run no processes. They are gone when the test is over."""
    names: list[str] = []
    numbers = itertools.count()
    prefix = f"hollow-{uuid.uuid4().hex[:6]}"

    def make(
        count: int = 1,
        *,
        labels: Mapping[str, str] | None = None,
        capacity: Mapping[str, str] | None = None,
        taints: Sequence[Mapping[str, str]] = (),
        architecture: str = "amd64",
        becomes_ready: Callable[[Manifest], bool] | None = None,
    ) -> list[str]:
        specs = [
            NodeSpec(
                f"{prefix}-{next(numbers)}",
                labels=labels or {},
                capacity={"cpu": "64", "memory": "512Gi", "pods": "250"} | dict(capacity or {}),
                taints=taints,
                is_hollow=True,
                architecture=architecture,
                becomes_ready=becomes_ready or (lambda _pod: True),
            )
            for _ in range(count)
        ]
        node_host.add(*specs)
        made = [spec.name for spec in specs]
        names.extend(made)
        return made

    yield make
    node_host.remove(*names)
    for name in names:
        objects.delete("Node", name)


@pytest.fixture
def leader_worker_sets(control_plane: ControlPlane, objects: ApiObjects) -> Iterator[LeaderWorkerSets]:
    """To be installed by the test, which begins without them."""
    found = LeaderWorkerSets(control_plane, objects)
    yield found
    found.uninstall()


@pytest.fixture
def forwarding(kubeconfig: Path) -> Iterator[Forwarding]:
    """A factory of forwards to Services."""
    running: list[Forward] = []

    def forward(service: str, namespace: str, service_port: int | str | None = None) -> Forward:
        started = Forward(service, namespace, kubeconfig, service_port=service_port)
        started.start()
        running.append(started)
        return started

    yield forward
    for one in running:
        one.stop()


@pytest.fixture(scope="session")
def helm(pytestconfig: pytest.Config) -> Path:
    """The helm program; built first if the machine has none."""
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        return binaries.helm_binary()
