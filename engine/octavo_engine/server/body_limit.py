"""Refuses bodies that no valid request needs, before they are read into memory."""

from http import HTTPStatus
from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from octavo_engine.server.errors import ApiError

# A context of a million tokens as JSON numbers stays below this.
MAX_BODY_BYTES: Final = 16 << 20


class BodyLimit:
    """ASGI middleware: 413 for a body that is, or turns out to be, longer than `max_bytes`."""

    def __init__(self, app: ASGIApp, max_bytes: int = MAX_BODY_BYTES) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection event (ASGI)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdigit() and int(declared) > self._max_bytes:
            await self._too_large().response()(scope, receive, send)
            return
        num_bytes = 0

        async def limited_receive() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_bytes:
                raise self._too_large()
            return message

        await self._app(scope, limited_receive, send)

    def _too_large(self) -> ApiError:
        message = f"the body is larger than {self._max_bytes >> 20} MiB"
        return ApiError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message, headers={"Connection": "close"})
