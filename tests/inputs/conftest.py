"""One small valid base and data file, and the numbered scripts called in this process.

Tests here change files, names or settings as people do, and expect either the right result or an
explained refusal.
"""

import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import load_script, write_rows

QUICK = (
    *("sequence_len=128", "micro_batch_size=2", "evaluation.limit=4"),
    *("training.max_steps=2", "training.eval_steps=2", "training.save_steps=2"),
    *("evaluation.perplexity_samples=8",),
)
"""Overrides with which all four stages are done in a minute, most of it imports."""


@dataclass(frozen=True)
class Outcome:
    """What a script said: its exit code, stdout and stderr."""

    code: int
    out: str
    err: str

    def assert_explained(self, *words: str) -> None:
        """Assert a four-line refusal that contains the words, without a traceback."""
        assert self.code in (1, 2), (self.code, self.err[-2000:])
        assert "Traceback" not in self.err, self.err[-4000:]
        for key in ("error:    ", "expected: ", "found:    ", "fix:      "):
            assert key in self.err, self.err[-2000:]
        refusal = self.err[self.err.rindex("error:    ") :]
        for word in words:
            assert word in refusal, refusal


@pytest.fixture
def run_script(small_arguments, tmp_path, capfd) -> Callable[..., Outcome]:
    """Return a function that calls a script's `main` on the small base and data.

    `run_script("02_compress", "key=value", …)` uses the run directory `tmp_path/run`; overrides win
    over the small base and data, so `model.base=…` names another base.
    """
    scripts = {}
    needed = {"05_export": ("--to", "mxfp4")}

    def call(name: str, *more: str, run_dir: Path | None = None) -> Outcome:
        script = scripts.setdefault(name, load_script(name))
        capfd.readouterr()
        where = ("--run-dir", str(run_dir or tmp_path / "run"))
        named = {word.partition("=")[0] for word in more}
        quick = [word for word in QUICK if word.partition("=")[0] not in named]
        code = script.main([*small_arguments, *quick, *needed.get(name, ()), *more, *where])
        return Outcome(code, *capfd.readouterr())

    return call


@pytest.fixture
def base(untrained_base, tmp_path) -> Path:
    """A copy of the small base that the test may damage."""
    return shutil.copytree(untrained_base, tmp_path / "base")


@pytest.fixture
def data(tmp_path) -> Callable[[list], Path]:
    """Return a function that writes rows as a JSON Lines file and returns its path."""
    return lambda rows, name="rows.jsonl": write_rows(tmp_path / name, rows)


def pytest_addoption(parser):
    parser.addoption(
        "--all-mutations", action="store_true", help="all mutations, and four stages on twelve"
    )


OUTCOMES = pytest.StashKey[Counter]()
"""Count of mutations by (what they are of, what was expected, what happened)."""


def pytest_configure(config):
    config.stash[OUTCOMES] = Counter()


def pytest_terminal_summary(terminalreporter, config):
    for (subject, expected, outcome), count in sorted(config.stash[OUTCOMES].items()):
        terminalreporter.write_line(f"{subject}, expected {expected}: {count} {outcome}")


def pytest_collection_modifyitems(config, items):
    """Deselect, rather than skip, what only `make test-mutations` draws mutations for."""
    if not config.getoption("--all-mutations", False):
        undrawn = [item for item in items if item.name.startswith("test_all_four_stages")]
        items[:] = [item for item in items if item not in undrawn]
        config.hook.pytest_deselected(items=undrawn)
