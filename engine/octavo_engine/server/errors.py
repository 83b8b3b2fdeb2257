"""Errors of the HTTP server, always in OpenAI's body: `{"error": {"message", "type", "param", "code"}}`.

Whatever a user sends is answered with a 4xx that says what to change. A 5xx means that the server cannot serve now
(503) or that Octavo has a defect (500).
"""

import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, Final

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from typing_extensions import TypedDict

from octavo_engine.errors import EngineDeadError, InvalidRequestError, OctavoError

logger = logging.getLogger(__name__)

RETRY_AFTER_S: Final = 5
NOT_JSON: Final = "the body must be a JSON object, sent with Content-Type: application/json"


class ErrorDetail(TypedDict):
    """What went wrong; `param` names the field of the request, with dots between its parts."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(TypedDict):
    """The body of every answer that is not a success."""

    error: ErrorDetail


# What a route that generates may answer besides its reply, for the OpenAPI document.
GENERATION_ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    status: {"model": ErrorReply} for status in (400, 404, 413, 503)
}


class ApiError(HTTPException):
    """An answer other than success, as it goes to the client.

    It is an HTTPException so that FastAPI lets it pass where it reads the body.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.param = param
        self.code = code

    @property
    def body(self) -> ErrorReply:
        """OpenAI's error object."""
        kind = "server_error" if self.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
        message, param = _as_utf8(self.detail), self.param and _as_utf8(self.param)
        return {"error": {"message": message, "type": kind, "param": param, "code": self.code}}

    def response(self) -> Response:
        """The whole HTTP answer."""
        content = msgspec.json.encode(self.body)
        return Response(content, self.status_code, self.headers, media_type="application/json")


def _as_utf8(text: str) -> str:
    """The text without halves of surrogate pairs, which JSON can bring in but UTF-8 cannot carry out."""
    return text.encode("utf-8", "replace").decode()


def model_not_found(name: str, served: str) -> ApiError:
    """The model that was asked for is not the one that is served."""
    message = f"the model {name!r} does not exist; this server serves {served!r}"
    return ApiError(HTTPStatus.NOT_FOUND, message, param="model", code="model_not_found")


def unavailable(message: str, code: str) -> ApiError:
    """The server cannot answer now; another replica, or this one later, can."""
    headers = {"Retry-After": str(RETRY_AFTER_S)}
    return ApiError(HTTPStatus.SERVICE_UNAVAILABLE, message, code=code, headers=headers)


def internal_error() -> ApiError:
    """A defect of Octavo's. Its traceback is for the log alone."""
    message = "Octavo failed at this request; its log says why"
    return ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, message, code="internal_error")


def as_api_error(error: OctavoError) -> ApiError:
    """How an error of the engine's looks to an HTTP client."""
    if isinstance(error, InvalidRequestError):
        return ApiError(HTTPStatus.BAD_REQUEST, str(error), param=error.param, code=error.code)
    if isinstance(error, EngineDeadError):
        return unavailable(str(error), "engine_unavailable")
    return ApiError(HTTPStatus.BAD_REQUEST, str(error))


def install_error_handlers(app: FastAPI) -> None:
    """Answer every error in OpenAI's body."""
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(OctavoError, _on_octavo_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(Exception, _on_defect)


async def _on_api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _on_octavo_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, OctavoError)
    return as_api_error(error).response()


async def _on_validation_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return explain_validation_errors(error.errors()).response()


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = str(error.detail)
    if error.status_code == HTTPStatus.NOT_FOUND:
        message = f"there is no {request.url.path}; /openapi.json lists what there is"
    elif error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        message = f"{request.url.path} does not take {request.method}"
    return ApiError(error.status_code, message, headers=error.headers).response()


async def _on_defect(request: Request, error: Exception) -> Response:
    logger.error("request failed: %s %s", request.method, request.url.path, exc_info=error)
    return internal_error().response()


def explain_validation_errors(problems: Sequence[Any]) -> ApiError:
    """One sentence about the first thing that is wrong with a body, and the field that it is about."""
    problem = problems[0]
    param = _param(problem["loc"])
    kind, message = problem["type"], str(problem["msg"])
    code = None
    if kind == "json_invalid":
        message, param = f"the body is not JSON: {problem.get('ctx', {}).get('error', message)}", None
    elif kind == "extra_forbidden":
        message, code = f"unrecognized request argument: {param}", "unknown_parameter"
    elif kind == "missing" and param is not None:
        message = f"{param} is required"
    elif param is None:
        message = NOT_JSON
    else:
        alternatives = [str(other["msg"]) for other in problems if _param(other["loc"]) == param]
        message = f"{param}: {' or '.join(_lower_first(text) for text in dict.fromkeys(alternatives))}"
    return ApiError(HTTPStatus.BAD_REQUEST, message, param=param, code=code)


def _param(location: Sequence[str | int]) -> str | None:
    """The field that a pydantic location is about: without the request's part and the names of a union's branches."""
    parts: list[str] = []
    for part in location[1:]:
        if isinstance(part, str) and _is_type_name(part):
            break
        parts.append(str(part))
    return ".".join(parts) or None


def _is_type_name(part: str) -> bool:
    """Field names are lower case with underscores, keys of `logit_bias` numbers; what else there is names a type."""
    is_name = part.isdigit() or (part.replace("_", "").islower() and "-" not in part and "[" not in part)
    return not is_name or part in {"str", "int", "float", "bool", "none"}


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]
