"""Experts in host memory in Triton's interpreter, against the same experts on the device.

experts/test_host.py starts it. Runs in its own process, because the interpreter must be chosen
before Triton is imported. Prints one JSON document: whether results are the same bits, by way and
kind of call, and how many layers were copied.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import json
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from sparselong.kernels.expert_stack import ExpertStack, HostStack, PackedWeight
from sparselong.kernels.experts import op as experts_op
from sparselong.kernels.experts.lora import Adapter, Adapters
from sparselong.model.host_experts import HostExperts
from sparselong.runtime.recompute import checkpoint_contexts
from tests.kernels.interpreted_experts import draw_weight
from tests.kernels.interpreter import patch_once

LAYERS, TOKENS, EXPERTS, TOP_K, HIDDEN, INNER, RANK = 3, 7, 3, 2, 32, 32, 3
CPU = torch.device("cpu")
WAYS = ("plain", "made", "kept", "inference")
Model = list[tuple[ExpertStack, Adapters]]


def draw_model(kind: str) -> Model:
    torch.manual_seed(0)
    model = []
    for _ in range(LAYERS):
        gate_up = draw_weight(EXPERTS, 2 * INNER, HIDDEN)
        stack = ExpertStack(gate_up, draw_weight(EXPERTS, HIDDEN, INNER))
        factors = [
            (torch.randn(EXPERTS, RANK, width), torch.randn(EXPERTS, out, RANK))
            for out, width in ((2 * INNER, HIDDEN), (HIDDEN, INNER))
        ]
        made = (Adapter(a.requires_grad_(), b.requires_grad_(), 0.5) for a, b in factors)
        model.append((stack, Adapters(*made) if kind == "adapters" else Adapters()))
    return model


def put_on_host(model: Model) -> tuple[HostExperts, list[HostStack]]:
    """Return the memory, and the layers' stacks in it."""
    first = model[0][0]
    packed = {
        f"{part}.{name}": tuple(getattr(weight, name).shape)
        for part, weight in first._asdict().items()
        for name in ("blocks", "scales")
    }
    host = HostExperts(LAYERS, packed, locked=False)
    host.start(CPU)
    stacks = []
    for number, (stack, _) in enumerate(model):
        tensors = host.tensors(number)
        weights = []
        for part, weight in stack._asdict().items():
            blocks, scales = (tensors[f"{part}.{name}"] for name in ("blocks", "scales"))
            blocks.copy_(weight.blocks)
            scales.copy_(weight.scales)
            weights.append(PackedWeight(blocks, scales, weight.bias))
        stacks.append(HostStack(weights[0], weights[1], CPU, partial(host.fetch, number)))
    return host, stacks


def differentiate(model: Model, stacks: list, way: str) -> list[torch.Tensor]:
    """Return output and gradients of all layers in a row, each with residual."""
    torch.manual_seed(1)
    indices = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(TOKENS)])
    x, weights = torch.randn(TOKENS, HIDDEN), torch.rand(TOKENS, TOP_K)
    leaves = [x.requires_grad_(), weights.requires_grad_()]
    leaves += [f for _, adapters in model for f in adapters.factors if f is not None]

    def layer(x: torch.Tensor, stack: ExpertStack, adapters: Adapters) -> torch.Tensor:
        return x + 0.01 * experts_op.expert_mlp(x.sin(), indices, weights, stack, adapters)

    out = x
    with torch.set_grad_enabled(way != "inference"):
        for (_, adapters), stack in zip(model, stacks, strict=True):
            if way in ("made", "kept"):
                contexts = partial(checkpoint_contexts, False, way == "kept")
                out = checkpoint(
                    *(layer, out, stack, adapters), use_reentrant=False, context_fn=contexts
                )
            else:
                out = layer(out, stack, adapters)
    if way == "inference":
        return [out]
    dout = torch.linspace(-1, 1, out.numel()).view_as(out)
    return [out, *torch.autograd.grad(out, leaves, dout)]


def main() -> None:
    patch_once()
    experts_op.choose = lambda *_: "packed"
    results = {}
    for kind in ("plain", "adapters"):
        model = draw_model(kind)
        host, stacks = put_on_host(model)
        for way in WAYS:
            expected = differentiate(model, [stack for stack, _ in model], way)
            before = host.copied_bytes
            found = differentiate(model, stacks, way)
            results[f"{kind}, {way}"] = {
                "equal": all(map(torch.equal, found, expected)) and len(found) == len(expected),
                "finite": all(bool(t.isfinite().all()) and bool(t.any()) for t in expected),
                "copied": (host.copied_bytes - before) / host.layer_bytes,
            }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
