"""What tests share: an untrained small gpt-oss, a little chat data, and the scripts as modules."""

import importlib.util
import json
import signal
from pathlib import Path
from types import ModuleType

import pytest

# A shell's background jobs ignore Ctrl-C and pass that on; the tests that send it must not.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent


def load_script(name: str) -> ModuleType:
    """A numbered script as a module, so that a test can call its `main(argv)`."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_rows(path: Path, rows: list) -> Path:
    """A JSON-lines file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def untrained_base(tmp_path_factory) -> Path:
    """A random gpt-oss of four layers in upstream's on-disk form."""
    from sparselong.tiny.build import TinySpec, build_tiny

    return build_tiny(tmp_path_factory.mktemp("base") / "base", TinySpec(steps=0), seed=1)


@pytest.fixture(scope="session")
def chat_file(tmp_path_factory) -> Path:
    """Forty conversations of different lengths."""
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
def small_arguments(untrained_base, chat_file) -> list[str]:
    """Overrides that make configs/tiny.yaml a matter of seconds."""
    return [
        *("--config", str(ROOT / "configs/tiny.yaml")),
        f"model.base={untrained_base}",
        f"data.train={chat_file}",
        "calibration.samples=8",
        "calibration.sequence_len=64",
    ]
