"""The page: one file without scripts that loads nothing, in light and dark, narrow and wide."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path

from sparselong.errors import StageError
from sparselong.files import reason_of, write_atomically
from sparselong.report.asked import asked
from sparselong.report.compression import compression
from sparselong.report.elements import Markup, element, note, stylesheet
from sparselong.report.environment import environment
from sparselong.report.evaluation import evaluation
from sparselong.report.exported import exported
from sparselong.report.machine import checks, memory
from sparselong.report.overview import overview, summary
from sparselong.report.samples import samples
from sparselong.report.source import COMPRESS, EVAL, EXPORT, FINETUNE, HEALTH, Run, open_run
from sparselong.report.training import training

PAGE = "report.html"
_GENERATOR = "sparselong.report"
_MARK = f'<meta name="generator" content="{_GENERATOR}">'
"""How a page that this module wrote is known from one that a person put there."""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""The browser runs no script of the page and loads nothing for it, whatever texts it shows."""
_SECTIONS: tuple[tuple[str, str, str, Callable[[Run], list[Markup]]], ...] = (
    ("asked", "What was asked", "", asked),
    ("checks", "Checks of the machine", HEALTH, checks),
    ("memory", "Memory and time", "", memory),
    ("compression", "Compression", COMPRESS, compression),
    ("training", "Fine-tuning", FINETUNE, training),
    ("evaluation", "Evaluation", EVAL, evaluation),
    ("samples", "Samples side by side", EVAL, samples),
    ("exports", "Exports", EXPORT, exported),
    ("environment", "Environment", "", environment),
)
"""Anchor, title, the stage that must be done (if any), and what makes the section."""


def write_page(run_dir: Path) -> Path:
    """Write `report.html` about every finished stage of a run, and return its path.

    Raises:
        StageError: no stage is done, a manifest is damaged, the file in its place is another's, or
            it cannot be written.
    """
    path = run_dir / PAGE
    text = render(open_run(run_dir))
    again = f"then run python -m sparselong.report {run_dir}"
    try:
        if path.exists() and _MARK not in path.read_text(encoding="utf-8", errors="replace"):
            raise StageError(
                f"{path} was not written by Sparse-Long and would be replaced",
                f"nothing, or a page with {_MARK}",
                "something else",
                f"move it away, {again}",
            )
        write_atomically(path, text)
    except OSError as error:
        raise StageError(
            f"{path} cannot be written",
            "free disk space, and a file that this user can replace",
            reason_of(error),
            f"correct it, {again}",
        ) from error
    return path


def render(run: Run) -> str:
    """Return the page about a run as HTML."""
    done = {name.partition("/")[0] for name in run.manifests}
    sections = [section for section in _SECTIONS if not section[2] or section[2] in done]
    links = [element("a", title, href=f"#{anchor}") for anchor, title, _, _ in sections]
    bodies = [
        element("section", element("h2", title), _make(title, make, run), id=anchor)
        for anchor, title, _, make in sections
    ]
    head = overview(run, _make("The summary", summary, run))  # it names all problems
    now = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    footer = element(
        "footer",
        f"Written {now} from {run.directory.resolve()}. Exact figures: manifest.json in each "
        "stage's directory, 03_finetune/metrics.jsonl, 04_eval/results.json.",
    )
    body = element("body", element("nav", links), element("main", head, bodies, footer))
    return f"<!doctype html>\n{element('html', _head(run), body, lang='en')}\n"


def _make(title: str, make: Callable[[Run], list[Markup]], run: Run) -> list[Markup]:
    """Return a section; if a stage's files hold values that it cannot show, say so instead."""
    try:
        return make(run)
    except Exception as error:  # one edited figure would otherwise cost the whole page
        fault = f"{title} cannot be shown: {type(error).__name__}: {error}"
        run.problems.append(f"{fault}.")
        return [note(fault)]


def _head(run: Run) -> Markup:
    style = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
    return element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="generator", content=_GENERATOR),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("title", f"{run.name} · Sparse-Long"),
        stylesheet(style),
    )
