"""The official Kubernetes client, cut down to plain manifests: paths in, dictionaries out.

The generated models would cost each node a conversion per object and direction, and would lose fields that the
server has and the client's version does not know.
"""

import json
import logging
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Self, TypeAlias

import aiohttp
from kubernetes.aio import config

logger = logging.getLogger(__name__)

Manifest: TypeAlias = dict[str, Any]

STRATEGIC_MERGE_PATCH = "application/strategic-merge-patch+json"
# What a request may fail with while the API server is away or starting.
UNREACHABLE = (aiohttp.ClientError, OSError, TimeoutError)

_REQUEST_TIMEOUT_S = 30.0
_WATCH_S = 300


class ApiError(RuntimeError):
    """The API server refused a request; `status` is its HTTP status, the message its own sentence."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status

    @property
    def is_temporary(self) -> bool:
        """Starting (its authorisation cache fills for a moment), overloaded or throttling: ask again."""
        return self.status in {401, 403, 429} or self.status >= 500


class KubeClient:
    """One user's connection to one API server. Use as an async context manager."""

    def __init__(self, kubeconfig: Path) -> None:
        self._kubeconfig = kubeconfig

    async def __aenter__(self) -> Self:
        self._api = await config.new_client_from_config(str(self._kubeconfig), persist_config=False)
        # One watch and the writes of all pods share the pool; the default of 100 would stall a large node.
        self._api.rest_client.maxsize = 0
        # The server is on loopback: a proxy of the environment cannot reach it.
        self._api.configuration.client_session_kwargs = {"trust_env": False}
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._api.close()

    @property
    def server(self) -> str:
        return str(self._api.configuration.host)

    async def get(self, path: str, **query: str) -> Manifest:
        return await self._request("GET", path, query=query)

    async def get_or_none(self, path: str) -> Manifest | None:
        """The object at `path`, or None if there is none."""
        try:
            return await self.get(path)
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    async def create(self, path: str, body: Manifest) -> Manifest:
        return await self._request("POST", path, body)

    async def replace(self, path: str, body: Manifest) -> Manifest:
        return await self._request("PUT", path, body)

    async def patch(self, path: str, body: Manifest) -> Manifest:
        """Strategic merge patch: lists with a merge key keep the entries that the patch does not name."""
        return await self._request("PATCH", path, body, STRATEGIC_MERGE_PATCH)

    async def delete(self, path: str, body: Manifest | None = None) -> None:
        await self._request("DELETE", path, body)

    async def watch(self, path: str, resource_version: str, **query: str) -> AsyncIterator[Manifest]:
        """Yield watch events until the server ends the watch; ApiError 410 asks for a new list."""
        query |= {
            "watch": "true",
            "resourceVersion": resource_version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(_WATCH_S),
        }
        limits = aiohttp.ClientTimeout(total=None, sock_connect=_REQUEST_TIMEOUT_S, sock_read=_WATCH_S + 30)
        async with await self._send("GET", path, None, "application/json", query, limits) as response:
            await _raise_for_status(response)
            async for line in response.content:
                event = json.loads(line)
                if event["type"] == "ERROR":
                    raise ApiError(event["object"].get("code", 500), event["object"].get("message", ""))
                yield event

    async def _request(
        self,
        method: str,
        path: str,
        body: Manifest | None = None,
        content_type: str = "application/json",
        query: Mapping[str, str] | None = None,
    ) -> Manifest:
        limits = aiohttp.ClientTimeout(total=_REQUEST_TIMEOUT_S)
        async with await self._send(method, path, body, content_type, query or {}, limits) as response:
            await _raise_for_status(response)
            manifest: Manifest = json.loads(await response.read())
            return manifest

    async def _send(
        self,
        method: str,
        path: str,
        body: Manifest | None,
        content_type: str,
        query: Mapping[str, str],
        limits: aiohttp.ClientTimeout,
    ) -> aiohttp.ClientResponse:
        call = await self._api.param_serialize(
            method,
            path,
            query_params=list(query.items()),
            header_params={"Accept": "application/json", "Content-Type": content_type},
            body=body,
            auth_settings=["BearerToken"],
        )
        answer = await self._api.call_api(*call, _request_timeout=limits)
        response: aiohttp.ClientResponse = answer.response
        return response


async def _raise_for_status(response: aiohttp.ClientResponse) -> None:
    if response.status < 400:
        return
    text = await response.text()
    try:
        message = json.loads(text).get("message", text)
    except ValueError:
        message = text
    raise ApiError(response.status, message)


def pod_path(pod: Manifest, subresource: str = "") -> str:
    metadata = pod["metadata"]
    return f"/api/v1/namespaces/{metadata['namespace']}/pods/{metadata['name']}{subresource}"
