"""Show one conversation of a file as stage 03 would train on it, for `--preview FILE:LINE`.

Nothing is downloaded, built or written. Imports what is heavy only after file and line are found.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sparselong.checkpoint import TOKENIZER
from sparselong.config import Config
from sparselong.data import conversations, rendering_date
from sparselong.errors import ConfigError, StageError
from sparselong.memory import find_config
from sparselong.run import read_manifest


def preview_line(config: Config, run_dir: Path, place: str) -> dict[str, Any]:
    """Return a conversation as text with its supervised tokens marked.

    Args:
        config: the run's config.
        run_dir: the run directory; it need not exist.
        place: FILE:LINE, with lines counted from 1.

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
            "FILE:LINE, with lines counted from 1",
            place,
            f"for example --preview {run_dir / 'data' / 'train.jsonl'}:1",
        )
    path, line = Path(name), int(number)
    conversation = conversations.read_line(path, line)
    folder = _find_tokenizer(config, run_dir)

    from sparselong.finetune.supervision import label, preview
    from sparselong.model import load_tokenizer

    tokenizer, today = load_tokenizer(folder), rendering_date(config, run_dir, record=False)
    train_on = config.data.train_on
    tokens, supervised = conversations.tokenize(conversation, tokenizer, train_on, today)
    used = len(tokens) <= config.sequence_len and any(supervised[1:])
    summary = f"{path}, line {line}: {len(tokens):,} tokens, {sum(supervised):,} supervised"
    if len(tokens) > config.sequence_len:
        summary += f"; left out: longer than sequence_len {config.sequence_len:,}"
    elif not used:
        summary += "; left out: nothing to learn"
    return {
        "file": str(path),
        "line": line,
        "tokens": len(tokens),
        "supervised": sum(supervised),
        "used": used,
        "text": f"{summary}\n{preview([label(tokens, supervised)], tokenizer)}",
    }


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
