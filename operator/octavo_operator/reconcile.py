"""One pass over one resource: observe -> plan -> apply -> report, the whole of it on every trigger.

Nothing is remembered between two passes but what can be observed, and each step can be repeated, so a pass may end
anywhere: the next one continues from what is there.
"""

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pydantic import ValidationError

from octavo_operator.api import API_VERSION, KIND, InferenceService
from octavo_operator.apiserver import (
    CHILD_KINDS,
    CONFIG_MAP,
    INFERENCE_SERVICE,
    KINDS,
    LEADER_WORKER_SET,
    POD,
    SERVICE,
    WORKLOAD_KINDS,
    ApiServer,
    Kind,
)
from octavo_operator.children import Owner
from octavo_operator.conditions import Failure, invalid_spec_conditions, make_conditions, seconds_to_deadline
from octavo_operator.decision import Defaults, Plan, workload_kind
from octavo_operator.errors import ApiError, NameConflictError, explain_validation
from octavo_operator.events import EventWriter
from octavo_operator.inspector import Inspector, ModelReader
from octavo_operator.merge import differs
from octavo_operator.metrics import Metrics
from octavo_operator.modelgeometry import GeometryReader
from octavo_operator.objectstore import ObjectStore
from octavo_operator.observe import (
    NODE_TYPE_LABEL,
    SERVICE_LABEL,
    Key,
    Manifest,
    ModelGeometry,
    WorkloadState,
    key_of,
    observe_pod,
    observe_workload,
)
from octavo_operator.plan import make_plan, wanted_replicas
from octavo_operator.profile_api import PROFILE_PLURAL
from octavo_operator.profile_report import ProfileReporter
from octavo_operator.render import MANIFEST_HASH, render
from octavo_operator.report import make_status
from octavo_operator.running import spec_hash
from octavo_operator.status_api import Condition, InferenceServiceStatus

logger = logging.getLogger(__name__)

# Stands for all HardwareProfiles on the queue: no resource has an empty namespace.
PROFILES = Key("", PROFILE_PLURAL)


def utc_now() -> datetime:
    """The clock of a running operator."""
    return datetime.now(UTC)


@dataclass(frozen=True)
class Pass:
    """What one pass knows of its resource; `previous` is the status that the resource has."""

    key: Key
    uid: str
    generation: int
    manifest: Manifest
    previous: Manifest

    @property
    def annotations(self) -> dict[str, str]:
        """The resource's own annotations."""
        return self.manifest["metadata"].get("annotations") or {}

    @property
    def conditions(self) -> list[Condition]:
        """The conditions as they were; those that do not read are no conditions of ours."""
        found = []
        for each in self.previous.get("conditions") or []:
            try:
                found.append(Condition.model_validate(each))
            except ValidationError:
                logger.debug("condition=%s resource=%s is not one of ours", each, self.key)
        return found


