"""Server-sent events, written by hand: one encoded chunk per answer and step, one write per step."""

import logging
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final, Protocol

import msgspec
from fastapi import Response
from starlette.types import Receive, Scope, Send

from octavo_engine.async_engine import Generation
from octavo_engine.errors import OctavoError
from octavo_engine.server.errors import ApiError, as_api_error, internal_error
from octavo_engine.server.serving import Serving, cancel_on_disconnect

logger = logging.getLogger(__name__)

DONE: Final = b"data: [DONE]\n\n"
EVENT_STREAM: Final = "text/event-stream; charset=utf-8"

_encoder = msgspec.json.Encoder()


def event(chunk: Mapping[str, Any]) -> bytes:
    """One event whose data is the chunk as JSON."""
    return b"data: %b\n\n" % _encoder.encode(chunk)


def json_response(reply: Mapping[str, Any]) -> Response:
    """A whole answer as JSON."""
    return Response(_encoder.encode(reply), media_type="application/json")


class ReplyWriter(Protocol):
    """Writes one request's answers in the format of its route."""

    async def whole(self) -> Mapping[str, Any]:
        """The answers once all have ended."""

    def events(self) -> AsyncIterator[bytes]:
        """The answers as events, as they grow."""


async def respond(
    serving: Serving, receive: Receive, generation: Generation, writer: ReplyWriter, *, streams: bool
) -> Response:
    """The generation's answers, as a stream or whole; it ends when the client leaves."""
    if streams:
        return EventStream(serving, generation, writer.events())
    with generation:
        async with cancel_on_disconnect(receive, generation):
            return json_response(await writer.whole())


class EventStream(Response):
    """A response that sends events as they are made, and ends the generation when the client leaves.

    An error in mid-stream becomes the last event: the status line has long been sent.
    """

    media_type = EVENT_STREAM

    def __init__(self, serving: Serving, generation: Generation, events: AsyncIterator[bytes]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._serving = serving
        self._generation = generation
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events (ASGI)."""
        with self._serving.open_request(), self._generation:
            async with cancel_on_disconnect(receive, self._generation):
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                try:
                    async for data in self._events:
                        await send({"type": "http.response.body", "body": data, "more_body": True})
                except Exception as error:  # noqa: BLE001 - whatever it is, the client has to learn of it
                    body = event(_last_error(error).body)
                    await send({"type": "http.response.body", "body": body, "more_body": True})
                await send({"type": "http.response.body", "body": DONE, "more_body": False})


def _last_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, OctavoError):
        return as_api_error(error)
    logger.error("a stream failed", exc_info=error)
    return internal_error()
