"""The one module that talks to the API server: plain manifests in and out, server-side apply with one field manager."""

import json
import logging
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import aiohttp
from kubernetes.aio import client, config

from octavo_operator.api import API_VERSION, KIND, PLURAL
from octavo_operator.errors import ApiError, ConnectionSettingsError
from octavo_operator.observe import LEADER_WORKER_SET_KIND, Key, Manifest
from octavo_operator.profile_api import PROFILE_KIND, PROFILE_PLURAL

logger = logging.getLogger(__name__)

FIELD_MANAGER = "octavo-operator"
# What a request may fail with while the API server is away: to be tried again.
UNREACHABLE = (aiohttp.ClientError, OSError, TimeoutError)

_APPLY = "application/apply-patch+yaml"
_PAGE_SIZE = 500


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of object and where it is in the API."""

    name: str
    api_version: str
    plural: str
    is_namespaced: bool = True

    @property
    def group(self) -> str:
        """API group; empty for the core."""
        return self.api_version.rpartition("/")[0]

    @property
    def version(self) -> str:
        """Version within the group."""
        return self.api_version.rpartition("/")[2]

    def path(self, namespace: str | None = None, name: str | None = None) -> str:
        """Path of the collection, in all namespaces or one, or of one object."""
        root = f"/apis/{self.api_version}" if self.group else f"/api/{self.api_version}"
        place = f"/namespaces/{quote(namespace)}" if namespace and self.is_namespaced else ""
        return f"{root}{place}/{self.plural}{'/' + quote(name) if name else ''}"


INFERENCE_SERVICE = Kind(KIND, API_VERSION, PLURAL)
HARDWARE_PROFILE = Kind(PROFILE_KIND, API_VERSION, PROFILE_PLURAL, is_namespaced=False)
SERVICE_ACCOUNT = Kind("ServiceAccount", "v1", "serviceaccounts")
CONFIG_MAP = Kind("ConfigMap", "v1", "configmaps")
SERVICE = Kind("Service", "v1", "services")
NETWORK_POLICY = Kind("NetworkPolicy", "networking.k8s.io/v1", "networkpolicies")
DEPLOYMENT = Kind("Deployment", "apps/v1", "deployments")
LEADER_WORKER_SET = Kind(LEADER_WORKER_SET_KIND, "leaderworkerset.x-k8s.io/v1", "leaderworkersets")
CLAIM_TEMPLATE = Kind("ResourceClaimTemplate", "resource.k8s.io/v1", "resourceclaimtemplates")
RESOURCE_SLICE = Kind("ResourceSlice", "resource.k8s.io/v1", "resourceslices", is_namespaced=False)
JOB = Kind("Job", "batch/v1", "jobs")
POD = Kind("Pod", "v1", "pods")
NODE = Kind("Node", "v1", "nodes", is_namespaced=False)
LEASE = Kind("Lease", "coordination.k8s.io/v1", "leases")
EVENT = Kind("Event", "events.k8s.io/v1", "events")

# What the operator creates; anything of these kinds with its labels is its own to change and delete.
CHILD_KINDS = (SERVICE_ACCOUNT, CONFIG_MAP, CLAIM_TEMPLATE, SERVICE, NETWORK_POLICY, DEPLOYMENT, LEADER_WORKER_SET)
# Those of them that make pods.
WORKLOAD_KINDS = (DEPLOYMENT, LEADER_WORKER_SET)
# What a cluster may lack, or keep from the operator: it does without.
OPTIONAL_KINDS = (HARDWARE_PROFILE, RESOURCE_SLICE, CLAIM_TEMPLATE, LEADER_WORKER_SET)
KINDS = {
    kind.name: kind
    for kind in (INFERENCE_SERVICE, HARDWARE_PROFILE, *CHILD_KINDS, JOB, POD, NODE, RESOURCE_SLICE, LEASE, EVENT)
}


@dataclass(frozen=True, slots=True)
class Credentials:
    """How to reach the API server, for the watches, which bring a client of their own."""

    server: str
    ca_path: str | None
    is_insecure: bool
    certificate_path: str | None
    private_key_path: str | None
    token: str | None


class ApiServer:
    """A connection to the API server. Use as an async context manager."""

    def __init__(self, kubeconfig: Path | None = None, request_timeout_s: float = 30.0) -> None:
        self._kubeconfig = kubeconfig
        self._request_timeout_s = request_timeout_s

    async def __aenter__(self) -> Self:
        self._configuration = await load_configuration(self._kubeconfig)
        self._client = client.ApiClient(configuration=self._configuration)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def credentials(self) -> Credentials:
        """As they are now: a service account's token changes every hour."""
        settings = self._configuration
        header = await settings.get_api_key_with_prefix("BearerToken", alias="authorization")
        return Credentials(
            server=settings.host,
            ca_path=settings.ssl_ca_cert,
            is_insecure=not settings.verify_ssl,
            certificate_path=settings.cert_file,
            private_key_path=settings.key_file,
            token=header.removeprefix("Bearer ") if header else None,
        )

    async def get(self, kind: Kind, key: Key) -> Manifest | None:
        """The object, or None if there is none."""
        try:
            return await self._request("GET", kind.path(key.namespace, key.name))
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    async def list(
        self, kind: Kind, namespace: str | None = None, label_selector: str = ""
    ) -> tuple[list[Manifest], int]:
        """All objects, in pages, and the resource version of the list."""
        items: list[Manifest] = []
        query = {"limit": str(_PAGE_SIZE)}
        if label_selector:
            query["labelSelector"] = label_selector
        while True:
            page = await self._request("GET", kind.path(namespace), query=query)
            # Items of a list come without what the list says for all of them.
            items += [{"apiVersion": kind.api_version, "kind": kind.name, **item} for item in page["items"]]
            if not page["metadata"].get("continue"):
                return items, int(page["metadata"]["resourceVersion"])
            query["continue"] = page["metadata"]["continue"]

    async def apply(self, manifest: Manifest) -> Manifest:
        """Make our fields be as `manifest` has them, whoever had set them; the object as it is then."""
        return await self._apply(manifest, "")

    async def apply_status(self, manifest: Manifest) -> Manifest | None:
        """The same for the status; None if the object is gone."""
        try:
            return await self._apply(manifest, "/status")
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    async def _apply(self, manifest: Manifest, subresource: str) -> Manifest:
        metadata = manifest["metadata"]
        path = KINDS[manifest["kind"]].path(metadata.get("namespace"), metadata["name"])
        query = {"fieldManager": FIELD_MANAGER, "force": "true"}
        return await self._request("PATCH", f"{path}{subresource}", manifest, query, content_type=_APPLY)

    async def create(self, kind: Kind, manifest: Manifest) -> Manifest:
        """Create an object: a Lease or an Event. Everything else is applied."""
        namespace = manifest["metadata"].get("namespace")
        return await self._request("POST", kind.path(namespace), manifest, {"fieldManager": FIELD_MANAGER})

    async def replace(self, kind: Kind, manifest: Manifest) -> Manifest:
        """Replace an object if it is still of the manifest's resource version; ApiError 409 if it is not."""
        metadata = manifest["metadata"]
        path = kind.path(metadata.get("namespace"), metadata["name"])
        return await self._request("PUT", path, manifest, {"fieldManager": FIELD_MANAGER})

    async def delete(self, kind: Kind, key: Key, uid: str) -> None:
        """Delete exactly the object that was seen; no error if it is gone, or is another one by now."""
        options = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background"}
        try:
            await self._request(
                "DELETE", kind.path(key.namespace, key.name), {**options, "preconditions": {"uid": uid}}
            )
        except ApiError as error:
            if error.status not in (404, 409):
                raise

    async def _request(
        self,
        method: str,
        path: str,
        body: Manifest | None = None,
        query: Mapping[str, str] | None = None,
        *,
        content_type: str = "application/json",
    ) -> Manifest:
        call = await self._client.param_serialize(
            method,
            path,
            query_params=list((query or {}).items()),
            header_params={"Accept": "application/json", "Content-Type": content_type},
            body=body,
            auth_settings=["BearerToken"],
        )
        timeout = aiohttp.ClientTimeout(total=self._request_timeout_s)
        answer = await self._client.call_api(*call, _request_timeout=timeout)
        response: aiohttp.ClientResponse = answer.response
        text = await response.text()
        if response.status >= 400:
            raise read_error(response.status, text)
        manifest: Manifest = json.loads(text)
        return manifest


