"""Everything that `import sparselong` changes outside the package: environment, registries.

transformers learns the packed format, the attention and the experts' implementation. Importing it
and torch takes seconds, and a mistyped config key should be refused before that. So nothing is
imported here: a finder on `sys.meta_path` lets imports run as usual and acts right after two kinds:

- `transformers.modeling_utils`, before which no model can be opened: our modules are imported too;
- each of our modules that transformers must know: its names enter transformers' registries.

Either may come first, also half imported while the other is asked for.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import os
import sys
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
    # Waiting threads of libgomp spin by default. On a busy machine with few cores that made a small
    # model's forward pass 60 times slower.
    "OMP_WAIT_POLICY": "PASSIVE",
}


def set_environment() -> None:
    """Set the defaults of the packages underneath; values that are set already win.

    Torch reads its allocator's setting at the first allocation. The value is `memory.ALLOCATOR`,
    written out because that module is slow to import; without it the blocks of the 20b model's
    weights alone take 59 MB more than the weights.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
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
"""What transformers must know, by the module that defines it: the one place that names modules of a
higher floor."""


def _import_registered() -> None:
    for name in _REGISTERED:
        importlib.import_module(name)


class _RegisteringLoader(importlib.abc.Loader):
    """Runs a module by its own loader, then registers what the module calls for."""

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
    """Finds the watched modules as the other finders do, and wraps their loaders."""

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
    """Register now if transformers' model code is imported already, otherwise once it is."""
    if not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
    if _TRIGGER in sys.modules:
        _import_registered()
