"""Everything that the package changes outside of itself: environment, streams and registries.

The packed format, the attention and the experts' implementation are registered with transformers.
Importing transformers and torch takes seconds, and a mistyped config key should be reported before
that, so nothing is imported here. Instead, a finder on `sys.meta_path` acts after these imports:

- `transformers.modeling_utils`, which every model needs: our modules are then imported as well;
- each of our modules that transformers must know: its names are then registered.

They may be imported in either order, also while the other is only partly imported.

Importing the package changes no environment variable, logger or stream: it may be part of somebody
else's program. This project's own programs call `begin_program` first, and `move_caches`, so that
neither a terminal's encoding nor a home directory that cannot be written ends them, and
`choose_gpu` on request.
"""

from __future__ import annotations

import ctypes
import errno
import importlib
import importlib.abc
import importlib.machinery
import io
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path
from types import ModuleType
from typing import Any

from sparselong.errors import ConfigError, StageError

_TRIGGER = "transformers.modeling_utils"

_ENVIRONMENT = {
    "AXOLOTL_DO_NOT_TRACK": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "WANDB_MODE": "offline",
    "WANDB_ERROR_REPORTING": "false",
    "TOKENIZERS_PARALLELISM": "false",
    # Its warnings, such as that there is no accelerator, go to stdout, which holds our results.
    "LLM_COMPRESSOR_LOG_LEVEL": "ERROR",
    # By default, waiting threads of libgomp spin. On a busy machine with few cores that made the
    # forward pass of a small model 60 times slower.
    "OMP_WAIT_POLICY": "PASSIVE",
}
ALLOCATOR = "expandable_segments:True"
"""PYTORCH_ALLOC_CONF of the pipeline's processes: without it, fragmentation took a fifteenth of
stage 03's memory (H200), and the blocks of the 20b model's weights alone 59 MB more than these."""
_HARMLESS_LOGGERS = {
    # On processors with AVX-512 bf16, its import looks on the hub for a faster product of 4-bit
    # layers of its own, which we do not use.
    "bitsandbytes.backends.cpu.ops",
}
"""Loggers whose warnings would alarm people and mean nothing here; their errors are still shown."""
_HARMLESS_WARNING = "Skipping publisher trust check for 'kernels-community/quantization-bits"
"""The Python warning that precedes that logger's one if the hub cannot be used."""

_CACHES = {
    "XDG_CACHE_HOME": "~/.cache",
    "HF_HOME": "XDG_CACHE_HOME/huggingface",
    "HF_HUB_CACHE": "HF_HOME/hub",
    "HF_DATASETS_CACHE": "HF_HOME/datasets",
    "HF_MODULES_CACHE": "HF_HOME/modules",
    "HF_ASSETS_CACHE": "HF_HOME/assets",
    "HF_XET_CACHE": "HF_HOME/xet",
    "MPLCONFIGDIR": "~/.config/matplotlib",
    "TRITON_CACHE_DIR": "~/.triton/cache",
    "TORCHINDUCTOR_CACHE_DIR": "TMPDIR",
}
"""Environment variables of caches, and where each is by default."""


def set_environment() -> None:
    """Give this process the environment in which the pipeline runs; importing does not.

    Variables that are set already keep their values, see `add_defaults`. Call it before torch and
    transformers are imported: OpenMP and telemetry read theirs at import, and torch's allocator
    at the first allocation on a GPU. Two harmless notes of a dependency are silenced as well.
    """
    add_defaults(os.environ)
    for name in _HARMLESS_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=_HARMLESS_WARNING)


def add_defaults(environment: MutableMapping[str, str]) -> None:
    """Add what our dependencies should read, in place; variables that are set keep their values.

    Telemetry is off, waiting threads sleep, and the segments of torch's allocator expand, unless
    the user configures it under either of its names.
    """
    for name, value in _ENVIRONMENT.items():
        environment.setdefault(name, value)
    if "PYTORCH_CUDA_ALLOC_CONF" not in environment:  # the older name
        environment.setdefault("PYTORCH_ALLOC_CONF", ALLOCATOR)


