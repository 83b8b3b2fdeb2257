"""What the operator tells Prometheus. One registry per process object, so that tests do not share counters."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class Metrics:
    """All metrics of one operator."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.reconciles = Counter(
            "octavo_operator_reconciles",
            "Passes over one resource, by result.",
            ["result"],
            registry=self.registry,
        )
        self.duration = Histogram(
            "octavo_operator_reconcile_duration_seconds",
            "Time of one pass over one resource.",
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
            registry=self.registry,
        )
        self.writes = Counter(
            "octavo_operator_writes",
            "Writes to the API server, by verb and kind.",
            ["verb", "kind"],
            registry=self.registry,
        )
        self.is_leader = Gauge("octavo_operator_leader", "1 while this replica acts.", registry=self.registry)
        self.missed = Counter(
            "octavo_operator_missed_changes",
            "Objects that a periodic list showed and no watch had told of.",
            ["kind"],
            registry=self.registry,
        )
        self.queue_depth = Gauge(
            "octavo_operator_queue_depth", "Resources that wait for a worker.", registry=self.registry
        )
        self.resources = Gauge("octavo_operator_resources", "InferenceServices known.", registry=self.registry)
        self.nodes = Gauge(
            "octavo_operator_nodes",
            "Nodes by the row of the hardware table that they are planned with, and by how that row was found.",
            ["hardware", "found_by"],
            registry=self.registry,
        )
        for result in ("success", "error"):
            self.reconciles.labels(result)

    def follow(self, queue_depth: Callable[[], int], resources: Callable[[], int]) -> None:
        """Read these values whenever somebody asks for the metrics."""
        self.queue_depth.set_function(queue_depth)
        self.resources.set_function(resources)
