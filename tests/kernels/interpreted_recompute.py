"""Checkpointed experts in Triton's interpreter, kept and recomputed.

tests/runtime/test_recompute.py starts it. Runs in its own process, because the interpreter must be
chosen before Triton is imported. Prints one JSON document: the differences between both by pass.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import contextlib
import gc
import json
import weakref
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.utils.checkpoint import checkpoint

from sparselong.kernels.expert_stack import ExpertStack, Gate, PackedWeight
from sparselong.kernels.experts import op as experts_op
from sparselong.kernels.experts import triton_launch
from sparselong.kernels.experts.call import ExpertCall, ExpertOperands
from sparselong.kernels.experts.lora import Adapter, Adapters
from sparselong.runtime.recompute import checkpoint_contexts, checkpoint_layers, freed_outputs
from tests.kernels.interpreted_experts import draw_weight
from tests.kernels.interpreter import patch_once

TOKENS, EXPERTS, TOP_K, HIDDEN, INNER, RANK = 7, 3, 2, 32, 32, 3
CALLS, SLICES = 2, 2
"""Calls of the experts per layer, and slices per call."""
LAYERS = 3


class Watch:
    """Counts sorts and gate_up products, without keeping the latter's outputs alive."""

    def __init__(self) -> None:
        self.made: list[weakref.ref] = []
        self.sorts = 0
        triton_launch.sort_all = partial(self.sort, triton_launch.sort_all)
        triton_launch.run_gate_up = partial(self.run, triton_launch.run_gate_up)

    def run(self, function: Callable, *args: object) -> torch.Tensor:
        made = function(*args)
        self.made.append(weakref.ref(made.untyped_storage()))
        return made

    def sort(self, function: Callable, *args: object) -> object:
        self.sorts += 1
        return function(*args)

    def living(self) -> int:
        """Return how many outputs are still alive."""
        gc.collect()  # reference cycles in the interpreter hold the last kernel's arguments
        return sum(ref() is not None for ref in self.made)


def draw_stack() -> ExpertStack:
    return ExpertStack(draw_weight(EXPERTS, 2 * INNER, HIDDEN), draw_weight(EXPERTS, HIDDEN, INNER))


def with_biases(stack: ExpertStack, *biases: torch.Tensor) -> ExpertStack:
    pairs = zip(stack, biases, strict=True)
    return ExpertStack(*(weight._replace(bias=bias) for weight, bias in pairs))


