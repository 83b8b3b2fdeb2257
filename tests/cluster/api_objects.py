"""The API server as tests want it: manifests in, manifests out, and waiting with a deadline."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from kube_client import Manifest
from kubernetes import config
from kubernetes.client.exceptions import ApiException
from kubernetes.dynamic import DynamicClient
from kubernetes.dynamic.exceptions import NotFoundError, ResourceNotFoundError

T = TypeVar("T")

_POLL_S = 0.05


class ApiObjects:
    """Reads and writes objects of any kind, custom ones included, as the administrator."""

    def __init__(self, kubeconfig: Path) -> None:
        self._api_client = config.new_client_from_config(str(kubeconfig), persist_config=False)
        self._client = DynamicClient(self._api_client)

    def close(self) -> None:
        self._api_client.close()

    def apply(self, manifest: Manifest, field_manager: str = "test", force: bool = False) -> Manifest:
        """Server-side apply; raises kubernetes.dynamic.exceptions.DynamicApiError if the server refuses."""
        applied = self._client.server_side_apply(
            self._resource(manifest["kind"], manifest["apiVersion"]),
            body=manifest,
            name=manifest["metadata"]["name"],
            namespace=manifest["metadata"].get("namespace"),
            field_manager=field_manager,
            force_conflicts=force,
        )
        return _plain(applied)

    def get(self, kind: str, name: str, namespace: str | None = None, api: str | None = None) -> Manifest | None:
        """The object, or None if there is none. `api` is its apiVersion where the kind alone is not enough."""
        try:
            return _plain(self._client.get(self._resource(kind, api), name=name, namespace=namespace))
        except NotFoundError:
            return None

    def list(
        self, kind: str, namespace: str | None = None, selector: str | None = None, api: str | None = None
    ) -> list[Manifest]:
        found = self._client.get(self._resource(kind, api), namespace=namespace, label_selector=selector)
        items: list[Manifest] = _plain(found)["items"]
        return items

    def is_established(self, name: str) -> bool:
        """Whether objects of this CustomResourceDefinition can be made. For a moment it has no list of conditions."""
        found = self.get("CustomResourceDefinition", name, api="apiextensions.k8s.io/v1") or {}
        conditions = found.get("status", {}).get("conditions") or []
        return any(each["type"] == "Established" and each["status"] == "True" for each in conditions)

    def merge(self, kind: str, name: str, patch: Manifest, namespace: str | None = None) -> Manifest:
        """JSON merge patch."""
        patched = self._client.patch(
            self._resource(kind, None),
            body=patch, name=name, namespace=namespace, content_type="application/merge-patch+json",
        )  # fmt: skip
        return _plain(patched)

    def delete(self, kind: str, name: str, namespace: str | None = None, grace_s: int | None = None) -> None:
        """Delete, owned objects in the background; an object that is already gone is fine."""
        body: dict[str, Any] = {"propagationPolicy": "Background"}
        if grace_s is not None:
            body["gracePeriodSeconds"] = grace_s
        try:
            self._client.delete(self._resource(kind, None), name=name, namespace=namespace, body=body)
        except NotFoundError:
            return

    def _resource(self, kind: str, api: str | None) -> Any:
        wanted = {"kind": kind} | ({"api_version": api} if api else {"prefix": "api", "api_version": "v1"})
        try:
            return self._client.resources.get(**wanted)
        except ResourceNotFoundError:
            if api:
                raise
            return self._client.resources.get(kind=kind)


def eventually(probe: Callable[[], T | None], what: str, timeout_s: float = 20.0) -> T:
    """Call `probe` until it returns something true, and return that. AssertionError after `timeout_s` seconds."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            found = probe()
        except ApiException as error:
            # While a custom resource's endpoint or the server itself comes up.
            if error.status is not None and error.status < 500:
                raise
            found = None
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s:g} s: {what}; last seen: {found!r}")
        time.sleep(_POLL_S)


def _plain(answer: Any) -> Manifest:
    manifest: Manifest = answer.to_dict()
    return manifest
