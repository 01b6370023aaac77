"""Shared fixtures: a small untrained gpt-oss, a little chat data, and the scripts as modules."""

import gc
import importlib.util
import json
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import pytest

from sparselong import set_environment
from sparselong.config import yaml12
from sparselong.config.schema import load_with_source
from tests.forked.servers import serving

set_environment()  # as the scripts, which many tests call within this process
# Background jobs of a shell ignore SIGINT, and children inherit that; tests that send it need it.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_finish() -> None:
    """Leave what was imported out of garbage collections: each would take half a second."""
    gc.collect()
    gc.freeze()


def load_script(name: str) -> ModuleType:
    """Load a numbered script as a module, so that a test can call its `main(argv)`."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_rows(path: Path, rows: list) -> Path:
    """Write rows as a JSON-lines file and return its path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def replace_values(words: Sequence[str]) -> list[str]:
    """Return a command line's words with each key's last value only."""
    last = {word.partition("=")[0]: word for word in words if "=" in word}
    return [word for word in words if last.get(word.partition("=")[0], word) == word]


@pytest.fixture(scope="session")
def forked_python() -> Iterator[str]:
    """A stand-in for the path of Python, with packages imported in advance (tests/forked)."""
    with serving() as program:
        yield program


@pytest.fixture(scope="session")
def untrained_base(tmp_path_factory) -> Path:
    """A random four-layer gpt-oss in the upstream on-disk format."""
    from sparselong.tiny.build import TinySpec, build_tiny

    return build_tiny(tmp_path_factory.mktemp("base") / "base", TinySpec(steps=0), seed=1)


@pytest.fixture(scope="session")
def chat_file(tmp_path_factory) -> Path:
    """Forty conversations of varying length."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Count to {n}."},
                {"role": "assistant", "content": " ".join(map(str, range(1, n + 1)))},
            ]
        }
        for n in range(1, 41)
    ]
    return write_rows(tmp_path_factory.mktemp("data") / "chat.jsonl", rows)


@pytest.fixture(scope="session")
def small_arguments(untrained_base, chat_file, tmp_path_factory) -> list[str]:
    """A config, configs/tiny.yaml with values with which it runs in seconds."""
    given = [
        f"model.base={untrained_base}",
        f"data.train={chat_file}",
        "calibration.samples=8",
        "calibration.refinement_steps=10",  # fewer improve no layer of the untrained model
        "calibration.sequence_len=64",
    ]
    _, values = load_with_source(ROOT / "configs/tiny.yaml", given)
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml12.dump(values), encoding="utf-8")
    return ["--config", str(path)]
