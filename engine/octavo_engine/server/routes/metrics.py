"""`/metrics`: Prometheus' text format."""

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

from octavo_engine.server.serving import ServingOfApp

router = APIRouter(tags=["metrics"])


@router.get(
    "/metrics", response_class=Response, responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
)
async def metrics(serving: ServingOfApp) -> Response:
    """The server's and the engine's metrics."""
    return Response(serving.metrics.render(), headers={"Content-Type": CONTENT_TYPE_LATEST})
