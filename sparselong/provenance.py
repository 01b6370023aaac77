"""Provenance of a result for its manifest: files, software, hardware and memory."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata, util
from pathlib import Path
from typing import Any

from sparselong.errors import StageError

PACKAGES = (
    *("torch", "triton", "transformers", "llmcompressor", "compressed-tensors", "axolotl", "peft"),
    *("datasets", "accelerate", "lm-eval", "safetensors", "tokenizers", "pyyaml"),
    *("flash-attn", "ring-flash-attn", "flash-attn-4"),
    *("gguf", "llama-cpp-python", "huggingface-hub"),
)

_ROOT = Path(__file__).resolve().parents[1]
"""The checkout, if the package is not installed elsewhere."""
_HASHED_AT_ONCE = 4
"""Files that are hashed at once; a thread hashes 1 to 2 GB a second."""


def describe_files(
    paths: Iterable[Path], run_dir: Path, known: Iterable[Mapping[str, Any]] = ()
) -> list[dict[str, Any]]:
    """Return path, bytes, mtime_ns and sha256 of every file.

    Args:
        paths: files, and directories that are listed file by file.
        run_dir: paths inside it are relative to it in the result, others absolute.
        known: rows from before. The hash of one is used again for the same file, or a hard link to
            it, if size and time are still the same: a model of 65 GB is read only once.
    """
    hashes = {}
    for row in known:
        status = _status(run_dir / row["path"])
        if status and _is_untouched(status, row):
            hashes[_identity(status)] = row["sha256"]

    def describe(file: Path) -> dict[str, Any]:
        status = file.stat()
        return {
            "path": str(_name_in(file, run_dir)),
            "bytes": status.st_size,
            "mtime_ns": status.st_mtime_ns,
            "sha256": hashes.get(_identity(status)) or hash_file(file),
        }

    listed = (sorted(path.rglob("*")) if path.is_dir() else [path] for path in paths)
    with ThreadPoolExecutor(_HASHED_AT_ONCE) as pool:
        return list(
            pool.map(describe, (file for found in listed for file in found if file.is_file()))
        )


def _name_in(file: Path, run_dir: Path) -> Path:
    """Return a file's path relative to the run directory, or its absolute path if it is outside.

    A stage's directory may be a link to another disk: its files keep the names that they have in
    the run directory.
    """
    named, root = Path(os.path.abspath(file)), Path(os.path.abspath(run_dir))
    if named.is_relative_to(root):
        return named.relative_to(root)
    # Of links in a hub cache, the target's name would be a hash.
    whole, root = file.parent.resolve() / file.name, run_dir.resolve()
    return whole.relative_to(root) if whole.is_relative_to(root) else named


def are_rows(value: object) -> bool:
    """Return whether a value read from a file has the shape of rows of `describe_files`."""
    kinds = {"path": str, "bytes": int, "sha256": str}
    return isinstance(value, list) and all(
        isinstance(row, dict) and all(isinstance(row.get(k), kind) for k, kind in kinds.items())
        for row in value
    )


def refuse_changes(
    rows: Iterable[Mapping[str, Any]], run_dir: Path, stage: str, fix: str | None = None
) -> None:
    """Raise if a file is no longer the one that a stage recorded.

    A file whose size and time are as recorded is not read. One that was only touched or copied
    passes, because its content is compared.

    Args:
        rows: rows of `describe_files`.
        run_dir: directory to which their relative paths refer.
        stage: the stage that recorded them.
        fix: what to do if the file cannot be restored; None: redo the stages from that one on.

    Raises:
        StageError: a file was changed or removed since.
    """
    redo = fix or f"redo the stages from {stage} on: python {stage}.py --force"
    for row in rows:
        path = run_dir / row["path"]
        found = find_change(path, row)
        if found:
            raise StageError(
                f"{path} has changed since {stage} recorded it",
                f"{row['bytes']} bytes with sha256 {row['sha256']}",
                found,
                f"restore this file, or {redo}",
            )


def find_change(path: Path, row: Mapping[str, Any]) -> str:
    """Return how a file differs from its row of `describe_files`, or an empty string."""
    try:
        status = path.stat()
        if _is_untouched(status, row):
            return ""
        if status.st_size != row["bytes"]:
            return f"{status.st_size} bytes"
        found = hash_file(path)
    except OSError as error:
        return error.strerror or str(error)
    return "" if found == row["sha256"] else f"the same size, but sha256 {found}"


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


def _is_untouched(status: os.stat_result, row: Mapping[str, Any]) -> bool:
    return (status.st_size, status.st_mtime_ns) == (row["bytes"], row.get("mtime_ns"))


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def hash_file(path: Path) -> str:
    """Return the sha256 of the file's bytes in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_software() -> dict[str, Any]:
    """Return the git commit, whether the code differs from it, and package versions.

    `git_dirty` counts changed files of the repository and new ones of the package: a user's data
    beside them changes nothing.
    """
    package = Path(__file__).resolve().parent
    git = ("git", "-C", str(package.parent))
    status = (*git, "status", "--porcelain")
    dirty = _output(*status, "--untracked-files=no") or _output(*status, "--", package.name)
    return {
        "git_commit": _output(*git, "rev-parse", "HEAD"),
        "git_dirty": bool(dirty),
        "versions": {"python": platform.python_version(), **installed_versions(PACKAGES)},
    }


