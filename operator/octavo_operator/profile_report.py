"""HardwareProfiles and their nodes: the statuses of profiles, and the metric that says how nodes were recognised."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence

from octavo_operator.api import API_VERSION
from octavo_operator.apiserver import HARDWARE_PROFILE, ApiServer
from octavo_operator.metrics import Metrics
from octavo_operator.objectstore import ObjectStore
from octavo_operator.observe import ObservedNode
from octavo_operator.offers import find_offers
from octavo_operator.profile_api import PROFILE_KIND, HardwareProfileStatus
from octavo_operator.profiles import HardwareTable, ProfileVerdict
from octavo_operator.status_api import Condition

logger = logging.getLogger(__name__)


class ProfileReporter:
    """Writes the statuses that differ from what is there, all profiles in one pass."""

    def __init__(self, api: ApiServer, store: ObjectStore, metrics: Metrics, now: Callable[[], str]) -> None:
        self._api = api
        self._store = store
        self._metrics = metrics
        self._now = now

    async def report(self) -> None:
        """One pass. Raises what the API server's requests raise."""
        table, verdicts = self._store.profiles()
        nodes = count_nodes(self._store.nodes(), table)
        self._metrics.nodes.clear()
        for (name, how), number in nodes.items():
            self._metrics.nodes.labels(name, how).set(number)
        for verdict in verdicts:
            await self._report(verdict, sum(number for (name, _), number in nodes.items() if name == verdict.name))

    async def _report(self, verdict: ProfileVerdict, num_nodes: int) -> None:
        profile = self._store.profile(verdict.name)
        if profile is None or "deletionTimestamp" in profile["metadata"]:
            return
        metadata = profile["metadata"]
        previous = profile.get("status") or {}
        known = previous.get("conditions") or []
        times = {each["type"]: (each["status"], each["lastTransitionTime"]) for each in known}
        generation = metadata.get("generation", 0)
        conditions = profile_conditions(verdict, num_nodes, generation, times, self._now())
        status = HardwareProfileStatus(observed_generation=generation, conditions=conditions, nodes=num_nodes)
        manifest = status.model_dump(mode="json", by_alias=True)
        if manifest == previous:
            return
        answer = await self._api.apply_status(
            {
                "apiVersion": API_VERSION,
                "kind": PROFILE_KIND,
                "metadata": {"name": verdict.name, "uid": metadata["uid"]},
                "status": manifest,
            }
        )
        self._metrics.writes.labels("status", PROFILE_KIND).inc()
        if answer is not None:
            self._store.put(HARDWARE_PROFILE, answer)
        if verdict.problem:
            logger.warning("hardwareProfile=%s is not used: %s", verdict.name, verdict.problem)


def count_nodes(nodes: Sequence[ObservedNode], table: HardwareTable) -> Counter[tuple[str, str]]:
    """(Name of a row, how it was found) -> nodes with such devices, or with devices that are like them."""
    counts: Counter[tuple[str, str]] = Counter()
    for node in nodes:
        offers = find_offers(node, table)
        counts.update({(each.match.hardware.name, each.match.how) for each in offers})
    return counts


def profile_conditions(
    verdict: ProfileVerdict, num_nodes: int, generation: int, times: dict[str, tuple[str, str]], now: str
) -> list[Condition]:
    """Ready and Stalled, as kstatus reads them.

    times: type of condition -> the status that it had, and since when
    """
    reason = verdict.reason or "InUse"
    message = verdict.problem or f"{num_nodes} nodes are recognised by it"
    conditions = []
    for name, is_true in (("Ready", not verdict.problem), ("Stalled", bool(verdict.problem))):
        status = "True" if is_true else "False"
        old_status, since = times.get(name, ("", now))
        conditions.append(
            Condition.model_validate(
                {
                    "type": name,
                    "status": status,
                    "observed_generation": generation,
                    "last_transition_time": since if old_status == status else now,
                    "reason": reason,
                    "message": message,
                }
            )
        )
    return conditions
