"""Registers packed format and attention with transformers, without making `import sparselong` slow.

Importing torch and transformers takes seconds, and a mistyped config key should not. So where
transformers' model code is not imported yet, the registration waits for the moment it is: a finder
on `sys.meta_path` lets the import of `transformers.modeling_utils` run as usual and registers both
right after it. No model can be opened before that moment.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

_TRIGGER = "transformers.modeling_utils"


def _register() -> None:
    importlib.import_module("sparselong.model.quantizer")
    importlib.import_module("sparselong.model.attention")


class _RegisteringLoader(importlib.abc.Loader):
    """Runs a module by its own loader, then registers the quantizer."""

    def __init__(self, loader: importlib.abc.Loader):
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _register()


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds the trigger as the finders behind it do, and wraps its loader; once."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _TRIGGER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


def register_when_needed() -> None:
    """Registers now where transformers' models are imported already, else as soon as they are."""
    if _TRIGGER in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
