"""Which files in a stage's directory the stage wrote, so that --force deletes no others.

A finished stage's manifest lists its results, and so do a checkpoint's whole.json and an unfinished
export's written.json, all with hashes: a file that was changed since is a person's. Other files are
known by exact names. What is in doubt is kept.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparselong.files import load_json
from sparselong.provenance import are_rows, find_change

_DOCUMENTS = r"(README|LICENSE|NOTICE|USAGE_POLICY)(\.md|\.txt)?"
_SIDE = (
    rf"{_DOCUMENTS}|(generation_|adapter_)?config\.json|"
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json|"
    r"merges\.txt|chat_template\.jinja|additional_chat_templates/[^/]+\.jinja|"
    r"tokenizer(\.\d+)+\.json|(tokenizer|tiktoken)\.model|debug\.log"
)
_MODEL = (
    rf"({_SIDE}|model\.safetensors(\.index\.json)?|model-\d+-of-\d+\.safetensors|"
    r"(dense|tuned)-\d{5}\.safetensors)(\.partial)?"
)
_ADAPTER = rf"{_SIDE}|(adapter_model|masks)\.safetensors|progress\.json"
_CHECKPOINT = (
    rf"{_ADAPTER}|whole\.json|(optimizer|scheduler|scaler)\.pt|rng_state(_\d+)?\.pth|"
    r"(trainer_state|tokens_state)\.json|training_args\.bin"
)
_NAMES: Mapping[str, str] = {
    "01_health": r"report\.(json|md)",
    "02_compress": r"base\.json|"
    r"work/((states|tokens)\.safetensors|(model|ranks|layer-\d+)\.json)|"
    rf"masters/layer-\d+\.safetensors|model(\.partial)?/({_MODEL})",
    "03_finetune": r"axolotl\.yaml|supervision\.txt|metrics\.jsonl|loss\.png|"
    r"(receipt|baked|trained|spent)\.json|tensorboard/events\.out\.tfevents\..+|"
    rf"axolotl/({_ADAPTER})|adapter/({_ADAPTER})|model(\.partial)?/({_MODEL})|"
    rf"checkpoints/(\.unfinished/.+|checkpoint-\d+/({_CHECKPOINT}))",
    "04_eval": r"(base|compressed|finetuned|compared-[0-9a-f]{8})(\.scores)?\.json|"
    r"(results|work)\.json|report\.md|evaluation\.png|states/(whole\.json|\d+\.safetensors)|"
    r"tasks/(demo_hellaswag\.yaml|(demo|ruler)_items\.py|items\.jsonl|__pycache__/.+\.pyc|"
    r"(ruler|niah)_[a-z]+(_\d+)+\.(yaml|jsonl))",
    "05_export/adapter": r"adapter_config\.json|adapter_model\.safetensors",
    "05_export/gguf": r"model\.gguf",
    "05_export/ollama": r"model\.gguf|Modelfile",
    "05_export/hub": r"README\.md",
    **dict.fromkeys(
        ("05_export/mxfp4", "05_export/hf-bf16"),
        rf"(?!{_DOCUMENTS}$)(written\.json|{_MODEL})",  # written.json names the documents
    ),
}
"""Patterns of names in a stage's directory, or in a part's."""
_EVERY = r"log(\.rank\d+)?\.txt|failure(\.rank\d+)?\.json|(started|manifest|machines)\.json"
_PREPARED: Mapping[str, str] = {
    "02_compress": r"base\.json",
    "03_finetune": r"axolotl\.yaml|supervision\.txt|metrics\.jsonl|(receipt|spent)\.json|"
    r"axolotl/.+|tensorboard/[^/]+|wandb/(latest-run|.+\.(wandb|log|txt|json|yaml))",
    "04_eval": r"work\.json|tasks/.+",
}
"""What a stage writes before its work, and makes again whenever it is started."""
_LINKS: Mapping[str, tuple[str, str]] = {
    "02_compress": (r"[^/]+", "model"),
    "03_finetune": (r"best", r"checkpoints/checkpoint-\d+"),
}
"""Name and target of the link that a stage makes for people."""


def has_begun(folder: Path, stage: str) -> bool:
    """Return whether a stage's directory holds more than files that starting it makes again.

    A directory in the place of such a file is more.

    Args:
        folder: the directory of the stage or part.
        stage: the stage's name.
    """
    made_again = re.compile(rf"({_EVERY}|{_PREPARED.get(stage, '')})(\.partial)?")
    for place, folders, names in os.walk(folder):
        for name in (*names, *folders):
            path = Path(place, name)
            is_made_again = made_again.fullmatch(path.relative_to(folder).as_posix()) is not None
            is_directory = path.is_dir() and not path.is_symlink()
            if is_made_again == is_directory:
                return True
    return False


def remove_own(folder: Path, stage: str, part: str = "") -> list[str]:
    """Remove a stage's files and the directories in it that are empty then; follow no links.

    Args:
        folder: the directory of the stage or part, under its own or another name.
        stage: the stage's name.
        part: the part's name, if the stage has parts.

    Returns:
        Sorted relative paths of what is left, because the stage did not write it.
    """
    key = f"{stage}/{part}" if part else stage
    recorded = _recorded(folder, Path(key))
    own, left = [], []
    for place, folders, names in os.walk(folder):
        for name in [*names, *(name for name in folders if Path(place, name).is_symlink())]:
            path = Path(place, name)
            relative = path.relative_to(folder).as_posix()
            if _is_own(path, relative, key, recorded):
                own.append(path)
            else:
                left.append(relative)
    for path in own:
        path.unlink()
    for place, _, _ in os.walk(folder, topdown=False):
        if Path(place) != folder and not os.listdir(place):
            os.rmdir(place)
    return sorted(left)


def keep_others(folder: Path, stage: str, part: str = "") -> str | None:
    """Remove a stage's files, and move the others to a directory `0N_stage.kept-N` beside it.

    Args:
        folder: see `remove_own`.
        stage: see `remove_own`.
        part: see `remove_own`; the directory is then named after the part.

    Returns:
        What is to be told about it; None if there were no others.
    """
    left, name = remove_own(folder, stage, part), part or stage
    if not left:
        if not folder.is_symlink():
            folder.rmdir()
        elif folder.name != name:  # a link named as the stage is a person's: kept
            folder.unlink()
        return None
    number = 1
    while os.path.lexists(kept := folder.with_name(f"{name}.kept-{number}")):
        number += 1
    folder.rename(kept)
    names = ", ".join(ascii(name)[1:-1] for name in left[:4])
    more = f" and {len(left) - 4:,} more" if len(left) > 4 else ""
    count = "1 file" if len(left) == 1 else f"{len(left):,} files"
    return f"kept in {kept}: {count} that {stage} did not write: {names}{more}"


def _recorded(folder: Path, place: Path) -> dict[str, Mapping[str, Any]]:
    """Return rows of the files whose content was recorded, by path relative to the folder."""
    rows = {}
    for record in sorted(folder.glob("checkpoints/**/whole.json")):
        inside = record.parent.relative_to(folder).as_posix()
        files = _read(record).get("files")
        for name, row in files.items() if isinstance(files, dict) else ():
            if isinstance(row, dict) and are_rows([{**row, "path": name}]):
                rows[f"{inside}/{name}"] = row
    written = _read(folder / "written.json").get("files")
    for row in written if isinstance(written, list) and are_rows(written) else ():
        rows[row["path"]] = row
    outputs = _read(folder / "manifest.json").get("outputs")
    for row in outputs if isinstance(outputs, list) and are_rows(outputs) else ():
        path = Path(row["path"])
        if path.is_relative_to(place):
            rows[path.relative_to(place).as_posix()] = row
    return rows


def _read(path: Path) -> dict[str, Any]:
    try:
        return load_json(path)
    except (OSError, ValueError):
        return {}


def _is_own(path: Path, relative: str, key: str, recorded: Mapping[str, Mapping[str, Any]]) -> bool:
    if path.is_symlink():
        name, target = _LINKS.get(key, ("", ""))
        is_named = re.fullmatch(name, relative) and re.fullmatch(target, os.readlink(path))
        return bool(is_named)
    checkpoint = re.match(r"checkpoints/checkpoint-(\d+)/", relative)
    if checkpoint and not _is_step(path.parents[relative.count("/") - 2], int(checkpoint[1])):
        return False
    if relative in recorded:
        return not find_change(path, recorded[relative])
    return re.fullmatch(rf"({_EVERY}|{_NAMES.get(key, '')})(\.partial)?", relative) is not None


def _is_step(checkpoint: Path, number: int) -> bool:
    """Return whether a checkpoint is no copy of another one under a number of its own."""
    return _read(checkpoint / "trainer_state.json").get("global_step") in (None, number)
