"""Facts about this machine, gathered without judging them.

`probe` queries Python, nvidia-smi, torch, the file system and the hub, and fills one record. The
checks (check.py) read only that record, so tests can check any machine. Importing torch here
creates no CUDA context; memory figures come from nvidia-smi.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from sparselong.config import Config
from sparselong.health import packages, sources
from sparselong.health.inputs import Finding, probe_inputs
from sparselong.health.packages import Package
from sparselong.health.sources import Source
from sparselong.kernels.attention import refuse_flash_attn_4
from sparselong.processes import usable_cores
from sparselong.provenance import host_memory, is_our_environment, missing_modules

_MIB = 2**20
_GPU_FIELDS = (
    *("index", "name", "compute_cap", "memory.total", "memory.free", "driver_version"),
    *("pcie.link.gen.max", "pcie.link.width.current"),
)


@dataclass(frozen=True)
class Gpu:
    """One GPU as nvidia-smi describes it."""

    index: int
    name: str
    compute_capability: tuple[int, int]
    total_bytes: int
    free_bytes: int
    pcie: str
    """Link generation and width, such as `4.0 x16`."""


@dataclass(frozen=True)
class Torch:
    """Capabilities of the installed torch; `error` says why it could not be imported."""

    version: str = ""
    cuda: str | None = None
    """CUDA version that torch was built with; None for the CPU build."""
    devices: int = 0
    """Number of GPUs that torch can use."""
    nccl: bool = False
    gloo: bool = False
    unconnected: tuple[tuple[int, int], ...] = ()
    """Pairs of GPUs without peer access."""
    error: str = ""


@dataclass(frozen=True)
class Disk:
    """The file system of a directory that exists or will be created."""

    path: Path
    free_bytes: int
    device: int
    """st_dev: equal for two paths on one file system."""


@dataclass(frozen=True)
class Machine:
    """All facts that the checks use."""

    python: tuple[int, int, int]
    own_python: bool
    """Whether Python is not that of install.sh's .venv, as on a GPU image with its own packages."""
    packages: tuple[Package, ...]
    torch: Torch
    driver: str | None
    nvcc: str | None
    gpus: tuple[Gpu, ...]
    cores: int
    """Number of cores that this process may use."""
    host_total_bytes: int
    host_available_bytes: int
    run_disk: Disk
    hub_disk: Disk
    run_dir_bytes: int
    """Size of the files in the run directory."""
    base: Source
    data: tuple[Source, ...]
    inputs: tuple[Finding, ...] = ()
    """What became of opening the base, its tokenizer and the rows."""
    flash_attn: bool = False
    """Whether the optional flash-attn package is installed."""
    flash_attn_4: bool = False
    """Whether the optional flash-attn-4 package is installed in the version that is supported."""
    missing: tuple[str, ...] = ()
    """Modules of trackers that the config asks for and that cannot be found."""

    @property
    def usable_gpus(self) -> tuple[Gpu, ...]:
        """GPUs that torch can use."""
        return self.gpus[: self.torch.devices]


def probe(config: Config, run_dir: Path) -> Machine:
    """Gather the facts. Changes nothing; queries to the hub have a short timeout."""
    gpus, driver = probe_gpus()
    total, available = host_memory()
    base, data = sources.probe_sources(config, run_dir)
    return Machine(
        python=sys.version_info[:3],
        own_python=not is_our_environment(),
        packages=packages.compare_with_lock(),
        torch=probe_torch(),
        driver=driver,
        nvcc=_nvcc_version(),
        gpus=gpus,
        cores=usable_cores(),
        host_total_bytes=total,
        host_available_bytes=available,
        run_disk=probe_disk(run_dir),
        hub_disk=probe_disk(sources.hub_cache()),
        run_dir_bytes=_tree_bytes(run_dir),
        base=base,
        data=data,
        inputs=probe_inputs(config, run_dir, base, _rows_of(data)),
        flash_attn=packages.is_installed("flash_attn"),
        flash_attn_4=refuse_flash_attn_4() is None,
        missing=tuple(missing_modules(chain(*config.training.tracker_modules.values()))),
    )


def _rows_of(data: tuple[Source, ...]) -> tuple[Source, ...]:
    """Return the sources of rows; evaluation tasks are left to stage 04."""
    return tuple(source for source in data if not source.role.startswith("evaluation task"))


def _output(*command: str) -> str | None:
    """Return the command's output; None if it is missing, fails or times out."""
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def probe_gpus() -> tuple[tuple[Gpu, ...], str | None]:
    """Return the GPUs in CUDA_VISIBLE_DEVICES, and the driver's version."""
    text = _output(
        "nvidia-smi", f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader,nounits"
    )
    gpus, driver = [], None
    for line in (text or "").splitlines():
        values = [value.strip() for value in line.split(",")]
        if len(values) != len(_GPU_FIELDS):
            continue
        index, name, capability, total, free, driver, generation, width = values
        major, _, minor = capability.partition(".")
        pcie = f"{generation}.0 x{width}" if generation.isdigit() and width.isdigit() else "unknown"
        gpus.append(
            Gpu(
                int(index),
                name,
                (int(major), int(minor or 0)),
                int(total) * _MIB,
                int(free) * _MIB,
                pcie,
            )
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        named = [part.strip() for part in visible.split(",") if part.strip()]
        if all(part.isdigit() for part in named):
            gpus = [gpu for part in named for gpu in gpus if gpu.index == int(part)]
    return tuple(gpus), driver


def probe_torch() -> Torch:
    """Import torch and return its capabilities."""
    try:
        import torch
        import torch.distributed as distributed
    except (ImportError, OSError) as error:  # OSError: a shared library cannot be loaded
        return Torch(error=str(error).splitlines()[0])
    devices = torch.cuda.device_count()
    pairs = [(one, two) for one in range(devices) for two in range(devices) if one != two]
    return Torch(
        version=torch.__version__,
        cuda=torch.version.cuda,
        devices=devices if torch.cuda.is_available() else 0,
        nccl=distributed.is_available() and distributed.is_nccl_available(),
        gloo=distributed.is_available() and distributed.is_gloo_available(),
        unconnected=tuple(pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)),
    )


def _nvcc_version() -> str | None:
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    for line in (_output(nvcc, "--version") or "").splitlines():
        if "release" in line:
            return line.partition("release")[2].split(",")[0].strip()
    return None


def probe_disk(path: Path) -> Disk:
    """Return the file system of the path's nearest existing parent, with its free space."""
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    stats = os.statvfs(existing)
    return Disk(existing, stats.f_bavail * stats.f_frsize, existing.stat().st_dev)


def _tree_bytes(path: Path) -> int:
    """Return bytes of all files below a directory; hard links are counted once."""
    seen: dict[int, int] = {}
    for file in path.rglob("*") if path.is_dir() else ():
        if file.is_file() and not file.is_symlink():
            stat = file.stat()
            seen[stat.st_ino] = stat.st_size
    return sum(seen.values())
