"""Which directory a run may use: none that holds other things, or that a stage reads.

A stage replaces `config.yaml`, the data and its own directory. So whatever bears one of these names
in the run directory must be what Sparse-Long has written; nothing else is overwritten or deleted.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparselong.config import UTF8_FIX, Config, check_place, is_resolved, load
from sparselong.errors import ConfigError, StageError
from sparselong.files import load_json, reason_of
from sparselong.run.stages import STAGES, redo_command, stage_hash

MANIFEST, STARTED = "manifest.json", "started.json"
_MARKS = {"data": "source.json", "base": "tiny.json"}
"""Folders that stages write in the run directory, with a file that shows that it was a stage."""
_BESIDE = frozenset(
    {*_MARKS, "cache", "lost+found"}
    | {f"{name}{end}" for name in ("date.txt", "report.html") for end in ("", ".partial")}
)
"""Other things that stages write in the run directory before they begin, and that disks have."""
_NOTES = (".log", ".txt", ".out", ".err", ".md")
"""How files end that people keep beside a run."""
_MANIFEST_KEYS = {
    **{"stage": str, "status": str, "config_hash": str, "seconds": (int, float)},
    **{"metrics": dict, "inputs": list, "outputs": list},
}
_MANIFEST_OBJECTS = ("config", "made_from", "hardware", "peak_bytes")
"""Keys of a manifest that are objects if they are there."""


def find_run_dir(text: str | None, config: str) -> Path:
    """Return the run directory of the command line.

    Args:
        text: the argument of --run-dir; None takes `runs/<name of the config file>`.
        config: the argument of --config.

    Raises:
        ConfigError: a name is blank, begins with a hyphen or cannot be a path.
    """
    _check_name("--config", config, "pass --config configs/tiny.yaml, or another file")
    fix = "pass another --run-dir, such as runs/NAME"
    if text is not None:
        return Path(_check_name("--run-dir", text, fix))
    name = Path(config).stem
    if name in ("", ".", ".."):
        raise ConfigError("--run-dir is missing", "a name for the run", f"--config {config}", fix)
    return Path(_check_name("--run-dir", f"runs/{name}", fix))


def _check_name(option: str, text: str, fix: str) -> str:
    """Return an option's path, with its home directory expanded."""
    fault = ""
    try:
        text.encode()
        text = check_place(text)
    except UnicodeEncodeError:
        fault, fix = "a path in UTF-8", UTF8_FIX
    except ValueError as error:
        fault = str(error)
    if text.startswith("-"):
        fault = "a name that does not look like an option"
    if fault:
        raise ConfigError(f"{option} cannot be used", fault, ascii(text), fix)
    return text


def check_run_dir(config: Config, run_dir: Path, config_file: str) -> None:
    """Raise if a directory holds what is not the run's, or a stage reads or has written it.

    Args:
        config: names what the stages read.
        run_dir: the run directory, which need not exist.
        config_file: the argument of --config.

    Raises:
        ConfigError: it may not be the run directory.
    """
    _refuse_overlap(config, run_dir)
    _refuse_occupied(config, run_dir, config_file)


def _refuse_overlap(config: Config, run_dir: Path) -> None:
    """Raise if writing the run directory would touch what a stage reads, or another run.

    Raises:
        ConfigError: the directory is that of the base model or of a stage, or is inside of it, or a
            stage would replace the base model or the data.
    """
    try:
        place = run_dir.resolve()
        place.as_posix().encode()
    except (OSError, RuntimeError, UnicodeEncodeError) as error:
        raise _overlap(run_dir, "a path that can be resolved", ascii(str(error))) from error
    for folder in (place, *place.parents):
        if _stage_name(folder) in STAGES and any(
            (folder / n).exists() or any(folder.glob(f"*/{n}")) for n in (MANIFEST, STARTED)
        ):
            raise _overlap(run_dir, "a directory outside of any stage's", f"{folder} is a stage's")
    base = Path(config.model.base)
    if os.path.isdir(base) and place.is_relative_to(base.resolve()):
        raise _overlap(run_dir, "a directory outside of model.base", f"model.base: {base}")
    for key, name in _sources(config):
        path = Path(name)
        if not os.path.exists(path) or not path.resolve().is_relative_to(place):
            continue
        (first, *_) = (*path.resolve().relative_to(place).parts, "")
        if _stage_name(Path(first)) in STAGES or (first == "data" and key != "model.base"):
            raise _overlap(run_dir, f"{key} outside of folders that the run replaces", str(path))