def begin_program() -> None:
    """Set environment and streams, as every program of this project does before anything else."""
    set_environment()
    set_streams()


class OutputError(StageError):
    """What a stage prints cannot be written."""


class _Stream(io.FileIO):
    """Output that is dropped once nobody reads it: a closed pipe, or a terminal that is gone.

    Any other failure is raised once, and what follows is dropped: Python would otherwise try to
    write its buffer again when it ends.
    """

    label = ""
    failed = False

    def write(self, data: Any) -> int:
        if self.failed:
            return len(data)
        try:
            return super().write(data)
        except OSError as error:
            self.failed = True
            if error.errno in (errno.EPIPE, errno.EIO):
                return len(data)
            raise OutputError(
                f"{self.label} cannot be written",
                f"a terminal, a pipe, or a file with space left, as {self.label}",
                error.strerror or str(error),
                f"free some space where {self.label} goes, or send it elsewhere; then run the same "
                "command again",
            ) from error


def set_streams() -> None:
    """Make stdout and stderr, also those of child processes, accept any text and never end a stage.

    Characters that the encoding lacks are escaped. A closed stream discards what is written. Where
    stderr is no terminal, libraries draw no progress bars, whose control characters nobody reads.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next file to be opened would get what libraries print
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif type(stream) is io.TextIOWrapper:
            stream.flush()
            raw: Any = _Stream(stream.fileno(), "wb", closefd=False)
            raw.label = name
            unbuffered = isinstance(stream.buffer, io.RawIOBase)  # python -u
            made = io.TextIOWrapper(
                raw if unbuffered else io.BufferedWriter(raw),
                encoding=stream.encoding,
                errors="backslashreplace",
                line_buffering=stream.line_buffering,
                write_through=unbuffered,
            )
            setattr(sys, name, made)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if not sys.stderr.isatty():
        for name in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(name, "1")
    os.environ["PYTHONIOENCODING"] = "utf-8:backslashreplace"
    if "error" in os.environ.get("PYTHONWARNINGS", ""):
        os.environ["PYTHONWARNINGS"] = "default"
    if any("error" in option for option in sys.warnoptions):
        # Of our dependencies some warn when they are imported.
        warnings.simplefilter("default")


def choose_gpu(number: int) -> None:
    """Let this process and its children use one GPU alone; before anything has asked CUDA.

    Args:
        number: of the GPU as nvidia-smi lists it, or its place in CUDA_VISIBLE_DEVICES if that is
            set.

    Raises:
        ConfigError: there is no such GPU, or a launcher started several processes.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if size != "1":
        raise ConfigError(
            "--gpu names one GPU, but a launcher started several processes",
            "one process",
            f"WORLD_SIZE={size}",
            "leave out --gpu; CUDA_VISIBLE_DEVICES says which GPUs several processes may use",
        )
    visible, there = os.environ.get("CUDA_VISIBLE_DEVICES"), _count_gpus()
    named = range(there) if visible is None else visible.split(",")
    # CUDA, too, sees those before the first that is not there, and without any, torch the CPU.
    names = [*takewhile(partial(_is_gpu, there=there), (str(name).strip() for name in named))]
    if not 0 <= number < len(names):
        numbers = f"a number from 0 to {len(names) - 1}" if names else "a machine with a GPU"
        found = f"{there} GPUs" if there else "no NVIDIA driver, or no GPU"
        if visible is not None:
            found = f"CUDA_VISIBLE_DEVICES={visible}, {found}"
        fix = "see nvidia-smi; without --gpu a machine without GPUs computes on its CPU"
        raise ConfigError(f"--gpu {number} does not exist", numbers, found, fix)
    if visible is None:
        os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # nvidia-smi's
    os.environ["CUDA_VISIBLE_DEVICES"] = names[number]


def _is_gpu(name: str, there: int) -> bool:
    """Return whether a name in CUDA_VISIBLE_DEVICES can be one of so many GPUs."""
    is_number = name.isascii() and name.isdecimal()
    return int(name) < there if is_number else there > 0 and name.startswith(("GPU-", "MIG-"))


