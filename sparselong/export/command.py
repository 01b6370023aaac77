"""The options of stage 05: which formats to make, and of which model. No torch."""

from __future__ import annotations

import argparse

from sparselong.errors import ConfigError
from sparselong.export.formats import FORMATS, find_format
from sparselong.export.inputs import ORIGIN, ORIGINS
from sparselong.run import Choice, Part, Stage


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add `--to` and `--from`."""
    names = [each.name for each in FORMATS]
    parser.add_argument(
        "--to", nargs="+", action="extend", metavar="FORMAT", help=f"any of {', '.join(names)}"
    )
    text = "the model to export (default %(default)s)"
    parser.add_argument(
        f"--{ORIGIN}", dest="origin", choices=ORIGINS, default="finetuned", help=text
    )


def choose_parts(arguments: argparse.Namespace) -> list[Part]:
    """Return a part for each format that the command line names.

    `--to` takes all words that follow it, so config overrides among them are moved to where they
    belong; no format's name contains "=".

    Raises:
        ConfigError: no format is named, or one that there is not.
    """
    words: list[str] = arguments.to or []
    arguments.overrides += [word for word in words if "=" in word]
    names = list(dict.fromkeys(word for word in words if "=" not in word))
    if not names:
        listed = ", ".join(each.name for each in FORMATS)
        raise ConfigError(
            "--to is missing", f"one or more of {listed}", "no format", "for example --to mxfp4"
        )
    reads, options = ORIGINS[arguments.origin], {ORIGIN: arguments.origin}
    return [Part(find_format(name).name, reads, dict(options)) for name in names]


CHOICE = Choice(add_options, choose_parts)


def check_formats(stages: list[Stage]) -> None:
    """Raise ConfigError if the run cannot give one of the formats."""
    for stage in stages:
        find_format(stage.part).check(stage)