class Reconciler:
    """Does passes. Several may run at once, for different resources.

    kinds: that the cluster has at the moment, and lets the operator use
    """

    def __init__(
        self,
        api: ApiServer,
        store: ObjectStore,
        geometry: GeometryReader,
        defaults: Defaults,
        metrics: Metrics,
        kinds: Callable[[], Collection[Kind]],
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self._api = api
        self._store = store
        self._models = ModelReader(geometry, Inspector(api, defaults.engine_image))
        self._defaults = defaults
        self._metrics = metrics
        self._kinds = kinds
        self._clock = clock
        self._events = EventWriter(api, clock)
        self._profiles = ProfileReporter(api, store, metrics, self._now)

    async def reconcile(self, key: Key) -> float | None:
        """Make the cluster be what the resource asks for, as far as one pass can.

        Returns seconds after which to look again even if nothing happens, or None.
        Raises ApiError and `apiserver.UNREACHABLE` where the pass has to be repeated soon.
        """
        if key == PROFILES:
            await self._profiles.report()
            return None
        manifest = self._store.resource(key)
        if manifest is None:
            await self._collect(key)
            return None
        if "deletionTimestamp" in manifest["metadata"]:
            # Somebody's finalizer keeps it for a while. Making children again would be in the way of their deletion.
            return None
        metadata = manifest["metadata"]
        current = Pass(key, metadata["uid"], metadata.get("generation", 0), manifest, manifest.get("status") or {})
        try:
            service = InferenceService.model_validate(manifest)
        except ValidationError as error:
            await self._report_invalid(current, explain_validation(error))
            return None
        return await self._reconcile(current, service)

    async def _collect(self, key: Key) -> None:
        """Delete the children of a resource that is gone.

        The garbage collector does the same, with the operator or without it, but it learns of a new CRD only every
        half minute. Children that were orphaned on purpose name no owner any more, and stay.
        """
        children = [(kind, each) for kind in reversed(CHILD_KINDS) for each in self._store.children(key, kind)]
        if not children:
            return
        live = await self._api.get(INFERENCE_SERVICE, key)
        for kind, child in children:
            owners = child["metadata"].get("ownerReferences") or []
            is_orphan = not any(each["kind"] == KIND for each in owners)
            is_owned = live is not None and any(each["uid"] == live["metadata"]["uid"] for each in owners)
            if not is_orphan and not is_owned and "deletionTimestamp" not in child["metadata"]:
                await self._api.delete(kind, key_of(child), child["metadata"]["uid"])
                self._metrics.writes.labels("delete", kind.name).inc()

    async def _reconcile(self, current: Pass, service: InferenceService) -> float | None:
        owner = Owner(current.key, current.uid, current.annotations)
        config_maps = self._store.children(current.key, CONFIG_MAP)
        model, look_again_s = await self._models.read(owner, service.spec, config_maps)
        plan = self._plan(current, service, model)
        if model.reason == "Inspecting":
            # What runs is left as it is until the answer comes.
            await self._report(current, service, plan, Failure("Inspecting", model.problem, is_final=False))
            return look_again_s
        desired = [] if service.spec.plan_only else render(owner, service.spec, plan)
        failure: Failure | None = None
        problem: Exception | None = None
        try:
            await self._apply(current, desired)
            await self._prune(current, service, plan, desired)
        except NameConflictError as error:
            failure = Failure("NameConflict", str(error), is_final=True)
        except ApiError as error:
            failure = Failure("RejectedByApiServer" if error.is_final else "ApplyFailed", str(error), error.is_final)
            problem = None if error.is_final else error
        deadline_s = await self._report(current, service, plan, failure)
        if problem is not None:
            raise problem
        return min((each for each in (look_again_s, deadline_s) if each is not None), default=None)

    def _plan(self, current: Pass, service: InferenceService, model: ModelGeometry) -> Plan:
        running = self._store.running(current.key, spec_hash(service.spec, current.annotations))
        table, _ = self._store.profiles()
        has_leader_worker_sets = LEADER_WORKER_SET in self._kinds()
        nodes = self._store.nodes()
        return make_plan(
            service.spec, nodes, model, self._defaults, running, table, has_leader_worker_sets=has_leader_worker_sets
        )

    async def _apply(self, current: Pass, desired: Sequence[Manifest]) -> None:
        """Write those objects that are missing or that are not as they should be."""
        created: list[str] = []
        updated: list[str] = []
        try:
            for manifest in desired:
                kind = KINDS[manifest["kind"]]
                name = manifest["metadata"]["name"]
                live = self._store.child(current.key, kind, name) or await self._foreign(current, kind, name)
                if live is not None and not needs_apply(manifest, live):
                    continue
                answer = await self._api.apply(manifest)
                self._metrics.writes.labels("apply", kind.name).inc()
                is_changed = self._store.put(kind, answer)
                if live is None:
                    created.append(f"{kind.name} {name}")
                elif is_changed:
                    # Not so where only the spelling differs: a user's podTemplate may say 1000m for 1.
                    updated.append(f"{kind.name} {name}")
        finally:
            for reason, names in (("Created", created), ("Updated", updated)):
                if names:
                    await self._tell(current, reason, ", ".join(names))

    async def _foreign(self, current: Pass, kind: Kind, name: str) -> Manifest | None:
        """An object that has a child's name and is not known as a child: ours after all, nobody's, or a conflict."""
        found = await self._api.get(kind, Key(current.key.namespace, name))
        if found is None:
            return None
        owners = [each.get("uid") for each in found["metadata"].get("ownerReferences") or []]
        if current.uid in owners or (not owners and found["metadata"].get("labels", {}).get(SERVICE_LABEL)):
            return found
        raise NameConflictError(
            f"{kind.name} {name} exists already and does not belong to this InferenceService: "
            "delete it, or give the InferenceService another name"
        )

    async def _prune(self, current: Pass, service: InferenceService, plan: Plan, desired: Sequence[Manifest]) -> None:
        """Delete what is ours and no longer wanted."""
        wanted = {(each["kind"], each["metadata"]["name"]) for each in desired}
        if not service.spec.plan_only and wanted_replicas(service.spec):
            wanted |= self._still_serving(current.key, plan)
        deleted = []
        # What makes pods goes first: they use the rest.
        for kind in reversed(CHILD_KINDS):
            for live in self._store.children(current.key, kind):
                metadata = live["metadata"]
                owners = [each.get("uid") for each in metadata.get("ownerReferences") or []]
                if (kind.name, metadata["name"]) in wanted or current.uid not in owners:
                    continue
                if "deletionTimestamp" in metadata:
                    continue
                await self._api.delete(kind, key_of(live), metadata["uid"])
                self._metrics.writes.labels("delete", kind.name).inc()
                deleted.append(f"{kind.name} {metadata['name']}")
        if deleted:
            await self._tell(current, "Deleted", ", ".join(deleted))

    def _still_serving(self, key: Key, plan: Plan) -> set[tuple[str, str]]:
        """Objects of variants that are to go but answer requests, while those that replace them do not yet."""
        states = {(state.kind, state.node_type): state for state in self._workloads(key)}
        planned = {(workload_kind(each), each.node_type.name): each.replicas for each in plan.variants}
        is_replaced = bool(planned) and all(
            each in states and states[each].available >= replicas for each, replicas in planned.items()
        )
        if is_replaced:
            return set()
        # On a node type that is planned they would hold the devices that what replaces them waits for.
        kept = [
            state for state in states.values() if state.ready and state.node_type not in {name for _, name in planned}
        ]
        # What they use: objects of their node types, and those of none.
        used = {state.node_type for state in kept} | {None}
        return {(state.kind, state.name) for state in kept} | {
            (kind.name, each["metadata"]["name"])
            for kind in (set(CHILD_KINDS) - set(WORKLOAD_KINDS) if kept else ())
            for each in self._store.children(key, kind)
            if each["metadata"]["labels"].get(NODE_TYPE_LABEL) in used
        }

    def _workloads(self, key: Key) -> list[WorkloadState]:
        """What makes pods, without what is being deleted."""
        pods = self._store.children(key, POD)
        found = [each for kind in WORKLOAD_KINDS for each in self._store.children(key, kind)]
        return [observe_workload(each, pods) for each in found if "deletionTimestamp" not in each["metadata"]]

    async def _report_invalid(self, current: Pass, message: str) -> None:
        states = self._workloads(current.key)
        conditions = invalid_spec_conditions(message, current.generation, current.conditions, self._now())
        has_service = self._store.child(current.key, SERVICE, current.key.name) is not None
        status = make_status(current.key, current.generation, None, states, conditions, has_service=has_service)
        await self._write_status(current, status)

    async def _report(
        self, current: Pass, service: InferenceService, plan: Plan, failure: Failure | None
    ) -> float | None:
        """Write the status. Returns seconds after which it will be another one, even if nothing happens."""
        states, now = self._workloads(current.key), self._now()
        pods = [observe_pod(each) for each in self._store.children(current.key, POD)]
        conditions = make_conditions(
            service.spec, plan, states, pods, failure, current.generation, current.conditions, now
        )
        has_service = self._store.child(current.key, SERVICE, current.key.name) is not None
        status = make_status(current.key, current.generation, plan, states, conditions, has_service=has_service)
        await self._write_status(current, status)
        left_s = seconds_to_deadline(plan, states, now)
        return None if left_s is None else left_s + 1

    async def _write_status(self, current: Pass, status: InferenceServiceStatus) -> None:
        """Write the status if it differs from what is there, and tell of a new verdict."""
        manifest = status.to_manifest()
        if manifest == current.previous:
            return
        answer = await self._api.apply_status(
            {
                "apiVersion": API_VERSION,
                "kind": KIND,
                # The uid keeps it from a resource of the same name that came after this one.
                "metadata": {"name": current.key.name, "namespace": current.key.namespace, "uid": current.uid},
                "status": manifest,
            }
        )
        self._metrics.writes.labels("status", KIND).inc()
        if answer is not None:
            self._store.put(INFERENCE_SERVICE, answer)
        await self._tell_of_changes(current, status)

    async def _tell_of_changes(self, current: Pass, status: InferenceServiceStatus) -> None:
        """Events for what the new status says that the old one did not."""
        plan = status.plan
        if plan is not None and plan.variants and (current.previous.get("plan") or {}).get("hash") != plan.hash:
            reasons = "; ".join(f"{each.node_type}: {each.why}" for each in plan.variants)
            await self._tell(current, "PlanChosen", reasons)
        outdated = next((each for each in status.conditions if each.type == "PlanOutdated"), None)
        if outdated is not None and outdated.status == "True" and not is_true(current.conditions, outdated.type):
            await self._tell(current, outdated.type, outdated.message)
        ready, is_stalled = status.conditions[0], is_true(status.conditions, "Stalled")
        before = next((each for each in current.conditions if each.type == ready.type), None)
        is_new = before is None or (before.status, before.reason) != (ready.status, ready.reason)
        # What is under way is told by Created and Updated already.
        if is_new and not is_true(status.conditions, "Reconciling"):
            await self._tell(current, ready.reason, ready.message, is_warning=is_stalled)

    async def _tell(self, current: Pass, reason: str, note: str, *, is_warning: bool = False) -> None:
        await self._events.write(current.key, current.uid, reason, note, is_warning=is_warning)

    def _now(self) -> str:
        return self._clock().strftime("%Y-%m-%dT%H:%M:%SZ")


def needs_apply(desired: Manifest, live: Manifest) -> bool:
    """Whether what we want has changed, or somebody changed a field that is ours."""
    if "deletionTimestamp" in live["metadata"]:
        return False
    annotations: dict[str, Any] = live["metadata"].get("annotations") or {}
    wanted = desired["metadata"]["annotations"][MANIFEST_HASH]
    return annotations.get(MANIFEST_HASH) != wanted or differs(desired, live)


def is_true(conditions: Sequence[Condition], name: str) -> bool:
    """Whether the condition is there and True."""
    return any(each.type == name and each.status == "True" for each in conditions)
