"""`/v1/models`: what can be named in requests. It answers while the model is still loading."""

from fastapi import APIRouter

from octavo_engine.server.errors import ErrorReply
from octavo_engine.server.replies import Model, ModelList
from octavo_engine.server.serving import Serving, ServingOfApp

router = APIRouter(prefix="/v1", tags=["models"])


@router.get("/models")
async def list_models(serving: ServingOfApp) -> ModelList:
    """All models of this server: one."""
    return {"object": "list", "data": [_describe(serving)]}


# A name may hold slashes.
@router.get("/models/{model:path}", responses={404: {"model": ErrorReply}})
async def retrieve_model(model: str, serving: ServingOfApp) -> Model:
    """One model by its name."""
    serving.require_model(model)
    return _describe(serving)


def _describe(serving: Serving) -> Model:
    ready = serving.engine.ready
    return {
        "id": serving.config.model_name,
        "object": "model",
        "created": serving.created_s,
        "owned_by": "octavo",
        "root": serving.config.model,
        "max_model_len": ready.max_model_len if ready else serving.config.max_model_len,
    }
