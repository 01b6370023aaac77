"""Our operations as torch.compile sees them: an operator forward, another backward, opaque both.

The host code of a kernel reads addresses, settings, caches and, for documents and labels, values;
a compiler can trace none of these. So every public function of `kernels/` and the layers above
them that a training pass calls has two ways: without a compiler the direct call, as fast as ever,
and under `torch.compiler.is_compiling()` an operator made here. The compiler knows an operator's
schema, the shapes of its results and its gradients' operator, and nothing of what is inside. Inside
runs, at run time, what runs without a compiler: settings, backends and lengths are those of the
step, and no length is a constant of the graph.

An operator is functional: it changes none of its arguments, and returns what its backward pass
needs. That also makes it right under the compiler's own recomputation. State of checkpointed layers
(`runtime/recompute.py`) is not consulted. Only torch's public `torch.library` is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import MappingProxyType
from typing import Any

import torch

Differentiate = Callable[..., Sequence[Any]]
"""(arguments, results that it reads, gradients of all results, needs) → gradients of the tensors
among the arguments, those of lists one by one. `needs` says for each of these whether its gradient
is needed; others may be None, as may be gradients of results that nothing depends on."""


def make_opaque(
    forward: Callable[..., Any],
    *,
    like: Callable[..., Any],
    differentiate: Differentiate,
    reads: Sequence[int] = (),
    stand_ins: Mapping[int, int] = MappingProxyType({}),
    synchronizes: bool = False,
) -> Any:
    """Register an operation; return its operator, to be called with all arguments by position.

    Gradients flow from the results to every floating tensor among the arguments that requires one.

    Args:
        forward: computes a tensor or a tuple of tensors, laid out as `like`'s and sharing no memory
            with the arguments. Its annotations are the schema, its name the operator's; arguments
            are tensors, lists of tensors, optional tensors, and constants.
        like: the same arguments → empty results of the same shapes, dtypes, devices and strides.
        differentiate: the backward pass; on a CPU autograd records in it.
        reads: which results `differentiate` gets; the others are not kept for it.
        stand_ins: results that it gets in place of arguments whose values it does not need, by the
            arguments' places: of the same shape and dtype, and kept anyway.
        synchronizes: whether the host waits for the device, which a captured CUDA graph cannot.
    """
    name = forward.__name__.strip("_")
    tags = (torch.Tag.cudagraph_unsafe,) if synchronizes else ()
    library: Any = torch.library
    schema = library.infer_schema(forward, mutates_args=())
    run = torch.no_grad()(forward)
    operator = library.custom_op(
        f"sparselong::{name}", run, mutates_args=(), schema=schema, tags=tags
    )
    operator.register_fake(like)
    backward = _register_backward(f"{name}_backward", schema, differentiate, tags)
    operator.register_autograd(_call_backward(backward), setup_context=_saving(reads, stand_ins))
    return getattr(torch.ops.sparselong, name).default


def _register_backward(name: str, schema: str, differentiate: Differentiate, tags: Any) -> Any:
    """Register and return the operator of the gradients that `needs` asks for."""
    arguments, _, _ = schema.partition(") -> ")
    schema = f"{arguments}, Tensor[] results, Tensor?[] gradients, bool[] needs) -> Tensor[]"

    def backward(*given: Any) -> list[torch.Tensor]:
        *arguments, results, gradients, needs = given
        leaves = _tensors(arguments)
        run = differentiate if leaves[0].is_cuda else _recording(differentiate)
        pairs = zip(leaves, run(arguments, results, gradients, needs), needs, strict=True)
        return [_lay_out(made, leaf) for leaf, made, needed in pairs if needed]

    def like(*given: Any) -> list[torch.Tensor]:
        *arguments, _, _, needs = given
        leaves = zip(_tensors(arguments), needs, strict=True)
        return [torch.empty_like(leaf) for leaf, needed in leaves if needed]

    library: Any = torch.library
    made = library.custom_op(
        f"sparselong::{name}", backward, mutates_args=(), schema=schema, tags=tags
    )
    made.register_fake(like)
    return getattr(torch.ops.sparselong, name).default


def _lay_out(gradient: torch.Tensor | None, leaf: torch.Tensor) -> torch.Tensor:
    """Return a gradient in the memory layout that `empty_like` gives the tensor it is of."""
    if gradient is None:
        return torch.zeros_like(leaf)
    strides = torch.empty_like(leaf, device="meta").stride()
    owns_memory = gradient.untyped_storage().nbytes() == gradient.nbytes
    if owns_memory and gradient.stride() == strides and gradient.dtype == leaf.dtype:
        return gradient
    return torch.empty_like(leaf).copy_(gradient)


def _saving(reads: Sequence[int], stand_ins: Mapping[int, int]) -> Callable[..., None]:
    """Return the function that saves arguments and results for the backward pass."""

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        results = list(output) if isinstance(output, (tuple, list)) else [output]
        given = list(inputs)
        for place, result in stand_ins.items():
            given[place] = results[result]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*_tensors(given), *(results[number] for number in reads))
        ctx.are_tensors = [_is_tensors(each) for each in inputs]
        ctx.lengths = [len(each) if isinstance(each, (list, tuple)) else None for each in inputs]
        ctx.constants = [None if _is_tensors(each) else each for each in inputs]

    return save


def _call_backward(backward: Any) -> Callable[..., Any]:
    def call(ctx: Any, *gradients: torch.Tensor | None) -> tuple[Any, ...]:
        saved = list(ctx.saved_tensors)
        arguments: list[Any] = []
        needs: list[bool] = []
        layout = zip(ctx.constants, ctx.lengths, ctx.are_tensors, ctx.needs_input_grad, strict=True)
        for constant, length, are_tensors, needed in layout:
            if not are_tensors:
                arguments.append(constant)
            elif length is None:
                arguments.append(saved.pop(0))
                needs.append(needed)
            else:
                arguments.append([saved.pop(0) for _ in range(length)])
                needs += needed
        found = iter(backward(*arguments, saved, list(gradients), needs))
        wanted = iter([next(found) if needed else None for needed in needs])
        return tuple(
            None if not are else next(wanted) if n is None else [next(wanted) for _ in range(n)]
            for n, are in zip(ctx.lengths, ctx.are_tensors, strict=True)
        )

    return call


def _recording(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that lets autograd record, as plain torch's backward passes on a CPU do.

    Inside an operator autograd is switched off for the thread, so it runs in one of its own.
    """

    def run(*arguments: Any) -> Any:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(function, *arguments).result()

    return run


