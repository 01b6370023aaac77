"""The endpoint: /v1/chat/completions, /v1/models, /health, /metrics; and the page's paths."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException

from sparselong.chat.answer import Answer
from sparselong.chat.engine import Engine, PromptTooLong
from sparselong.chat.server.completions import Completion, write_event
from sparselong.chat.server.errors import ApiError, Gate, answer_error, describe_invalid
from sparselong.chat.server.metrics import CONTENT_TYPE, Metrics
from sparselong.chat.server.schema import ChatRequest
from sparselong.chat.server.turns import AnswerError, BusyError, Turns
from sparselong.chat.settings import Settings
from sparselong.errors import ConfigError, ExpectedError

RETRY_SECONDS = 5
SEND_SECONDS = 30
"""How long a client may leave what it asked for unread while others wait for the model."""
_FAILURES = (ExpectedError, AnswerError)
"""What keeps a request from being answered: its own fault, or the server's."""


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def make_app(
    engine: Engine,
    standard: Settings,
    *,
    most_waiting: int,
    token: str | None = None,
    hosts: frozenset[str] | None = None,
    log: Callable[[str], None] = _print,
) -> FastAPI:
    """Return the endpoint on a model.

    Args:
        engine: the model.
        standard: settings that a request does not name.
        most_waiting: requests that may wait; others get 429.
        token: bearer token that requests must have; None: none.
        hosts: values of the Host header that are answered; None: all.
        log: told of answers that failed.
    """
    turns, metrics = Turns(engine, most_waiting, log), Metrics()
    app = FastAPI(title="Sparse-Long", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.turns, app.state.metrics = turns, metrics
    app.add_middleware(Gate, metrics=metrics, token=token, hosts=hosts)
    app.add_exception_handler(ApiError, answer_error)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_unknown)
    app.add_event_handler("shutdown", turns.close)

    _add_completions(app, turns, metrics, standard)
    _add_information(app, turns, metrics)
    return app


def _add_completions(app: FastAPI, turns: Turns, metrics: Metrics, standard: Settings) -> None:
    @app.post("/v1/chat/completions")
    async def complete(body: ChatRequest, request: Request) -> Response:
        completion = _understand(body, turns.engine, standard)
        try:
            await turns.begin()
        except BusyError:
            text = f"{turns.waiting} requests wait already; try again later"
            raise ApiError(429, text, "queue_full", retry_after=RETRY_SECONDS) from None
        if body.stream:
            return await _stream(completion, turns, metrics)
        try:
            return await _whole(completion, turns, metrics, request)
        finally:
            turns.end()


def _add_information(app: FastAPI, turns: Turns, metrics: Metrics) -> None:
    engine = turns.engine

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_describe(engine)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        _check_model(name, engine)
        return _describe(engine)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "running": turns.running, "waiting": turns.waiting}

    @app.get("/metrics")
    async def figures() -> Response:
        text = metrics.write(turns.running, turns.waiting)
        return PlainTextResponse(text, headers={"Content-Type": CONTENT_TYPE})


class _AnswerStream(StreamingResponse):
    """A streamed answer; the turn ends with it, or when the client is gone or reads nothing."""

    def __init__(self, events: AsyncIterator[str], turns: Turns):
        super().__init__(
            events, media_type="text/event-stream", headers={"Cache-Control": "no-store"}
        )
        self._turns, self._is_stuck = turns, False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_soon(message: Any) -> None:
            try:
                async with asyncio.timeout(SEND_SECONDS):
                    await send(message)
            except TimeoutError:
                self._is_stuck = True
                raise

        try:
            await super().__call__(scope, receive, send_soon)
        except Exception:
            if not self._is_stuck:
                raise
        finally:
            self._turns.end()


async def _stream(completion: Completion, turns: Turns, metrics: Metrics) -> Response:
    """Return the answer as server-sent events, once its first piece or a refusal is there."""
    events = completion.events(turns, metrics)
    try:
        first = [await anext(events), await anext(events)]
    except _FAILURES as error:
        turns.end()
        raise _refusal(error) from error
    except BaseException:
        turns.end()
        raise

    async def all_events() -> AsyncIterator[str]:
        for event in first:
            yield event
        try:
            async for event in events:
                yield event
        except _FAILURES as error:  # too late for a status code
            yield write_event(_refusal(error).document())

    return _AnswerStream(all_events(), turns)


async def _whole(
    completion: Completion, turns: Turns, metrics: Metrics, request: Request
) -> Response:
    """Return the answer as one document, unless the client goes away before."""
    text = ""
    try:
        async with aclosing(completion.run(turns, metrics)) as items:
            async for item in items:
                if isinstance(item, Answer):
                    return JSONResponse(completion.document(item, text))
                text += item.get("content", "")
                if await request.is_disconnected():
                    turns.stop()
    except _FAILURES as error:
        raise _refusal(error) from error
    raise RuntimeError("an answer ended without its figures")


def _understand(body: ChatRequest, engine: Engine, standard: Settings) -> Completion:
    _check_model(body.model, engine)
    try:
        settings, stops = body.settings(standard), body.stops()
    except ConfigError as error:
        raise ApiError(400, str(error), "invalid_value") from error
    return Completion(
        engine.name,
        body.conversation(),
        settings,
        body.functions(),
        stops,
        bool(body.stream_options and body.stream_options.include_usage),
    )


def _check_model(name: str, engine: Engine) -> None:
    if name != engine.name:
        text = f"the model {name!r} does not exist; this server has {engine.name!r}"
        raise ApiError(404, text, "model_not_found", "model")


def _describe(engine: Engine) -> dict[str, Any]:
    return {
        "id": engine.name,
        "object": "model",
        "created": engine.created,
        "owned_by": "sparselong",
        "context_length": engine.most_tokens,
    }


def _refusal(error: ExpectedError | AnswerError) -> ApiError:
    if isinstance(error, AnswerError):
        return ApiError(error.status, error.text, error.code)
    if isinstance(error, PromptTooLong):
        return ApiError(400, str(error), "context_length_exceeded", "messages")
    return ApiError(400, str(error), "invalid_messages", "messages")


async def _answer_unknown(_: Request, error: Exception) -> Response:
    """Answer what the framework refuses, such as a path that does not exist."""
    assert isinstance(error, HTTPException)
    return ApiError(error.status_code, str(error.detail)).response()


async def _answer_invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return describe_invalid(list(error.errors())).response()
