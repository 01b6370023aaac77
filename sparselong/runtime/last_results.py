"""Results of functions of tensors that all layers of a pass ask for, kept from one to the next."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")
_KEPT = 2
"""Results a function; a model has two kinds of layers."""
_results: dict[Callable[..., Any], list[tuple[list[weakref.ref], tuple, Any]]] = {}


def call_once(
    function: Callable[..., T], tensors: tuple[torch.Tensor | None, ...], *rest: Any
) -> T:
    """Return `function(*tensors, *rest)`, or what the same call has given a moment ago.

    The same are calls with the same tensor objects, not written to since, and an equal `rest`; the
    last two of a function are kept, for as long as their tensors live.

    Args:
        function: of a module, whose result depends on its arguments alone.
        tensors: its first arguments.
        rest: its other arguments.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    if any(tensor.is_inference() for tensor in given):  # these do not say that they were written to
        return function(*tensors, *rest)
    asked = (*(None if tensor is None else tensor._version for tensor in tensors), *rest)
    kept = _results.get(function, [])
    for references, call, result in kept:
        if call == asked and all(ref() is t for ref, t in zip(references, given, strict=True)):
            return result
    result = function(*tensors, *rest)
    _results[function] = [([weakref.ref(t) for t in given], asked, result), *kept[: _KEPT - 1]]
    return result
