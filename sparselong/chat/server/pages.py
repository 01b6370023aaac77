"""The page's files, and the conversations that it keeps in the run directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.datastructures import MutableHeaders

from sparselong.chat import conversation as files
from sparselong.chat.engine import Engine
from sparselong.chat.server.errors import ApiError
from sparselong.chat.settings import Settings
from sparselong.errors import StageError

STATIC = Path(__file__).parent / "static"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class AddHeaders:
    """Middleware that adds `HEADERS` to every response."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request."""

        async def add(message: Any) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self.app(scope, receive, add)


def add_page(app: FastAPI, engine: Engine, standard: Settings, folder: Path) -> None:
    """Add the page to an endpoint.

    Args:
        app: the endpoint.
        engine: the model.
        standard: settings that the page begins with.
        folder: where conversations are kept.
    """
    app.add_middleware(AddHeaders)
    app.mount("/static", StaticFiles(directory=STATIC), "static")

    @app.get("/")
    async def page() -> Response:
        return FileResponse(STATIC / "index.html")

    @app.get("/chat/start")
    async def start() -> dict[str, Any]:
        return {
            "model": engine.name,
            "format": {"format": files.FORMAT, "version": files.VERSION},
            "most_bytes": files.MOST_BYTES,
            "settings": standard.document(),
        }

    _add_conversations(app, folder)


def _add_conversations(app: FastAPI, folder: Path) -> None:
    @app.get("/conversations")
    async def names() -> list[str]:
        return sorted((path.stem for path in folder.glob("*.json")), reverse=True)

    @app.get("/conversations/{name}")
    async def read(name: str) -> Response:
        path = _path(folder, name)
        if not path.exists():
            raise ApiError(404, f"there is no conversation {name!r}", "not_found")
        try:
            return JSONResponse(files.load(path).document())
        except StageError as error:
            raise ApiError(409, str(error), "damaged") from error

    @app.put("/conversations/{name}", status_code=204)
    async def keep(name: str, request: Request) -> None:
        _path(folder, name)
        try:
            files.save(files.parse(await request.body(), "the document"), folder, name)
        except StageError as error:
            raise ApiError(400, str(error), "invalid_conversation") from error
        except OSError as error:  # such as a full disk
            raise ApiError(500, str(error), "not_kept") from error

    @app.delete("/conversations/{name}", status_code=204)
    async def remove(name: str) -> None:
        try:
            _path(folder, name).unlink(missing_ok=True)
        except OSError as error:
            raise ApiError(500, str(error), "not_deleted") from error


def _path(folder: Path, name: str) -> Path:
    try:
        return files.path_of(folder, name)
    except StageError as error:
        raise ApiError(400, str(error), "invalid_name") from error
