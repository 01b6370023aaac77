"""Finding the base checkpoint that a config names: built, downloaded or local."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparselong.checkpoint import DOWNLOADED
from sparselong.config import Config
from sparselong.errors import StageError
from sparselong.files import is_local, why_unusable

if TYPE_CHECKING:
    from sparselong.tiny.build import TinySpec


def resolve_base(config: Config, run_dir: Path, progress: Callable[[str], None]) -> Path:
    """Return the local directory of the base checkpoint.

    `tiny` is built once under the run directory, a hub name is downloaded once into the hub's
    cache, and a local directory is used as it is.

    Raises:
        StageError: there is no such directory, or the hub cannot be reached or has no such name.
    """
    if config.model.base == "tiny":
        from sparselong.tiny.build import build_tiny  # imports torch

        return build_tiny(run_dir / "base", _tiny_spec(config), config.seed, progress)
    if os.path.isdir(config.model.base):
        return Path(config.model.base)
    if is_local(config.model.base):
        raise StageError(
            f"the base model's directory {config.model.base} cannot be opened",
            "a directory with a gpt-oss checkpoint",
            why_unusable(config.model.base, "directory"),
            "correct model.base: a directory, or a hub name such as openai/gpt-oss-20b",
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                config.model.base,
                revision=config.model.revision,
                allow_patterns=list(DOWNLOADED),
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, ConnectionError) as error:
        raise StageError(
            f"base model {config.model.base} is not local and could not be downloaded",
            "a local directory, or a hub name that can be reached",
            " ".join(str(error).split()),
            "check the name and the network (HF_HUB_OFFLINE must be unset), or download it "
            "elsewhere and set model.base to its directory",
        ) from error


def find_tiny(config: Config, run_dir: Path) -> Path | None:
    """Return the small model's directory if the run already has the one that is configured."""
    folder = run_dir / "base"
    if not (folder / "tiny.json").is_file():
        return None
    from sparselong.tiny.build import is_built  # imports torch

    return folder if is_built(folder, _tiny_spec(config), config.seed) else None


def early_tokenizer(config: Config, run_dir: Path) -> Any:
    """Return the tokenizer that the small model will have; None if the base is built or another.

    Rows can thus be refused before the model is trained.

    Raises:
        StageError: there is no text to train the tokenizer on.
    """
    if config.model.base != "tiny" or find_tiny(config, run_dir):
        return None
    from sparselong.tiny.build import build_tokenizer  # imports torch

    tokenizer = build_tokenizer(_tiny_spec(config))
    tokenizer.name_or_path = str(run_dir / "base")
    return tokenizer


def _tiny_spec(config: Config) -> TinySpec:
    from sparselong.tiny.build import TinySpec

    return TinySpec(layers=config.model.tiny_layers, steps=config.model.tiny_steps)