def draw_call(kind: str, tokens: int = TOKENS) -> tuple[Callable, list[torch.Tensor]]:
    """Return (the experts' function of its leaves, leaves) for `plain`, `residual`, `adapters`, or
    `biases` together with adapters."""
    torch.manual_seed(0)
    indices = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(tokens)])
    leaves, stack = [torch.randn(tokens, HIDDEN), torch.rand(tokens, TOP_K)], draw_stack()
    if kind == "biases":
        leaves += [stack.gate_up.bias, stack.down.bias]
    if kind == "residual":
        leaves.append(torch.randn(tokens, HIDDEN))
    elif kind != "plain":
        for out, width in ((2 * INNER, HIDDEN), (HIDDEN, INNER)):
            b = torch.randn(out, RANK, EXPERTS).permute(2, 0, 1)  # PEFT's layout of B
            leaves += [torch.randn(EXPERTS, RANK, width), b]

    def run(x: torch.Tensor, weights: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        biases = rest[:2] if kind == "biases" else (stack.gate_up.bias, stack.down.bias)
        adapters, residual = Adapters(), rest[0] if kind == "residual" else None
        if kind not in ("plain", "residual"):
            gate_up, down = rest[-4:-2], rest[-2:]
            adapters = Adapters(Adapter(*gate_up, 0.5), Adapter(*down, 2.0))
        given = (x, indices, weights, with_biases(stack, *biases), adapters)
        return experts_op.expert_mlp(*given, residual=residual)

    return run, [leaf.requires_grad_() for leaf in leaves]


def differentiate(kind: str, watch: Watch, keep_experts: bool) -> tuple[list, dict]:
    """Return (outputs and gradients, twice over one graph; counts of gate_up outputs)."""
    run, leaves = draw_call(kind)
    watch.made.clear()
    watch.sorts = 0

    def layer(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        return torch.stack([run(x * (n + 1), *rest) for n in range(CALLS)]).sum(0)

    contexts = partial(checkpoint_contexts, False, keep_experts)
    out = checkpoint(layer, *leaves, use_reentrant=False, context_fn=contexts)
    dout = torch.linspace(-1, 1, out.numel()).view_as(out)
    counts = {"forward": len(watch.made), "held": watch.living()}
    first = torch.autograd.grad(out, leaves, dout, retain_graph=True)
    assert kind != "residual" or torch.equal(first[-1], CALLS * dout)
    counts |= {"once": len(watch.made), "left": watch.living(), "sorted": watch.sorts}
    again = torch.autograd.grad(out, leaves, dout)
    counts |= {"twice": len(watch.made), "left again": watch.living()}
    return [out, *first, *again], counts


def differentiate_again(kind: str, breaks_off: bool) -> list[torch.Tensor]:
    """Return the gradients of a second backward pass over a graph that kept its experts. The first
    pass completed or ran out of memory in the first slice. Slices have equally many tokens."""
    run, leaves = draw_call(kind, TOKENS - 1)
    contexts = partial(checkpoint_contexts, False, True)
    out = checkpoint(run, *leaves, use_reentrant=False, context_fn=contexts)
    dout = torch.linspace(-1, 1, out.numel()).view_as(out)
    broken = mock.patch.object(triton_launch, "run_backward", side_effect=torch.OutOfMemoryError)
    with broken if breaks_off else contextlib.nullcontext():
        try:
            torch.autograd.grad(out, leaves, dout, retain_graph=True)
        except torch.OutOfMemoryError:
            assert breaks_off
        else:
            assert not breaks_off
    return list(torch.autograd.grad(out, leaves, dout))


def differentiate_some() -> dict[str, bool]:
    """Return, for each set of trained leaves, whether every mode gives the gradients it gives with
    everything trained; assert that no input is written to."""
    names = ("x", "weights", "gate_up_bias", "down_bias")
    indices = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(TOKENS)])
    stack = draw_stack()
    biases = (stack.gate_up.bias, stack.down.bias)
    given = (torch.randn(TOKENS, HIDDEN), torch.rand(TOKENS, TOP_K), *biases)
    dout = torch.randn(TOKENS, HIDDEN)

    def run(way: str, trained: tuple[str, ...]) -> dict[str, torch.Tensor]:
        leaves = [t.clone().requires_grad_(n in trained) for n, t in zip(names, given, strict=True)]
        x, weights, *biases = leaves
        call = (x, indices, weights, with_biases(stack, *biases))
        if way == "plain":
            out = experts_op.expert_mlp(*call)
        else:
            contexts = partial(checkpoint_contexts, False, way == "kept")
            out = checkpoint(
                *(experts_op.expert_mlp, *call), use_reentrant=False, context_fn=contexts
            )
        asked = [leaf for leaf in leaves if leaf.requires_grad]
        grads = torch.autograd.grad(out, asked, dout)
        assert all(map(torch.equal, leaves, given)), (way, trained)
        return {"out": out.detach(), **dict(zip(trained, grads, strict=True))}

    whole = run("plain", names)
    return {
        " ".join(trained): all(
            torch.equal(grad, whole[name])
            for way in ("plain", "made", "kept")
            for name, grad in run(way, trained).items()
        )
        for trained in (*((name,) for name in names), names[:2], names)
    }


