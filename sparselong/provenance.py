"""What a manifest says about where a result came from: files, software, hardware, memory."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    *("torch", "triton", "transformers", "llmcompressor", "compressed-tensors", "axolotl", "peft"),
    *("datasets", "accelerate", "lm-eval", "safetensors", "tokenizers", "pyyaml"),
    *("flash-attn", "ring-flash-attn"),
)


def describe_files(paths: Iterable[Path], run_dir: Path) -> list[dict[str, Any]]:
    """Path (relative to the run directory where inside it), bytes and sha256 of every file."""
    rows = []
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                whole, root = file.resolve(), run_dir.resolve()
                shown = whole.relative_to(root) if whole.is_relative_to(root) else file
                rows.append(
                    {"path": str(shown), "bytes": file.stat().st_size, "sha256": hash_file(file)}
                )
    return rows


def hash_file(path: Path) -> str:
    """sha256 of the file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_software() -> dict[str, Any]:
    """Git commit, dirty flag and package versions."""
    here = Path(__file__).resolve().parent.parent
    commit = _output("git", "-C", str(here), "rev-parse", "HEAD")
    return {
        "git_commit": commit,
        "git_dirty": bool(_output("git", "-C", str(here), "status", "--porcelain")),
        "versions": {"python": platform.python_version(), **installed_versions(PACKAGES)},
    }


def installed_versions(names: Iterable[str]) -> dict[str, str]:
    """Versions of those of the packages that are installed."""
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def describe_hardware() -> dict[str, Any]:
    """Processor, host memory in bytes, and GPUs as nvidia-smi names them."""
    gpus = _output("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv")
    return {
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "host_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": gpus.splitlines()[1:] if gpus else [],
    }


def _output(*command: str) -> str | None:
    """The command's output, or None where the program is missing or refuses."""
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def reset_peak_host_memory() -> None:
    """Starts a new measurement of this process's peak resident memory (Linux 4.0+).

    Where the kernel refuses, the peak keeps counting from the process's start: an upper bound.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_host_bytes() -> int:
    """This process's peak resident memory in bytes since the last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM line")


def reset_peaks() -> None:
    """Start a new measurement of this process's peak memory, on the host and on each GPU."""
    import torch

    reset_peak_host_memory()
    if torch.cuda.is_available():
        torch.cuda.init()  # the statistics exist from then on
    for index in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(index)


def read_peaks() -> dict[str, int]:
    """Peak bytes since the last reset: `host` (resident) and `cuda:N` (allocated through torch)."""
    import torch

    devices = range(torch.cuda.device_count())
    return {
        "host": peak_host_bytes(),
        **{f"cuda:{index}": torch.cuda.max_memory_allocated(index) for index in devices},
    }
