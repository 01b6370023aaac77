"""Everything that stage 02 reads, opened and checked before any work.

Stage 02 calls `check_early`, which needs no torch, and then `open_inputs`. Stage 01 takes the same
steps one by one, so that its verdict is that of stage 02. Reading headers, opening the tokenizer
and encoding the rows takes seconds, and on a resumed run the same seconds again: whatever changed
in between is found before it is mixed with finished work.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sparselong.config import Config
from sparselong.data import Encoded, EncodedFiles, conversations, encode_files, select_usable
from sparselong.errors import StageError
from sparselong.memory import find_config, read_base_config
from sparselong.tiny.base import early_tokenizer, resolve_base

if TYPE_CHECKING:
    from transformers import GptOssConfig, PreTrainedTokenizerBase

    from sparselong.checkpoint import Checkpoint


class Inputs(NamedTuple):
    """An opened and checked base checkpoint, its tokenizer and the encoded conversations."""

    base: Checkpoint
    architecture: GptOssConfig
    tokenizer: PreTrainedTokenizerBase
    encoded: EncodedFiles


def check_early(config: Config, run_dir: Path) -> None:
    """Raise for every fault that is known without torch: config.json, tokenizer files, rows.

    A base that is not on this machine yet is left out. The data files are prepared.

    Raises:
        StageError: a file is missing or damaged, or a row is malformed.
    """
    from sparselong.model import check_tokenizer_files

    path = find_config(config.model)
    if path is not None:
        read_base_config(path)
        if path.parent == Path(config.model.base):  # a cached snapshot may still be incomplete
            check_tokenizer_files(path.parent)
    check_rows(config, run_dir)


def open_inputs(
    config: Config,
    run_dir: Path,
    progress: Callable[[str], None],
    rows_refused: Callable[[], None] | None = None,
) -> Inputs:
    """Return the base and its tokenizer after checking them and all rows.

    Args:
        config: names them.
        run_dir: the run directory.
        progress: receives what is to be told.
        rows_refused: called before the error if it is the rows that are refused.

    Raises:
        StageError: the base cannot be found or built, a file is missing or damaged, the parts do
            not fit together, or a row cannot be encoded.
    """
    train, validation = check_rows(config, run_dir)
    progress(f"{train:,} training and {validation:,} validation conversations")
    early = early_tokenizer(config, run_dir)
    if early is not None:  # the small model takes minutes to train
        _encode_rows(config, run_dir, early, rows_refused)
    base, architecture = open_base(resolve_base(config, run_dir, progress))
    tokenizer = open_tokenizer(base.directory)
    encoded, left_out = _encode_rows(config, run_dir, tokenizer, rows_refused)
    for sentence in left_out:
        progress(sentence)
    return Inputs(base, architecture, tokenizer, encoded)


def check_rows(config: Config, run_dir: Path) -> tuple[int, int]:
    """Prepare the data files and return their numbers of training and validation conversations.

    Raises:
        StageError: a source is missing or has changed, or a row is malformed.
    """
    train, validation = conversations.prepare(config, run_dir)
    return len(conversations.read(train)), len(conversations.read(validation))


def open_base(directory: Path) -> tuple[Checkpoint, GptOssConfig]:
    """Return a base checkpoint and its architecture after checking every header.

    Raises:
        StageError: a file is missing or damaged, or it is not a base gpt-oss.
    """
    # Here because they import torch, which refusals of `check_early` do not wait for.
    from sparselong.checkpoint import Checkpoint, open_upstream

    read_base_config(directory / "config.json")
    base = Checkpoint(directory)
    return base, open_upstream(base)


def open_tokenizer(directory: Path) -> Any:
    """Return a base's tokenizer after checking that it works and fits the model.

    Raises:
        StageError: see `load_tokenizer`.
    """
    from sparselong.model import load_tokenizer

    return load_tokenizer(directory)


def encode_rows(config: Config, run_dir: Path, tokenizer: Any) -> tuple[EncodedFiles, list[str]]:
    """Return the encoded conversations, and what is to be told about what is left out.

    Raises:
        StageError: a row cannot be rendered, no row of a file can be used, or the training rows are
            too few to calibrate with.
    """
    encoded = encode_files(config, run_dir, tokenizer)
    _check_calibration(config, encoded.train)
    return encoded, select_usable(encoded, config.sequence_len).left_out


def _encode_rows(
    config: Config, run_dir: Path, tokenizer: Any, rows_refused: Callable[[], None] | None
) -> tuple[EncodedFiles, list[str]]:
    """Return what `encode_rows` does; call `rows_refused` before its error."""
    try:
        return encode_rows(config, run_dir, tokenizer)
    except StageError:
        if rows_refused is not None:
            rows_refused()
        raise


def _check_calibration(config: Config, train: Encoded) -> None:
    """Raise unless the training rows together fill one calibration sequence."""
    found, wanted = sum(count.tokens for count in train.counts), config.calibration.sequence_len
    if found < wanted:
        raise StageError(
            "the calibration data is shorter than one sequence",
            f"at least {wanted} tokens (calibration.sequence_len)",
            f"{found} tokens in {len(train)} conversations of "
            f"{' and '.join(share.source for share in config.data.shares)}",
            "use more training data, or lower calibration.sequence_len",
        )
