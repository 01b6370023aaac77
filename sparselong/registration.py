"""Everything that `import sparselong` changes outside the package: environment and registries.

The packed format, the attention and the experts' implementation are registered with transformers.
Importing transformers and torch takes seconds, and a mistyped config key should be reported before
that, so nothing is imported here. Instead, a finder on `sys.meta_path` acts after these imports:

- `transformers.modeling_utils`, which every model needs: our modules are then imported as well;
- each of our modules that transformers must know: its names are then registered.

They may be imported in either order, also while the other is only partly imported.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

_TRIGGER = "transformers.modeling_utils"

_ENVIRONMENT = {
    "AXOLOTL_DO_NOT_TRACK": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "WANDB_MODE": "offline",
    "TOKENIZERS_PARALLELISM": "false",
    # By default, waiting threads of libgomp spin. On a busy machine with few cores that made the
    # forward pass of a small model 60 times slower.
    "OMP_WAIT_POLICY": "PASSIVE",
}
_HARMLESS_LOGGERS = {
    # On processors with AVX-512 bf16, its import looks on the hub for a faster product of 4-bit
    # layers of its own, which we do not use.
    "bitsandbytes.backends.cpu.ops",
}
"""Loggers whose warnings would alarm people and mean nothing here; their errors are still shown."""
_HARMLESS_WARNING = "Skipping publisher trust check for 'kernels-community/quantization-bits"
"""The Python warning that precedes that logger's one if the hub cannot be used."""


def set_environment() -> None:
    """Set environment defaults for our dependencies, unless they are already set; quiet some.

    Torch reads its allocator's setting at the first allocation. The value is `memory.ALLOCATOR`,
    repeated here because that module is slow to import. Without it, the blocks of the 20b model's
    weights alone take 59 MB more than the weights.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in _HARMLESS_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=_HARMLESS_WARNING)
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


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
