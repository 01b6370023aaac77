"""Failures in OpenAI's form, and the limits on who may ask and how much."""

from __future__ import annotations

import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse

from sparselong.chat.server.metrics import Metrics

MOST_BODY_BYTES = 8 << 20
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Scope]]
Send = Callable[[Scope], Awaitable[None]]


class ApiError(Exception):
    """A request that is refused.

    Args:
        status: HTTP status code.
        message: for a person.
        code: OpenAI's code for programs.
        param: the parameter that it is about.
        retry_after: seconds after which to try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after = retry_after

    def document(self) -> dict[str, Any]:
        """Return it as OpenAI's error document."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        standard = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {
            "message": self.message,
            "type": kinds.get(self.status, standard),
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}

    def response(self) -> JSONResponse:
        """Return the document with the status code."""
        headers = {"Retry-After": str(self.retry_after)} if self.retry_after else {}
        return JSONResponse(self.document(), self.status, headers)


async def answer_error(_: Request, error: Exception) -> JSONResponse:
    """Return an ApiError's response; FastAPI calls this."""
    assert isinstance(error, ApiError)
    return error.response()


class Gate:
    """Middleware: counts requests, limits bodies, and asks for the bearer token.

    Args:
        app: what answers.
        metrics: where requests are counted.
        token: the token; None asks for none.
        hosts: values of the Host header that are answered; None: all. Without it a page of another
            site could have a browser ask this server under a name of its own (DNS rebinding).
    """

    def __init__(self, app: Any, metrics: Metrics, token: str | None, hosts: frozenset[str] | None):
        self.app, self.metrics, self.token, self.hosts = app, metrics, token, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or refuse one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def count(message: Scope) -> None:
            if message["type"] == "http.response.start":
                self.metrics.count_request(message["status"])
            await send(message)

        headers = {name.decode("latin-1"): value for name, value in scope["headers"]}
        refusal = self._refuse(scope["path"], headers)
        body = b"" if refusal else await _read_body(receive)
        if body is None:
            refusal = _too_large()
        if refusal is not None:
            await refusal.response()(scope, receive, count)
            return
        await self.app(scope, _replayed(body or b"", receive), count)

    def _refuse(self, path: str, headers: dict[str, bytes]) -> ApiError | None:
        host = headers.get("host", b"").decode("latin-1")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if self.hosts is not None and name not in self.hosts:
            return ApiError(403, f"host {host!r} is not this server", "host_not_allowed")
        given = headers.get("authorization", b"")
        is_open = path in ("/health", "/") or path.startswith("/static/")
        if self.token and not is_open:
            wanted = f"Bearer {self.token}".encode()
            if not hmac.compare_digest(given, wanted):
                return ApiError(401, "a bearer token is needed", "invalid_api_key")
        length = headers.get("content-length", b"0")
        if not length.isdigit() or int(length) > MOST_BODY_BYTES:
            return _too_large()
        return None


def _too_large() -> ApiError:
    return ApiError(413, f"a request has at most {MOST_BODY_BYTES:,} bytes", "request_too_large")


async def _read_body(receive: Receive) -> bytes | None:
    """Return a request's body, or None if it is too large."""
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MOST_BODY_BYTES:
            return None
        more = message.get("more_body", False)
    return b"".join(parts)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Return what receives a body that was read, and then what comes after it."""
    messages: list[Scope] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Scope:
        return messages.pop() if messages else await receive()

    return replay


def describe_invalid(errors: list[Any]) -> ApiError:
    """Return the refusal of a body that does not have the schema's form."""
    first = errors[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body")
    found = json.dumps(first.get("input"), default=str)[:200]
    return ApiError(400, f"{place or 'body'}: {first['msg']} (found {found})", param=place or None)
