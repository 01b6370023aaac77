"""Public names of a folder, imported on first access.

A folder's `__init__` lists its public names under `if TYPE_CHECKING`, where editors and type
checkers find them, and ends with `__getattr__ = expose(__name__)`. The same list is used at run
time, so that `from sparselong.kernels.attention import rank_backends` imports neither torch nor the
kernels in the same folder.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def expose(package: str) -> Callable[[str], Any]:
    """Return a module-level `__getattr__` that imports the names listed under TYPE_CHECKING.

    Args:
        package: the `__name__` of the calling `__init__`.
    """
    names = public_names(package, Path(str(sys.modules[package].__file__)))

    def get(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            found = importlib.import_module(names[name])
        except ModuleNotFoundError as error:
            _add_fix(error)
            raise
        if names[name] != f"{package}.{name}":
            found = getattr(found, name)
        setattr(sys.modules[package], name, found)
        return found

    return get


def _add_fix(error: ModuleNotFoundError) -> None:
    """Add to the error, for the end of its traceback, how to get a missing package of others."""
    from sparselong.provenance import install_fix

    if not (error.name or "").startswith("sparselong") and not hasattr(error, "__notes__"):
        error.add_note(f"fix: {install_fix()}")


def public_names(package: str, init: Path) -> dict[str, str]:
    """Return the module of each name that an `__init__` lists under `if TYPE_CHECKING`."""
    names: dict[str, str] = {}
    for node in ast.parse(init.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for entry in node.body:
                assert isinstance(entry, ast.ImportFrom) and entry.module, f"{init}: {entry.lineno}"
                for alias in entry.names:
                    module = entry.module == package  # the name is a module of the folder
                    names[alias.name] = f"{package}.{alias.name}" if module else entry.module
    return names
