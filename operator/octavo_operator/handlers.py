"""The watches, by kopf: each event goes into the store and puts a key on the queue. Nothing else happens here.

Only `on.event` handlers: they need no finalizer and leave no annotation. Kopf posts no events, looks for no peers and
does not scan for new kinds.
"""

from collections.abc import Callable, Collection
from typing import Any

import kopf

from octavo_operator.api import GROUP, PLURAL, VERSION
from octavo_operator.apiserver import (
    CHILD_KINDS,
    HARDWARE_PROFILE,
    INFERENCE_SERVICE,
    NODE,
    POD,
    RESOURCE_SLICE,
    ApiServer,
    Kind,
)
from octavo_operator.objectstore import ObjectStore
from octavo_operator.observe import MANAGED_SELECTOR, Key, key_of, owner_key

Enqueue = Callable[[Key], None]


def make_registry(
    api: ApiServer,
    store: ObjectStore,
    enqueue: Enqueue,
    nodes_changed: Callable[[], None],
    kinds: Collection[Kind],
) -> kopf.OperatorRegistry:
    """Handlers for the resource, its children, its pods and the Nodes, and the way to log in.

    kinds: that this cluster has and lets the operator watch
    """
    registry = kopf.OperatorRegistry()

    async def login(**_: Any) -> kopf.ConnectionInfo:
        credentials = await api.credentials()
        return kopf.ConnectionInfo(
            server=credentials.server,
            ca_path=credentials.ca_path,
            insecure=credentials.is_insecure,
            certificate_path=credentials.certificate_path,
            private_key_path=credentials.private_key_path,
            scheme="Bearer" if credentials.token else None,
            token=credentials.token,
        )

    kopf.on.login(registry=registry)(login)

    async def on_resource(event: Any, **_: Any) -> None:
        _take_in(store, INFERENCE_SERVICE, event)
        enqueue(key_of(event["object"]))

    kopf.on.event(GROUP, VERSION, PLURAL, registry=registry)(on_resource)
    for kind in (each for each in (*CHILD_KINDS, POD) if each in kinds):
        handler = _child_handler(store, kind, enqueue)
        kopf.on.event(kind.group, kind.version, kind.plural, registry=registry)(handler)

    async def on_node(event: Any, **_: Any) -> None:
        node = event["object"]
        is_gone = event["type"] == "DELETED"
        changed = store.remove_node(node["metadata"]["name"]) if is_gone else store.put_node(node)
        if changed:
            nodes_changed()

    if NODE in kinds:
        kopf.on.event(NODE.group, NODE.version, NODE.plural, registry=registry)(on_node)
    for kind in (HARDWARE_PROFILE, RESOURCE_SLICE):
        if kind in kinds:
            handler = _cluster_handler(store, kind, nodes_changed)
            kopf.on.event(kind.group, kind.version, kind.plural, registry=registry)(handler)
    return registry


def _child_handler(store: ObjectStore, kind: Kind, enqueue: Enqueue) -> Callable[..., Any]:
    async def on_child(event: Any, **_: Any) -> None:
        _take_in(store, kind, event)
        owner = owner_key(event["object"])
        if owner is not None:
            enqueue(owner)

    on_child.__name__ = f"on_{kind.name.lower()}"
    on_child.__qualname__ = on_child.__name__
    return on_child


def _cluster_handler(store: ObjectStore, kind: Kind, changed: Callable[[], None]) -> Callable[..., Any]:
    """For what belongs to the cluster, and so to every plan."""

    async def on_change(event: Any, **_: Any) -> None:
        _take_in(store, kind, event)
        changed()

    on_change.__name__ = f"on_{kind.name.lower()}"
    on_change.__qualname__ = on_change.__name__
    return on_change


def _take_in(store: ObjectStore, kind: Kind, event: Any) -> None:
    if event["type"] == "DELETED":
        store.remove(kind, event["object"])
    else:
        store.put(kind, dict(event["object"]))


def make_settings() -> kopf.OperatorSettings:
    """Kopf with everything off that writes, and timeouts on everything that waits."""
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.scanning.disabled = True
    settings.peering.standalone = True
    # Watches end where others begin, and the process lives on.
    settings.process.ultimate_exiting_timeout = None
    settings.watching.server_timeout = 120
    settings.watching.client_timeout = 150
    settings.watching.connect_timeout = 5
    settings.watching.chunk_size = 500
    settings.networking.request_timeout = 30
    for kind in (*CHILD_KINDS, POD):
        selector = (kind.group, kind.version, kind.plural) if kind.group else (kind.version, kind.plural)
        settings.watching.label_selectors[selector] = MANAGED_SELECTOR
    return settings