def recompute(forward: Callable[..., Any]) -> Differentiate:
    """Return the backward pass that runs `forward` again and lets torch differentiate it."""

    def differentiate(
        arguments: Sequence[Any],
        results: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor | None],
        needs: Sequence[bool],
    ) -> list[torch.Tensor | None]:
        asked = iter(needs)

        def take(each: Any) -> Any:
            if isinstance(each, torch.Tensor):
                return each.detach().requires_grad_(next(asked))
            return [take(tensor) for tensor in each] if _is_list(each) else each

        with torch.enable_grad():
            given = [take(each) for each in arguments]
            made = forward(*given)
            made = made if isinstance(made, tuple) else (made,)
            pairs = zip(made, gradients, strict=True)
            pairs = [pair for pair in pairs if pair[0].requires_grad and pair[1] is not None]
            leaves = [leaf for leaf in _tensors(given) if leaf.requires_grad]
            outputs, upstream = zip(*pairs, strict=True)
            found = iter(torch.autograd.grad(outputs, leaves, upstream, allow_unused=True))
        return [next(found) if needed else None for needed in needs]

    return differentiate


def _is_list(given: Any) -> bool:
    """Return whether an argument is a list of tensors; an empty one counts as such."""
    is_list = isinstance(given, (list, tuple))
    return is_list and all(isinstance(each, torch.Tensor) for each in given)


def _is_tensors(given: Any) -> bool:
    return isinstance(given, torch.Tensor) or _is_list(given)


def _tensors(arguments: Iterable[Any]) -> list[torch.Tensor]:
    """Return the tensors among arguments, those of lists one by one."""
    found: list[torch.Tensor] = []
    for each in arguments:
        if isinstance(each, torch.Tensor):
            found.append(each)
        elif _is_list(each):
            found += each
    return found


def leave_graph(reason: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator of what cannot be in a compiled graph: a call is a break in it.

    With `fullgraph=True` compiling raises, and shows the reason; without, the call runs as ever.
    """
    disable: Any = torch.compiler.disable
    return partial(disable, reason=reason)
