"""Which checkpoint `--model` names, and whether it can be talked to. No torch.

An adapter in PEFT's layout is opened on the base that it names: the run's base, or a directory.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from sparselong.checkpoint import check_recorded, take_inventory
from sparselong.config import Config
from sparselong.errors import ConfigError, StageError
from sparselong.files import read_json, why_unusable
from sparselong.run import Stage

COMPRESS, FINETUNE = "02_compress", "03_finetune"
READS = {"base": (), "compressed": (COMPRESS,), "finetuned": (COMPRESS, FINETUNE)}
"""Stages that are read for each of a run's models; the last one made it."""
ADAPTER, MASKS = "adapter_config.json", "masks.safetensors"
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_MERGE = "use --model finetuned, or export the whole model: python 05_export.py --to mxfp4"


class Source(NamedTuple):
    """What is opened.

    Attributes:
        directory: of a whole checkpoint.
        adapter: directory of the adapter that is merged into it, if one was named.
    """

    directory: Path
    adapter: Path | None = None


def reads_of(model: str) -> tuple[str, ...]:
    """Return the stages that a model needs; none if it is a directory."""
    return READS.get(model, ())


def check_named(model: str) -> None:
    """Raise ConfigError unless this is one of a run's models, or a directory that can be opened."""
    if model in READS:
        return
    if not os.path.isdir(model):
        raise ConfigError(
            f"--model {model} cannot be opened",
            f"{', '.join(READS)}, or a directory with a checkpoint or an adapter",
            why_unusable(model, "directory"),
            "correct it",
        )
    if _is_adapter(Path(model)):
        _check_adapter(Path(model))


def find_model(stage: Stage, model: str) -> Source:
    """Return what is opened; a base is downloaded or built if it is not there.

    Raises:
        StageError: it is not what its stage recorded, or the base cannot be had.
    """
    if model == "base":
        return Source(_find_base(stage))
    if model not in READS:
        path = Path(model)
        return Source(_base_of(path, stage), path) if _is_adapter(path) else Source(path)
    name, directory = READS[model][-1], Path(place_of(stage, model))
    check_recorded(take_inventory(directory), stage.manifests[name]["outputs"], name)
    return Source(directory)


def place_of(stage: Stage, model: str) -> str | Path:
    """Return where a model is: a directory, or a base's name."""
    if model == "base":
        return stage.config.model.base
    return stage.run_dir / READS[model][-1] / "model" if model in READS else model


def name_of(stage: Stage, model: str) -> str:
    """Return what the model is called: the run's name and which of its models it is."""
    return f"{stage.run_dir.name}/{model}" if model in READS else Path(model).resolve().name


def room_of(config: Config, context: int | None) -> int:
    """Return how many tokens a conversation may have: `--context`, or the trained length."""
    return config.sequence_len if context is None else context


def check_room(source: Source, tokens: int) -> None:
    """Raise StageError if a conversation may have more tokens than a checkpoint has positions."""
    path = source.directory / "config.json"
    positions = read_json(path).get("max_position_embeddings") if path.is_file() else None
    if isinstance(positions, int) and tokens > positions:
        raise StageError(
            f"{source.directory.name} cannot hold a conversation of {tokens:,} tokens",
            f"at most the model's {positions:,} positions",
            f"{tokens:,}",
            "pass a smaller --context",
        )


def _is_adapter(path: Path) -> bool:
    return (path / ADAPTER).exists() and not (path / "config.json").exists()


def _check_adapter(path: Path) -> None:
    """Raise ConfigError unless an adapter is a low-rank change of attention alone."""
    if (path / MASKS).exists():
        raise ConfigError(
            f"--model {path} was trained through mask and rounding: it is no change of a base",
            "an adapter that 05_export.py --to adapter or PEFT wrote",
            f"{MASKS} beside it",
            _MERGE,
        )
    config = read_json(path / ADAPTER)
    names = config.get("target_modules") or []
    others = set(config.get("target_parameters") or ())
    others |= {name.rpartition(".")[2] for name in names} - ATTENTION
    if config.get("peft_type") != "LORA" or not isinstance(names, list) or others:
        raise ConfigError(
            f"--model {path} is an adapter of more than attention",
            f"LoRA on {', '.join(sorted(ATTENTION))}: experts stay packed and cannot take others",
            f"{config.get('peft_type')} on {', '.join(sorted(others)) or names}",
            _MERGE,
        )


def _base_of(adapter: Path, stage: Stage) -> Path:
    """Return the base that an adapter names.

    Raises:
        StageError: it is neither a directory nor the base of the run.
    """
    named = read_json(adapter / ADAPTER).get("base_model_name_or_path")
    if isinstance(named, str) and os.path.isdir(named):
        return Path(named)
    if named == stage.config.model.base:
        return _find_base(stage)
    raise StageError(
        f"the base of the adapter {adapter} is not the one of this run",
        f"model.base={stage.config.model.base}, or a directory",
        str(named),
        f"pass model.base={named}, or the config that the adapter was trained with",
    )


def _find_base(stage: Stage) -> Path:
    from sparselong.tiny import resolve_base

    return resolve_base(stage.config, stage.run_dir, stage.log)
