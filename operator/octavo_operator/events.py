"""Kubernetes Events: what the operator did and found, for `kubectl describe`."""

import logging
import secrets
from collections.abc import Callable
from datetime import datetime

from octavo_operator.api import API_VERSION, KIND
from octavo_operator.apiserver import EVENT, UNREACHABLE, ApiServer, own_identity
from octavo_operator.errors import ApiError
from octavo_operator.observe import Key, Manifest

logger = logging.getLogger(__name__)

# Of a note in events.k8s.io/v1 the API server takes 1 kB.
_MAX_NOTE = 1000


class EventWriter:
    """Writes Events about InferenceServices."""

    def __init__(self, api: ApiServer, clock: Callable[[], datetime]) -> None:
        self._api = api
        self._clock = clock
        self._identity = own_identity()

    async def write(self, key: Key, uid: str, reason: str, note: str, *, is_warning: bool = False) -> None:
        """Write one Event. Losing it is no reason to fail a pass, so this raises nothing."""
        logger.info("resource=%s event=%s %s", key, reason, note)
        event: Manifest = {
            "apiVersion": EVENT.api_version,
            "kind": EVENT.name,
            "metadata": {"name": f"{key.name}.{secrets.token_hex(8)}", "namespace": key.namespace},
            "eventTime": self._clock().isoformat(timespec="microseconds").replace("+00:00", "Z"),
            "reportingController": "octavo.dev/operator",
            "reportingInstance": self._identity[:128],
            "action": "Reconcile",
            "reason": reason,
            "type": "Warning" if is_warning else "Normal",
            "note": note[:_MAX_NOTE],
            "regarding": {
                "apiVersion": API_VERSION,
                "kind": KIND,
                "name": key.name,
                "namespace": key.namespace,
                "uid": uid,
            },
        }
        try:
            await self._api.create(EVENT, event)
        except (ApiError, *UNREACHABLE) as error:
            # Who deletes a namespace reads no Events of it.
            level = logging.DEBUG if isinstance(error, ApiError) and error.ends_with_namespace else logging.WARNING
            logger.log(level, "resource=%s event %s was not written: %s", key, reason, error)