def _refuse_occupied(config: Config, run_dir: Path, config_file: str) -> None:
    """Raise if a directory without any stage's work holds somebody's things, as a home does.

    Hidden files, notes and logs, and what config and command line name may be there.

    Raises:
        ConfigError: names some of the things.
    """
    if not run_dir.is_dir():
        return
    names = set(os.listdir(run_dir))
    ours = {*STAGES, *(f"{name}.replaced" for name in STAGES), "config.yaml"}
    if names & ours:
        return
    named = [os.path.realpath(path) for path in (config_file, *dict(_sources(config)).values())]
    place = os.path.realpath(run_dir)
    foreign = [
        name
        for name in sorted(names - _BESIDE)
        if not name.startswith(".")
        and not (name.lower().endswith(_NOTES) and (run_dir / name).is_file())
        and not any(Path(path).is_relative_to(Path(place, name)) for path in named)
    ]
    if foreign:
        more = f" and {len(foreign) - 4} more" if len(foreign) > 4 else ""
        expected = "a new or empty directory, or one in which a stage has worked"
        raise _overlap(run_dir, expected, f"{ascii(', '.join(foreign[:4]))[1:-1]}{more}")


def _stage_name(folder: Path) -> str:
    return folder.name.removesuffix(".replaced")


def _sources(config: Config) -> list[tuple[str, str]]:
    return [("model.base", config.model.base), *config.data.named.items()]


def _overlap(run_dir: Path, expected: str, found: str) -> ConfigError:
    return ConfigError(
        f"{ascii(str(run_dir))[1:-1]} cannot be the run directory",
        expected,
        found,
        "pass another --run-dir, such as runs/NAME",
    )


def refuse_replacing_others(run_dir: Path, stage: str, part: str = "") -> None:
    """Raise if something in the run directory that stages replace is not theirs.

    Args:
        run_dir: the run directory.
        stage: the stage that is about to begin.
        part: the part of it that is; others' directories are not looked at.

    Raises:
        StageError: names the file or folder.
    """
    names = [*STAGES, *(f"{name}.replaced" for name in STAGES)]
    folders = [run_dir / name for name in names if (run_dir / name).exists()]
    if part:
        names = [part, f"{part}.replaced"]
        folders += [path for name in names if (path := run_dir / stage / name).exists()]
    for folder in folders:
        if not _is_a_stages(folder):
            raise _foreign(folder, f"nothing, or a folder with {STARTED} or {MANIFEST}")
    path = run_dir / "config.yaml"
    if path.exists() and not _is_ours(path):
        raise _foreign(path, "nothing, or the config that a stage has written")
    for name in ("data", "base", "cache"):
        if (run_dir / name).exists() and not (run_dir / name).is_dir():
            raise _foreign(run_dir / name, "nothing, or a folder")
    if folders or path.exists():
        return
    for name, mark in _MARKS.items():
        if (run_dir / name).exists() and not (run_dir / name / mark).exists():
            raise _foreign(run_dir / name, f"nothing, or a folder with {mark}")


def _is_a_stages(folder: Path) -> bool:
    """Return whether a stage made the folder; one that was killed at once left at most a log."""
    if not folder.is_dir():
        return False
    if folder.name in STAGES and STAGES[folder.name].parts:
        return True  # the stage replaces only the directories of its parts
    names = {path.name for path in folder.iterdir()}
    return bool(names & {STARTED, MANIFEST}) or names <= {"log.txt", f"{STARTED}.partial"}


