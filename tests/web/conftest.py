"""A server with a scripted model, as a person and a program meet it. `make test-web` runs these."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import uvicorn
from playwright.sync_api import sync_playwright

from sparselong.chat.server import add_page, make_app
from sparselong.chat.settings import Settings
from tests.chat.engines import ScriptedEngine
from tests.web.browsing import CHROMIUM, FLAGS

LOOPBACK = frozenset({"localhost", "127.0.0.1"})


@dataclass
class Served:
    """A running server."""

    address: str
    engine: ScriptedEngine
    folder: Path


class Server:
    """Starts servers in threads of this process."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.running: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(self, engine: ScriptedEngine, *, port: int = 0, most_waiting: int = 8, token=None):
        app = make_app(engine, Settings(), most_waiting=most_waiting, token=token, hosts=LOOPBACK)
        add_page(app, engine, Settings(), self.folder)
        config = uvicorn.Config(app, port=port, log_level="warning", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        self.running.append((server, thread))
        port = server.servers[0].sockets[0].getsockname()[1]
        return Served(f"http://127.0.0.1:{port}", engine, self.folder)

    def stop(self) -> None:
        for server, thread in self.running:
            server.should_exit = True
            thread.join(10)
        self.running = []


@pytest.fixture
def server(tmp_path) -> Iterator[Server]:
    made = Server(tmp_path / "conversations")
    yield made
    made.stop()


@pytest.fixture(scope="session")
def browser():
    if CHROMIUM is None:
        pytest.fail("tests of the pages need Chromium: install the package chromium")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()
