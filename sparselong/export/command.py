"""The options of stage 05: which formats to make, and of which model. No torch."""

from __future__ import annotations

import argparse

from sparselong.errors import ConfigError
from sparselong.export.formats import FORMATS, find_format
from sparselong.export.gguf import DENSE_TYPE, DENSE_TYPES, TYPED
from sparselong.export.hub import HUB, REPO, compare_earlier, list_finished
from sparselong.export.inputs import ORIGIN, ORIGINS
from sparselong.run import Choice, Part, Stage

_STAGE = "05_export"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add `--to`, `--from`, `--dense-type` and `--repo`."""
    names = [each.name for each in FORMATS]
    parser.add_argument(
        "--to", nargs="+", action="extend", metavar="FORMAT", help=f"any of {', '.join(names)}"
    )
    text = "the model to export (default %(default)s)"
    parser.add_argument(
        f"--{ORIGIN}", dest="origin", choices=ORIGINS, default="finetuned", help=text
    )
    first = next(iter(DENSE_TYPES))
    text = f"type of the weights beside the experts in gguf and ollama (default {first}): "
    parser.add_argument(
        f"--{DENSE_TYPE}", dest="dense_type", metavar="TYPE", help=text + ", ".join(DENSE_TYPES)
    )
    text = f"repository on the hub for --to {HUB}, made private if there is none"
    parser.add_argument(f"--{REPO}", metavar="OWNER/NAME", help=text)


def choose_parts(arguments: argparse.Namespace) -> list[Part]:
    """Return a part for each format that the command line names.

    `--to` takes all words that follow it, so config overrides among them are moved to where they
    belong; no format's name contains "=".

    Raises:
        ConfigError: no format is named, or an unknown one.
    """
    words: list[str] = arguments.to or []
    arguments.overrides += [word for word in words if "=" in word]
    names = list(dict.fromkeys(word for word in words if "=" not in word))
    if not names:
        listed = ", ".join(each.name for each in FORMATS)
        raise ConfigError(
            "--to is missing", f"one or more of {listed}", "no format", "for example --to mxfp4"
        )
    chosen = [find_format(name).name for name in names]
    typed = [name for name in chosen if name in TYPED]
    _refuse_idle(f"--{DENSE_TYPE}", arguments.dense_type, TYPED, chosen)
    _refuse_idle(f"--{REPO}", arguments.repo, (HUB,), chosen)
    options = {ORIGIN: arguments.origin}
    dense_type = arguments.dense_type
    more = {DENSE_TYPE: next(iter(DENSE_TYPES)) if dense_type is None else dense_type}
    reads = ORIGINS[arguments.origin]
    forms = [name for name in chosen if name != HUB]
    parts = [Part(name, reads, options | (more if name in typed else {})) for name in forms]
    if HUB in chosen:
        uploaded = _choose_uploaded(arguments, forms)
        options |= {"to": " ".join([*uploaded, HUB]), REPO: arguments.repo}
        is_other, is_elsewhere = compare_earlier(arguments.run_dir, _STAGE, options)
        parts.append(Part(HUB, reads, options, is_other, takes_force=not is_elsewhere))
    return parts


def _refuse_idle(
    option: str, value: str | None, wanted: tuple[str, ...], chosen: list[str]
) -> None:
    """Raise if an option is passed that none of the chosen formats has."""
    if value is not None and not {*wanted} & {*chosen}:
        raise ConfigError(
            f"{option} {ascii(value)[1:-1]} has no effect",
            f"--to with {' or '.join(wanted)}",
            f"--to {' '.join(chosen)}",
            f"leave out {option}",
        )


def _choose_uploaded(arguments: argparse.Namespace, forms: list[str]) -> list[str]:
    """Return the formats to upload: those named beside `hub`, or all that are finished.

    They are in the table's order, so that the same ones always are the same upload.

    Raises:
        ConfigError: there is none, or no repository is named.
    """
    if arguments.repo is None:
        raise ConfigError(
            f"--to {HUB}: the repository is missing",
            f"--{REPO} OWNER/NAME",
            f"no --{REPO}",
            f"for example --{REPO} me/my-gpt-oss",
        )
    names = [each.name for each in FORMATS]
    forms = forms or list_finished(arguments.run_dir, _STAGE, arguments.origin, names)
    if not forms:
        raise ConfigError(
            f"--to {HUB}: there is nothing to upload",
            f"other formats beside {HUB}, or finished exports of the {arguments.origin} model",
            f"neither, in {arguments.run_dir / _STAGE}",
            f"for example --to mxfp4 {HUB}",
        )
    return [name for name in names if name in forms]


CHOICE = Choice(add_options, choose_parts)


def check_formats(stages: list[Stage]) -> None:
    """Raise ConfigError if the run cannot give one of the formats."""
    for stage in stages:
        find_format(stage.part).check(stage)
