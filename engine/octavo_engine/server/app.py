"""The HTTP application: routes, error bodies and the OpenAPI document."""

import importlib
import pkgutil
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from octavo_engine import __version__
from octavo_engine.server import routes
from octavo_engine.server.body_limit import BodyLimit
from octavo_engine.server.errors import install_error_handlers
from octavo_engine.server.serving import Serving

DESCRIPTION = "OpenAI's API for one open-weight model, with probes and metrics."


def create_app(serving: Serving) -> FastAPI:
    """The application around one server's state. Every module of `routes/` brings its own router.

    Nodes that lend node 0 their ranks answer probes and nothing else.
    """
    # The pages of /docs and /redoc would load their scripts from elsewhere.
    app = FastAPI(
        title="Octavo",
        version=__version__,
        description=DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.serving = serving
    for name in _route_modules() if serving.config.node_rank == 0 else ["probes"]:
        app.include_router(importlib.import_module(f"{routes.__name__}.{name}").router)
    install_error_handlers(app)
    app.add_middleware(BodyLimit)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _route_modules() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(routes.__path__)]


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document without its 422s: a wrong request is answered with 400 and OpenAI's body here."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            document.get("components", {}).get("schemas", {}).pop(name, None)
        app.openapi_schema = document
    return app.openapi_schema