def installed_versions(names: Iterable[str]) -> dict[str, str]:
    """Return versions of the installed packages among `names`."""
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def describe_hardware() -> dict[str, Any]:
    """Return the CPU architecture and count, host memory in bytes, and GPUs from nvidia-smi."""
    gpus = _output("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv")
    return {
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "host_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": gpus.splitlines()[1:] if gpus else [],
    }


def gpu_name() -> str | None:
    """Return the name of this machine's first GPU by its driver; None without one."""
    found = describe_hardware()["gpus"]
    return found[0].partition(",")[0] if found else None


def _output(*command: str) -> str | None:
    """Return the command's output; None if the program is missing, fails or times out."""
    try:
        done = subprocess.run(
            command,
            check=False,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=60,
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def host_memory(root: Path = Path("/")) -> tuple[int, int]:
    """Return total and available host memory in bytes, within the limit of a container.

    Args:
        root: directory that holds proc and sys.
    """
    values = _read_numbers(root / "proc/meminfo", 1024)
    total, available = values["MemTotal"], values["MemAvailable"]
    group = root / "sys/fs/cgroup"
    limit = _read_number(group / "memory.max")
    if limit is not None and limit < total:
        used = _read_number(group / "memory.current") or 0
        stat = group / "memory.stat"
        files = _read_numbers(stat) if stat.is_file() else {}
        # The kernel drops cached files when memory is needed.
        used -= files.get("active_file", 0) + files.get("inactive_file", 0)
        total, available = limit, min(available, limit - max(0, used))
    return total, available


def missing_modules(names: Iterable[str]) -> list[str]:
    """Return the top-level modules that cannot be found, without importing any."""
    return [name for name in names if util.find_spec(name) is None]


def is_our_environment() -> bool:
    """Return whether this Python is that of the .venv that install.sh creates in the checkout."""
    return Path(sys.prefix).resolve() == (_ROOT / ".venv").resolve()


def install_fix(extra: str = "") -> str:
    """Return what gives a script its packages: the checkout's .venv if another Python runs.

    Args:
        extra: the extra of the package that the script needs; without it, all are named.
    """
    activate = Path(".venv/bin/activate")
    if (_ROOT / activate).is_file() and not is_our_environment():
        return f"source {activate if Path.cwd() == _ROOT else shlex.quote(str(_ROOT / activate))}"
    return "./install.sh, which installs all of it" + (
        f"; or pip install '.[{extra}]'" * bool(extra)
    )


def install_command(packages: Iterable[str]) -> str:
    """Return the command that adds packages to this Python's environment."""
    return f".uv/bin/uv pip install --python {shlex.quote(sys.executable)} {' '.join(packages)}"


def _read_numbers(path: Path, unit: int = 1) -> dict[str, int]:
    """Return the numbers of a file with a name and a number on each line."""
    lines = (line.split() for line in path.read_text(encoding="utf-8").splitlines())
    return {words[0].rstrip(":"): unit * int(words[1]) for words in lines if len(words) > 1}


def _read_number(path: Path) -> int | None:
    """Return the number in a file; None if it is missing or says `max`."""
    text = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
    return int(text) if text.isdigit() else None


def reset_peak_host_memory() -> None:
    """Reset this process's peak resident memory (Linux 4.0+).

    If the kernel does not permit it, the peak since the process started remains: an upper bound.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return


def peak_host_bytes() -> int:
    """Return this process's peak resident memory in bytes since the last reset."""
    for line in (
        Path("/proc/self/status").read_text(encoding="utf-8", errors="replace").splitlines()
    ):
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM line")


def reset_peaks() -> None:
    """Reset this process's peak memory on the host and on each GPU."""
    import torch

    reset_peak_host_memory()
    if torch.cuda.is_available():
        torch.cuda.init()  # the statistics do not exist before
    for index in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(index)


def read_peaks() -> dict[str, int]:
    """Return peak bytes since the last reset: `host` (resident), `cuda:N` (allocated by torch)."""
    import torch

    devices = range(torch.cuda.device_count())
    return {
        "host": peak_host_bytes(),
        **{f"cuda:{index}": torch.cuda.max_memory_allocated(index) for index in devices},
    }
