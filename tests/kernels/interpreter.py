"""Triton's interpreter, a third faster: its language is put in place at a kernel's start only.

The interpreter replaces what triton.language has by its own, goes through all of it again whenever
a kernel calls another function, and finds it replaced. The results are the same bits without that.
"""

from __future__ import annotations

from collections.abc import Callable

import triton.language as tl
from triton.runtime import interpreter


def patch_once() -> None:
    """Makes this process's interpreter leave alone what it has replaced already."""
    original = interpreter._patch_lang

    def patch(function: Callable) -> interpreter._LangPatchScope:
        named = [v for v in function.__globals__.values() if v is tl or v is tl.core]
        if any(tl.core.is_builtin(language.load) for language in named):
            return original(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch
