"""`octavo operator`: the flags, and nothing else."""

import logging
import signal
import sys
from importlib.metadata import version
from pathlib import Path

import click
from octavo_engine.geometry import Geometry

DEFAULT_LEASE = "octavo-operator"


def default_engine_image() -> str:
    """The engine of this operator's own version."""
    return f"octavo/engine:{version('octavo')}"


def resolve_geometry(address: str) -> Geometry:
    """The engine's resolver, imported when it is first needed."""
    from octavo_engine import model_source

    return model_source.resolve_geometry(address)


@click.command()
@click.option(
    "--namespace",
    envvar="OCTAVO_OPERATOR_NAMESPACE",
    help="Serve this namespace only.  [default: all namespaces]",
)
@click.option("--all-namespaces", is_flag=True, help="Serve all namespaces, which is the default.")
@click.option(
    "--kubeconfig",
    envvar="KUBECONFIG",
    type=click.Path(path_type=Path),
    help="How to reach the API server.  [default: the pod's service account, else ~/.kube/config]",
)
@click.option(
    "--nodes",
    "nodes_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Plan with the Nodes of this file, the output of `kubectl get nodes -o yaml`, read anew at each resync.  "
    "[default: those of the API server, which takes the right to read them]",
)
@click.option(
    "--engine-image",
    envvar="OCTAVO_OPERATOR_ENGINE_IMAGE",
    default=default_engine_image,
    show_default="octavo/engine:VERSION",
    help="Image of the engine where a resource names none; multi-architecture.",
)
@click.option(
    "--host",
    envvar="OCTAVO_OPERATOR_HOST",
    default="0.0.0.0",
    show_default=True,
    help="Address of /healthz, /readyz and /metrics; :: where pods have IPv6 addresses only.",
)
@click.option("--port", default=8080, show_default=True, type=click.IntRange(0, 65535), help="Their port.")
@click.option(
    "--leader-election/--no-leader-election",
    default=True,
    show_default=True,
    help="Act only while holding a Lease, so that several replicas may run.",
)
@click.option(
    "--lease-namespace",
    envvar="POD_NAMESPACE",
    help="Namespace of the Lease.  [default: --namespace, else default]",
)
@click.option("--lease-name", default=DEFAULT_LEASE, show_default=True, help="Name of the Lease.")
@click.option(
    "--lease-seconds",
    default=15.0,
    show_default=True,
    type=click.FloatRange(min=3),
    help="How long a Lease holds that nobody renews: the longest time in which nobody acts after a crash.",
)
@click.option(
    "--resync-seconds",
    default=300.0,
    show_default=True,
    type=click.FloatRange(min=1),
    help="How often everything is listed and looked at again, beside the watches.",
)
@click.option("--workers", default=8, show_default=True, type=click.IntRange(1, 64), help="Passes at once.")
@click.option(
    "--log-level", default="info", show_default=True, type=click.Choice(["debug", "info", "warning", "error"])
)
def operator(
    namespace: str | None,
    all_namespaces: bool,
    kubeconfig: Path | None,
    nodes_file: Path | None,
    engine_image: str,
    host: str,
    port: int,
    leader_election: bool,
    lease_namespace: str | None,
    lease_name: str,
    lease_seconds: float,
    resync_seconds: float,
    workers: int,
    log_level: str,
) -> None:
    """Run the Kubernetes operator: reconcile InferenceServices into engine pods."""
    # The first process of a container ignores signals that it does not handle, and what follows takes a second.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    if namespace and all_namespaces:
        raise click.UsageError("--namespace and --all-namespaces exclude each other")
    configure_logging(log_level)
    from octavo_operator.controller import OperatorSettings, run_operator
    from octavo_operator.decision import Defaults
    from octavo_operator.documents import node_manifests, read_documents
    from octavo_operator.election import LeaseTimes
    from octavo_operator.observe import Key

    if nodes_file:
        # What is wrong at the start ends it; what becomes wrong later is logged, and what was read before holds.
        node_manifests(read_documents(nodes_file))
    lease = Key(lease_namespace or namespace or "default", lease_name)
    # In the proportions of Kubernetes' own controllers: 15, 10 and 2 seconds.
    times = LeaseTimes(lease_seconds, lease_seconds * 2 / 3, lease_seconds * 2 / 15)
    settings = OperatorSettings(
        defaults=Defaults(engine_image=engine_image),
        kubeconfig=kubeconfig,
        namespace=namespace,
        lease=lease if leader_election else None,
        lease_times=times,
        host=host,
        port=port,
        resync_s=resync_seconds,
        num_workers=workers,
        nodes_file=nodes_file,
    )
    run_operator(settings, resolve_geometry)


def configure_logging(level: str) -> None:
    """One line per event on stderr. Kopf tells of each event it hands on, which is ours to tell where it matters."""
    logging.basicConfig(
        level=level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s", datefmt="%Y-%m-%dT%H:%M:%S"
    )
    if level != "debug":
        logging.getLogger("kopf").setLevel(logging.WARNING)