def read_error(status: int, text: str) -> ApiError:
    """The error of a Status object, or of what else came."""
    try:
        answer = json.loads(text)
        causes = [each["reason"] for each in (answer.get("details") or {}).get("causes") or [] if "reason" in each]
        return ApiError(status, str(answer.get("message") or text), causes)
    except (ValueError, AttributeError, TypeError):
        return ApiError(status, text.strip())


async def load_configuration(kubeconfig: Path | None) -> Any:
    """The client's configuration: the kubeconfig that was named, the pod's service account, or the usual kubeconfig.

    Raises ConnectionSettingsError.
    """
    settings = client.Configuration()
    # All workers share one pool; each worker has one request under way.
    settings.connection_pool_maxsize = 0
    try:
        if kubeconfig is not None:
            await config.load_kube_config(str(kubeconfig), client_configuration=settings, persist_config=False)
            return settings
        try:
            config.load_incluster_config(client_configuration=settings)
        except config.ConfigException:
            await config.load_kube_config(client_configuration=settings, persist_config=False)
    except (config.ConfigException, OSError) as error:
        raise ConnectionSettingsError(
            f"no way to an API server: {str(error).strip() or type(error).__name__}; name a file with --kubeconfig"
        ) from None
    return settings


def own_identity() -> str:
    """A name for this process among its replicas: a pod's host name is the pod's name."""
    return socket.gethostname()
