"""Show conversations as stage 03 would train on them, for `--preview N` and `--preview FILE:LINE`.

Nothing is downloaded, built or written. Imports what is heavy only after file and line are found.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from sparselong.checkpoint import TOKENIZER
from sparselong.config import Config
from sparselong.data import (
    conversations,
    encode_files,
    rendering_date,
    warn_before_training,
)
from sparselong.errors import ConfigError, StageError
from sparselong.memory import find_config
from sparselong.run import read_manifest


def preview_line(config: Config, run_dir: Path, place: str) -> dict[str, Any]:
    """Return a conversation as text with its supervised tokens marked.

    Args:
        config: the run's config.
        run_dir: the run directory; it need not exist.
        place: FILE:LINE, with lines counted from 1 (of Parquet, rows).

    Returns:
        `file`, `line`, `tokens` and `supervised` (counts), `used` (whether the conversation is
        trained on) and `text`.

    Raises:
        ConfigError: `place` is not FILE:LINE.
        StageError: there is no such row, it cannot be used, or the base model's tokenizer is not
            on this machine.
    """
    name, _, number = place.rpartition(":")
    if not name or not re.fullmatch(r"0*[1-9][0-9]{0,17}", number, re.ASCII):
        raise ConfigError(
            f"--preview {place} does not name a line",
            "a number of conversations, or FILE:LINE with lines counted from 1",
            place,
            f"for example --preview {run_dir / 'data' / 'train.jsonl'}:1",
        )
    path, line = Path(name), int(number)
    conversation = conversations.read_line(path, line)
    return _show([conversation], config, run_dir, _open_tokenizer(config, run_dir))[0]


def preview_first(config: Config, run_dir: Path, count: int) -> dict[str, Any]:
    """Return the first training conversations as text with their supervised tokens marked.

    Args:
        config: the run's config.
        run_dir: the run directory, which need not exist and is not changed.
        count: number of conversations; fewer if there are no more.

    Returns:
        `conversations`, for each what `preview_line` returns without its text; `remarks`, what
        was noticed in the sources, and evaluation items among the rows; and `text`.

    Raises:
        ConfigError: the count is 0.
        StageError: the data cannot be read, a row of it cannot be used, or the base model's
            tokenizer is not on this machine.
    """
    if count < 1:
        fix = "for example --preview 3"
        raise ConfigError("--preview 0 shows nothing", "a number from 1", "0", fix)
    with tempfile.TemporaryDirectory() as scratch:
        prepared, copy = run_dir / "data", Path(scratch) / "data"
        if prepared.is_dir():  # so that sources which an earlier stage has read are not read again
            copy.mkdir()
            for path in (*prepared.glob("*.json"), *prepared.glob("*.jsonl")):
                shutil.copy2(path, copy)
        train = conversations.prepare(config, Path(scratch)).train
        tokenizer = _open_tokenizer(config, run_dir)
        encode_files(config, Path(scratch), tokenizer)  # refuses what stage 02 would refuse
        shown = _show(conversations.read(train)[:count], config, run_dir, tokenizer)
        remarks = [*conversations.read_remarks(Path(scratch))]
        remarks += [f"warning: {each}" for each in warn_before_training(config, train, tokenizer)]
    text = "\n".join([*(each.pop("text") for each in shown), *remarks])
    return {"conversations": shown, "remarks": remarks, "text": text}


def _open_tokenizer(config: Config, run_dir: Path) -> Any:
    folder = _find_tokenizer(config, run_dir)

    from sparselong.model import load_tokenizer

    return load_tokenizer(folder)


def _is_coloured() -> bool:
    """Return whether stdout is a terminal that shows colours, and nobody asked for none."""
    is_plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return sys.stdout.isatty() and not is_plain


def _show(
    rows: list[conversations.Conversation], config: Config, run_dir: Path, tokenizer: Any
) -> list[dict[str, Any]]:
    """Return what `preview_line` does, for each of several conversations."""
    from sparselong.finetune.supervision import label, preview

    today = rendering_date(config, run_dir, record=False)
    shown = []
    for row in rows:
        tokens, supervised = conversations.tokenize(row, tokenizer, config.data.train_on, today)
        used = len(tokens) <= config.sequence_len and any(supervised[1:])
        summary = f"{conversations.locate(row)}: {len(tokens):,} tokens, "
        summary += f"{sum(supervised):,} supervised"
        if len(tokens) > config.sequence_len:
            summary += f"; left out: longer than sequence_len {config.sequence_len:,}"
        elif not used:
            summary += "; left out: nothing to learn"
        text = preview([label(tokens, supervised)], tokenizer, colour=_is_coloured())
        origin = row["origin"]
        shown.append(
            {
                "file": origin["source"],
                "line": origin.get("line", origin.get("row")),
                "tokens": len(tokens),
                "supervised": sum(supervised),
                "used": used,
                "text": f"{summary}\n{text}",
            }
        )
    return shown


def _find_tokenizer(config: Config, run_dir: Path) -> Path:
    """Return a directory of this machine that has the base model's tokenizer."""
    base = config.model.base
    described = run_dir / "base" / "config.json" if base == "tiny" else find_config(config.model)
    known = [described.parent] if described else []
    compressed = read_manifest(run_dir, "02_compress")
    if compressed and compressed["config"]["model"] == config.model.model_dump(mode="json"):
        known.append(run_dir / "02_compress" / "model")
    for folder in known:
        if (folder / TOKENIZER).is_file():
            return folder
    raise StageError(
        f"the tokenizer of {base} is not on this machine",
        f"{TOKENIZER} in {' or '.join(map(str, known)) or 'the hub cache'}",
        "no such file",
        "run python 02_compress.py first",
    )