def _count_gpus() -> int:
    """Return the number of GPUs by NVML, whose import is no second and creates no context."""
    try:
        driver = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return 0
    count = ctypes.c_uint(0)
    if driver.nvmlInit_v2() == 0:
        driver.nvmlDeviceGetCount_v2(ctypes.byref(count))
        driver.nvmlShutdown()
    return count.value


def move_caches(folder: Path, repositories: Iterable[str]) -> bool:
    """Set the caches of our dependencies to `folder` as far as their own places cannot be written.

    The home directory is set too if it does not exist or cannot be written, because libraries keep
    more there than the caches listed here. If all can be written, nothing changes. Must be called
    before those libraries are imported.

    Args:
        folder: where they go; it is not created here.
        repositories: names on the hub that the config mentions. A hub cache that cannot be written
            but holds one of them is still read.

    Returns:
        Whether anything goes to `folder`.
    """
    folder, moved = folder.resolve(), False
    try:
        tempfile.gettempdir()
    except FileNotFoundError:  # nothing that it tries can be written
        os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
        moved = True
    hub, token = _cache("HF_HUB_CACHE"), _cache("HF_HOME") / "token"
    home = Path(os.path.expanduser("~"))
    if not (home.is_dir() and _is_writable(home)):
        os.environ["HOME"], moved = str(folder), True
    for name in _CACHES:
        if not _is_writable(_cache(name)):
            os.environ[name], moved = str(folder / name.lower()), True
    if moved and _cache("HF_HUB_CACHE") != hub:
        names = [name.replace("/", "--") for name in repositories]
        kinds = ("models", "datasets")
        if any(_is_dir(hub / f"{kind}--{name}") for kind in kinds for name in names):
            os.environ["HF_HUB_CACHE"] = str(hub)
        if os.access(token, os.R_OK):
            os.environ.setdefault("HF_TOKEN_PATH", str(token))
    return moved


def _cache(name: str) -> Path:
    """Return where a cache is now, as its library finds it."""
    given = os.environ.get(name)
    if not given:
        parent, _, rest = _CACHES[name].partition("/")
        if parent == "TMPDIR":
            return Path(tempfile.gettempdir())
        given = _CACHES[name] if parent == "~" else f"{_cache(parent)}/{rest}"
    return Path(os.path.expandvars(os.path.expanduser(given)))


def _is_writable(place: Path) -> bool:
    """Return whether a directory can be written, or be made, by trying."""
    try:
        while not place.exists() and place != place.parent:
            place = place.parent
        with tempfile.TemporaryFile(dir=place):
            return True
    except OSError:
        return False


def _is_dir(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # an unreadable or overlong name
        return False


def _register_quantizer(module: Any) -> None:
    from transformers.quantizers.auto import register_quantization_config, register_quantizer

    register_quantization_config(module.METHOD)(module.SparseLongConfig)
    register_quantizer(module.METHOD)(module.SparseLongQuantizer)


def _register_attention(module: Any) -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(module.NAME, module.attention_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(module.NAME, module.padding_mask)


def _register_experts(module: Any) -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(module.IMPLEMENTATION, module.refuse_unpacked)


_REGISTERED: dict[str, Callable[[Any], None]] = {
    "sparselong.model.packed_experts": _register_experts,
    "sparselong.model.quantizer": _register_quantizer,
    "sparselong.model.attention": _register_attention,
}
"""Registration by module. Only here does a low-level module name higher-level ones."""


def _import_registered() -> None:
    for name in _REGISTERED:
        importlib.import_module(name)


class _RegisteringLoader(importlib.abc.Loader):
    """Loader that runs a module by its own loader, then calls the module's registration."""

    def __init__(self, loader: importlib.abc.Loader):
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        if module.__name__ == _TRIGGER:
            _import_registered()
        else:
            _REGISTERED[module.__name__](module)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finder that delegates to the other finders and wraps the loaders of watched modules."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _TRIGGER and fullname not in _REGISTERED:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _RegisteringLoader(spec.loader)
                return spec
        return None


def register_when_needed() -> None:
    """Register now if transformers' model code is already imported, otherwise on its import."""
    if not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
    if _TRIGGER in sys.modules:
        _import_registered()
