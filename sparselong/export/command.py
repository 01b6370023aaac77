"""The options of stage 05: which formats to make, and of which model. No torch."""

from __future__ import annotations

import argparse

from sparselong.errors import ConfigError
from sparselong.export.formats import FORMATS, find_format
from sparselong.export.gguf import DENSE_TYPE, DENSE_TYPES, TYPED
from sparselong.export.inputs import ORIGIN, ORIGINS
from sparselong.run import Choice, Part, Stage


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add `--to`, `--from` and `--dense-type`."""
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
    if arguments.dense_type is not None and not typed:
        raise ConfigError(
            f"--{DENSE_TYPE} {ascii(arguments.dense_type)[1:-1]} has no effect",
            f"--to with {' or '.join(TYPED)}",
            f"--to {' '.join(chosen)}",
            f"leave out --{DENSE_TYPE}",
        )
    options = {ORIGIN: arguments.origin}
    more = {DENSE_TYPE: arguments.dense_type or next(iter(DENSE_TYPES))}
    return [
        Part(name, ORIGINS[arguments.origin], options | (more if name in typed else {}))
        for name in chosen
    ]


CHOICE = Choice(add_options, choose_parts)


def check_formats(stages: list[Stage]) -> None:
    """Raise ConfigError if the run cannot give one of the formats."""
    for stage in stages:
        find_format(stage.part).check(stage)
