"""Errors that a client can act on, and their JSON: native bodies and the shape of the OpenAI API."""

from __future__ import annotations

import json
import math
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException as StarletteHTTPException

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
_CODES = {404: "unknown_url", 405: "method_not_supported", 413: "request_too_large"}


class NativeFailure(BaseModel):
    """The body of an error of the native API; detail is a list for a body of the wrong shape."""

    detail: str | list[dict[str, Any]]
    code: str


class OpenAIFailureDetail(BaseModel):
    """What went wrong, in the words of the OpenAI API."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIFailure(BaseModel):
    """The body of an error below /v1."""

    error: OpenAIFailureDetail


def documented(body: type[BaseModel], *statuses: int) -> dict[int | str, dict[str, Any]]:
    """Entries of the OpenAPI schema for the errors that a group of endpoints answers with."""
    return {status: {"model": body, "description": HTTPStatus(status).phrase} for status in statuses}


class ApiError(HTTPException):
    """A refused or failed request: HTTP status, machine-readable code, a message for people."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        headers = {"Retry-After": str(retry_after)} if retry_after is not None else {}
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if status == 504 or code == "worker_failed":
            headers["x-should-retry"] = "false"  # the OpenAI clients would repeat a costly request twice
        super().__init__(status, message, headers)
        self.code, self.message, self.param = code, message, param


def openai_error(status: int, message: str, code: str | None, param: str | None = None) -> dict:
    """The error body of the OpenAI API."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def install_error_handlers(app: FastAPI) -> None:
    """Answer every error of the app in the shape that its path promises."""
    app.add_exception_handler(StarletteHTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_schema_error)
    app.add_exception_handler(Exception, _on_crash)


def error_response(path: str, error: StarletteHTTPException) -> Response:
    """The response to an error raised while answering `path`."""
    status, message = error.status_code, str(error.detail)
    if isinstance(error, ApiError):
        code, param = error.code, error.param
    else:
        code, param = _CODES.get(status), None
    if is_openai(path):
        body: dict = openai_error(status, message, code, param)
    else:
        body = {"detail": message, "code": code or "http_error"}
    return AsciiJSON(body, status, error.headers)


def is_openai(path: str) -> bool:
    """Whether a path speaks the OpenAI dialect."""
    return path == "/v1" or path.startswith("/v1/")


class AsciiJSON(JSONResponse):
    """JSON that can always be sent: lone surrogates escaped, no NaN."""

    def render(self, content: object) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


def route_path(request: Request) -> str:
    """The path of a request below the app's mount point."""
    return request.scope["path"].removeprefix(request.scope.get("root_path", ""))


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    return error_response(route_path(request), error)


async def _on_schema_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    details: list[dict] = [{key: _finite(value) for key, value in one.items()} for one in error.errors()]
    first = details[0]
    if problem := _of_the_whole_body(first, request.headers.get("content-type", "")):
        first |= {"msg": problem, "loc": ["body"]}
    if not is_openai(route_path(request)):
        return AsciiJSON({"detail": details, "code": "invalid_request"}, 422)
    param = ".".join(str(part) for part in first["loc"] if part != "body") or None
    return AsciiJSON(openai_error(400, f"{param or 'body'}: {first['msg']}", "invalid_value", param), 400)


def _of_the_whole_body(detail: dict, content_type: str) -> str | None:
    """What is wrong with a body before anything in it, in words for people; None where a field is wrong."""
    if detail["type"] == "json_invalid":
        return f"this is no valid JSON: {detail['ctx']['error']}, at character {detail['loc'][-1]}"
    if detail["loc"] != ["body"]:
        return None
    if detail["type"] == "missing":
        return "a JSON object is missing here"
    media = content_type.partition(";")[0].strip().lower()
    if media != "application/json" and not media.endswith("+json"):
        return f"JSON is read only under the header Content-Type: application/json, not {media or 'without'}"
    return "this must be a JSON object"


async def _on_crash(request: Request, error: Exception) -> Response:
    return error_response(route_path(request), ApiError(500, "internal_error", "internal server error"))


def _finite(value: object) -> object:
    """A JSON-able copy of a validation detail: the offending input may be NaN or an exception object."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    return str(value)