class Layer(torch.nn.Module):
    """A layer of experts, which runs under the checkpoint function that its model is given."""

    def __init__(self, index: int, run: Callable):
        super().__init__()
        self.self_attn = SimpleNamespace(layer_idx=index)
        self.run = run

    def forward(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return x + self.run(x, weights)


def differentiate_layers(watch: Watch, keep_experts: int) -> tuple[list[torch.Tensor], list[int]]:
    """Return (output and gradients of a model; living gate_up outputs: after its forward pass, then
    after the backward pass of each layer, the last one first)."""
    run, leaves = draw_call("plain")
    functions: list[partial] = []
    model = SimpleNamespace(
        config=SimpleNamespace(num_hidden_layers=LAYERS),
        _set_gradient_checkpointing=lambda enable, gradient_checkpointing_func: functions.append(
            gradient_checkpointing_func
        ),
    )
    checkpoint_layers(model, False, keep_experts)
    watch.made.clear()
    hidden, living = [leaves[0]], []
    for index in range(LAYERS):
        call = partial(Layer(index, run).__call__, weights=leaves[1])
        hidden.append(functions[0](call, hidden[-1]))
        hidden[-1].register_hook(lambda _: living.append(watch.living()))
    out = hidden[-1]
    grads = torch.autograd.grad(out, leaves, torch.linspace(-1, 1, out.numel()).view_as(out))
    return [out, *grads], [*living, watch.living()]


def keep_in_some_layers(watch: Watch) -> dict[str, Any]:
    """Return whether results are the same bits however many layers keep their experts' output, and
    how many outputs live meanwhile, by that number."""
    made = [differentiate_layers(watch, layers) for layers in range(LAYERS + 1)]
    return {
        "equal": all(all(map(torch.equal, found, made[0][0])) for found, _ in made),
        "finite": all(bool(t.isfinite().all()) and bool(t.any()) for t in made[0][0]),
        "living": [living for _, living in made],
    }


def decode_once() -> dict[str, Any]:
    """Return how often a layer's weights are decoded for both products of a backward pass, by how
    many of its layers keep their outputs, and whether the bits are the same; then with how many
    tokens the memory that one layer frees is enough for it."""
    real, decoded = triton_launch.decode_all, []

    def decode_all(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
        decoded.append(weight)
        return real(weight, dtype)

    experts_op.freed_outputs = lambda: 1
    enough = [
        experts_op._decodes_once(
            ExpertCall(torch.empty(0), torch.empty(tokens, TOP_K), torch.empty(0)),
            ExpertOperands(draw_stack(), Adapters(), Gate(1.0, 1.0), backend),
        )
        for tokens in (47, 48)
        for backend in ("packed", "decode")
    ]
    experts_op.freed_outputs = lambda: 100 * freed_outputs()
    experts_op.choose = lambda *_: "decode"
    made, counts = [], []
    with mock.patch.object(triton_launch, "decode_all", decode_all):
        for layers in range(LAYERS + 1):
            decoded.clear()
            made.append(differentiate_layers(Watch(), layers)[0])
            counts.append(len(decoded))
    equal = all(all(map(torch.equal, found, made[0])) for found in made)
    return {"equal": equal, "counts": counts, "enough": enough}


def main() -> None:
    patch_once()
    experts_op.SLICE_TOKENS = -(-TOKENS // SLICES)
    experts_op.choose = lambda *_: "packed"
    watch, results = Watch(), {}
    for kind in ("plain", "residual", "biases", "adapters"):
        made, made_counts = differentiate(kind, watch, keep_experts=False)
        kept, kept_counts = differentiate(kind, watch, keep_experts=True)
        gradients = len(kept) // 2
        strides = [leaf.stride() for leaf in draw_call(kind)[1]]
        results[kind] = {
            "equal": all(map(torch.equal, kept, made)),
            "equal_again": all(map(torch.equal, kept[1:], kept[1 + gradients :])),
            "equal_after_failure": all(
                map(torch.equal, *(differentiate_again(kind, broke) for broke in (True, False)))
            ),
            "laid_out_alike": [grad.stride() for grad in kept[1 : 1 + gradients]] == strides,
            "finite": all(bool(t.isfinite().all()) and bool(t.any()) for t in kept),
            "made": made_counts,
            "kept": kept_counts,
        }
    results |= {"some": differentiate_some(), "layers": keep_in_some_layers(watch)}
    results["decoded"] = decode_once()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
