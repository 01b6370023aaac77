"""Finding the base checkpoint that a config names: built, downloaded or local."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sparselong.config import Config
from sparselong.errors import StageError
from sparselong.files import is_local
from sparselong.tiny.build import TinySpec, build_tiny


def resolve_base(config: Config, run_dir: Path, progress: Callable[[str], None]) -> Path:
    """Return the local directory of the base checkpoint.

    `tiny` is built once under the run directory, a hub name is downloaded once into the hub's
    cache, and a local directory is used as it is.

    Raises:
        StageError: there is no such directory, or the hub cannot be reached or has no such name.
    """
    if config.model.base == "tiny":
        spec = TinySpec(layers=config.model.tiny_layers, steps=config.model.tiny_steps)
        return build_tiny(run_dir / "base", spec, config.seed, progress)
    if Path(config.model.base).is_dir():
        return Path(config.model.base)
    if is_local(config.model.base):
        raise StageError(
            f"the base model's directory {config.model.base} cannot be opened",
            "a directory with a gpt-oss checkpoint",
            "a file" if Path(config.model.base).exists() else "no such directory",
            "correct model.base: a directory, or a hub name such as openai/gpt-oss-20b",
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                config.model.base,
                revision=config.model.revision,
                allow_patterns=["*.json", "*.jinja", "*.txt", "model*.safetensors", "LICENSE"],
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, ConnectionError) as error:
        raise StageError(
            f"base model {config.model.base} is not local and could not be downloaded",
            "a local directory, or a hub name that can be reached",
            str(error).splitlines()[0],
            "check the name and the network (HF_HUB_OFFLINE must be unset), or download it "
            "elsewhere and set model.base to its directory",
        ) from error