def _is_ours(path: Path) -> bool:
    """Return whether a config.yaml is as a stage writes it, without comments."""
    try:
        return is_resolved(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return False


def _foreign(path: Path, expected: str) -> StageError:
    return StageError(
        f"{path} was not written by a stage and would be replaced",
        expected,
        "something else",
        "pass another --run-dir, or move it away",
    )


def read_document(path: Path) -> dict[str, Any] | None:
    """Return the JSON object of a file in the run directory; None if there is no such file.

    Raises:
        StageError: the file cannot be read, or is no JSON object.
    """
    try:
        return load_json(path)
    except (FileNotFoundError, NotADirectoryError):  # the latter: a file in place of a run
        return None
    except (OSError, ValueError) as error:
        raise _damaged(path, "a JSON object", reason_of(error)) from error


def check_manifest(path: Path, name: str, manifest: dict[str, Any]) -> None:
    """Raise unless a manifest has the keys of a finished stage or part.

    Raises:
        StageError: a key is missing or has another type, or the manifest is another stage's.
    """
    wrong = [key for key, kind in _MANIFEST_KEYS.items() if not isinstance(manifest.get(key), kind)]
    wrong += [key for key in _MANIFEST_OBJECTS if not isinstance(manifest.get(key, {}), dict)]
    if wrong:
        raise _damaged(path, f"{', '.join(_MANIFEST_KEYS)}", f"no valid {', '.join(wrong)}")
    if manifest["stage"] != name:
        raise _damaged(path, f"the manifest of {name}", f"that of {manifest['stage']}")
    if STAGES[name].parts:
        _check_part(path, manifest)
    rows = [*manifest["inputs"], *manifest["outputs"]]
    if not all(map(_is_row, rows)):
        raise _damaged(path, "path, bytes and sha256 of each file", "other rows")


def _is_row(row: Any) -> bool:
    """Return whether a value is as `provenance.describe_files` describes a file."""
    if not isinstance(row, dict) or "bytes" not in row:
        return False
    return row.get("path") != "" and all(isinstance(row.get(k), str) for k in ("path", "sha256"))


def _check_part(path: Path, manifest: dict[str, Any]) -> None:
    """Raise unless a manifest is that of the part whose directory it is in, with its options."""
    part, options = manifest.get("part"), manifest.get("options")
    if part != path.parent.name:
        raise _damaged(path, f"the manifest of {path.parent.name}", f"that of {part}")
    if not isinstance(options, dict) or not all(isinstance(one, str) for one in options.values()):
        raise _damaged(path, "the options of the part by name", "something else")


def check_started(path: Path, started: dict[str, Any]) -> None:
    """Raise unless a started.json names the config of the work that it began.

    Raises:
        StageError: a key is missing or has another type.
    """
    if not isinstance(started.get("config_hash"), str):
        raise _damaged(path, "the hash of a config", "none")
    if not isinstance(started.get("made_from", {}), dict):
        raise _damaged(path, "hashes of the results that it was made from", "something else")


def _damaged(path: Path, expected: str, found: str) -> StageError:
    return StageError(
        f"{path} is damaged, or was not written by Sparse-Long",
        expected,
        found,
        f"restore the file, redo it: {redo_recorded(path.parent)}, or pass another --run-dir",
    )


def redo_recorded(folder: Path) -> str:
    """Return the command that redoes the result in a directory of a stage or part.

    A part's options are those that its files record, as far as they can be read.
    """
    if folder.name in STAGES:
        return redo_command(folder.name)
    for name in (MANIFEST, STARTED):
        try:
            options = load_json(folder / name).get("options")
        except (OSError, ValueError):
            continue
        if isinstance(options, dict):
            return redo_command(folder.parent.name, folder.name, options)
    return redo_command(folder.parent.name, folder.name)


def pass_recorded(
    run_dir: Path, name: str, work: Mapping[str, Any], reads: tuple[str, ...] | None = None
) -> str:
    """Return the advice to pass the config of earlier work: the run's, if it is that one.

    Args:
        run_dir: the run directory.
        name: the stage.
        work: the earlier work's manifest.json or started.json.
        reads: the earlier stages that it reads; None: those of the table.
    """
    path, advice = run_dir / "config.yaml", "pass what it was made with"
    try:
        recorded = stage_hash(load(path), name, reads)
    except ConfigError:
        return advice
    if recorded != work["config_hash"]:
        return advice
    return f"{advice}: {shlex.join(['--config', str(path), '--run-dir', str(run_dir)])}"


def show_options(part: Any, options: Any) -> str:
    """Return a part and its options as on the command line."""
    shown = {"to": part, **(options if isinstance(options, dict) else {})}
    return " ".join(f"--{name} {value}" for name, value in shown.items())
