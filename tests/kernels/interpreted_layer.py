"""Runs norm, rotary, router and loss kernels in Triton's interpreter; test_layer.py starts it.

A process of its own, because the interpreter must be chosen before Triton is imported. Prints one
JSON document: for each case the relative L2 errors of results and gradients against fp64, NaN where
a result held NaN.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import contextlib
import json
from functools import partial

import numpy
import torch
from torch.utils.checkpoint import checkpoint

from sparselong.kernels.layer import cross_entropy, cross_entropy_shard, rotary, router
from sparselong.kernels.layer import cross_entropy_shard_triton as shard_kernels
from sparselong.kernels.layer import cross_entropy_triton as cross_entropy_kernels
from sparselong.kernels.layer import norm as rms_norm
from sparselong.runtime import checkpoint_contexts
from tests.poisoned import PoisonedTorch
from tests.references.cross_entropy import linear_cross_entropy_reference
from tests.references.norm import add_rms_norm_reference, rms_norm_reference
from tests.references.rotary import rotate_reference
from tests.references.router import route_reference

EPS = 1e-5
contexts = partial(checkpoint_contexts, False)


class Cuda:
    """torch.cuda without a device."""

    @staticmethod
    def device_of(_):
        return contextlib.nullcontext()


class Poisoned(PoisonedTorch):
    """Without a device."""

    cuda = Cuda()


def errors(function, exact, inputs) -> list[float]:
    """Relative L2 errors of outputs and gradients, with random upstream gradients."""
    results = []
    upstream = None
    for call, kind in ((function, None), (exact, torch.float64)):
        leaves = [t.detach().to(kind or t.dtype).requires_grad_() for t in inputs]
        outputs = [out for out in call(*leaves) if out is not None]
        upstream = upstream or [torch.randn(out.shape).to(out.dtype) for out in outputs]
        grads = torch.autograd.grad(outputs, leaves, [u.to(outputs[0].dtype) for u in upstream])
        results.append([*outputs, *grads])
    pairs = zip(*results, strict=True)
    return [((a.double() - b).norm() / (b.norm() + 1e-12)).item() for a, b in pairs]


def norm_cases() -> dict[str, list[float]]:
    found = {}
    for name, shape, dtype in (
        ("one_row", (1, 96), torch.float32),
        ("rows_not_a_block", (3, 43, 100), torch.float32),
        ("gpt_oss_width", (2, 2880), torch.float32),
        ("half", (5, 96), torch.float16),
        ("strided", (9, 64), torch.float32),
    ):
        x, residual = (torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype) for _ in "12")
        x, residual = (t[..., : shape[-1]] for t in (x, residual))
        if name != "strided":
            x, residual = x.contiguous(), residual.contiguous()
        weight = (torch.randn(2 * shape[-1]) + 1)[:: 2 if name == "strided" else 1][: shape[-1]]
        found[f"norm_{name}"] = errors(
            lambda x, w: rms_norm.RMSNormFunction.apply(x, None, w, EPS),
            lambda x, w: (rms_norm_reference(x, w, EPS), x),
            (x, weight),
        )
        if dtype == torch.float32:  # the sum's rounding is not the reference's in fp64
            found[f"add_norm_{name}"] = errors(
                lambda x, r, w: rms_norm.RMSNormFunction.apply(x, r, w, EPS),
                lambda x, r, w: add_rms_norm_reference(x, r, w, EPS),
                (x, residual, weight),
            )
    return found


def rotary_cases() -> dict[str, list[float]]:
    found = {}
    for name, (batch, tokens, heads, kv_heads, dim), rows in (
        ("tail", (1, 5, 9, 2, 64), 1),
        ("positions_of_their_own", (2, 3, 4, 1, 16), 2),
        ("shared_positions", (2, 6, 3, 3, 12), 1),
    ):
        q, k = (torch.randn(batch, tokens, n, dim).transpose(1, 2) for n in (heads, kv_heads))
        cos, sin = torch.randn(2, rows, dim // 2, tokens).mT  # as transformers': not contiguous
        found[f"rotary_{name}"] = errors(
            lambda q, k, c=cos, s=sin: rotary.RotateFunction.apply(q, k, c, s),
            lambda q, k, c=cos, s=sin: rotate_reference(q, k, c, s),
            (q, k),
        )
        mirrored = (q.mT.contiguous().mT, k.mT.contiguous().mT)  # last axis not contiguous
        found[f"rotary_{name}_dims"] = errors(
            lambda q, k, c=cos, s=sin: rotary.RotateFunction.apply(q, k, c, s),
            lambda q, k, c=cos, s=sin: rotate_reference(q, k, c, s),
            mirrored,
        )
        found[f"rotary_{name}_contiguous_angles"] = errors(
            lambda q, k, c=cos, s=sin: rotary.RotateFunction.apply(q, k, c.contiguous(), s),
            lambda q, k, c=cos, s=sin: rotate_reference(q, k, c, s),
            (q, k),
        )
        found[f"rotary_{name}_projections"] = projection_errors(q, k, cos, sin)
    return found


def projection_errors(q, k, cos, sin) -> list[float]:
    """Errors of rotated q and k and the gradients before the rotation; 1 where values changed.

    q, k and v are views of one product's output, and the gradients are written into one.
    """
    batch, heads, tokens, dim = q.shape
    sizes = [heads * dim, k.shape[1] * dim, k.shape[1] * dim]

    def split(joint):
        parts = joint.split(sizes, -1)
        return tuple(part.view(batch, tokens, -1, dim).transpose(1, 2) for part in parts)

    made = split(torch.randn(batch, tokens, sum(sizes)))
    results = tuple(torch.full_like(part, float("nan")) for part in made)
    rotary._launch(made, cos, sin, results, back=False)
    leaves = [part.double().requires_grad_() for part in made]
    exact = (*rotate_reference(*leaves[:2], cos, sin), leaves[2])
    upstream = [torch.randn_like(part) for part in results]
    upstream[2] = upstream[2].mT.contiguous().mT
    joint = torch.full((batch, tokens, sum(sizes)), float("nan"))
    rotary._launch(upstream, cos, sin, split(joint), back=True)
    wanted = torch.autograd.grad(exact, leaves, [up.double() for up in upstream])
    pairs = zip((*results, *split(joint)), (*exact, *wanted), strict=True)
    found = [((a.double() - b).norm() / b.norm()).item() for a, b in pairs]
    unchanged = torch.equal(results[2], made[2]) and torch.equal(split(joint)[2], upstream[2])
    return [*found, 0.0 if unchanged else 1.0]


def router_cases() -> dict[str, list[float]]:
    """Weights and gradients, and 1 for each routed token with another expert than the reference."""
    found = {}
    for name, tokens, hidden, experts, top_k in (
        ("tile", 32, 128, 16, 4),
        ("tails", 67, 200, 33, 4),
        ("one_expert", 3, 65, 5, 1),
        ("three_of_three", 2, 64, 3, 3),
    ):
        x, bias = torch.randn(tokens, hidden), torch.randn(experts)
        weight = torch.randn(experts, hidden) * hidden**-0.5
        layer = router.Router(weight, bias, top_k)
        found[f"router_{name}"] = errors(
            lambda x, r=layer: router.route(x, r)[:2],
            lambda x, r=layer: route_reference(x, r.weight.double(), r.bias.double(), r.top_k)[:2],
            (x,),
        )
        chosen = (router.route(x, layer)[2], route_reference(x, weight, bias, top_k)[2])
        found[f"router_{name}"].append(float((chosen[0] != chosen[1]).sum()))
        for unused in (0, 1):
            found[f"router_{name}_without_{unused}"] = errors(
                lambda x, r=layer, n=unused: router.route(x, r)[1 - n : 2 - n],
                lambda x, r=layer, n=unused: route_reference(
                    x, r.weight.double(), r.bias.double(), r.top_k
                )[1 - n : 2 - n],
                (x,),
            )
    return found | odd_logits() | {"router_recomputed": recomputed_router()}


def recomputed_router() -> list[float]:
    """1 for each failure: a checkpoint chooses the experts once, and has the same gradients."""
    layer = router.Router(torch.randn(5, 64), torch.randn(5), 2)
    x, upstream = torch.randn(7, 64, requires_grad=True), torch.randn(7, 2)
    launched, launch = [], router.launch

    def watch(kernel, *args, **constants):
        launched.append(kernel.__name__)
        launch(kernel, *args, **constants)

    def choose(x):
        return router.route(x.sin(), layer)[1]

    results = []
    router.launch = watch
    for run in (choose, partial(checkpoint, choose, use_reentrant=False, context_fn=contexts)):
        weights = run(x)
        results.append((weights, *torch.autograd.grad(weights, x, upstream)))
    router.launch = launch
    once = launched == ["route_kernel", "route_backward_kernel"] * 2
    return [float(not one) for one in (once, *map(torch.equal, *results))]


def odd_logits() -> dict[str, list[float]]:
    """Logits that are equal, infinite or NaN, and the flag that says so: 1 for each failure."""
    nan, large = float("nan"), float("inf")
    found = {}
    for name, logits, expected, is_broken in (
        ("equal", [1.0, 2.0, 2.0, 1.0, 2.0], [1, 2, 4], False),
        ("signs_of_zero", [-0.0, 0.0, -1.0, 0.0], [0, 1, 3], False),
        ("infinite", [-large, 3.0, large, -large], [2, 1, 0], True),
        ("nan", [5.0, nan, 7.0, 6.0], [1, 2, 3], True),
    ):
        weight, bias = torch.zeros(len(logits), 64), torch.tensor(logits)
        broken = torch.zeros(1, dtype=torch.bool)
        layer = router.Router(weight, bias, 3, broken)
        _, weights, indices = router.route(torch.ones(2, 64), layer)
        same = indices.tolist() == [expected] * 2
        exact = bias[expected].softmax(0).expand(2, 3)
        close = torch.allclose(weights, exact, equal_nan=True)
        found[f"router_{name}"] = [
            float(not one) for one in (same, close, bool(broken) == is_broken)
        ]
    return found


def softmax_cases() -> dict[str, list[float]]:
    found = {}
    for name, rows, vocab, scale in (
        ("one_tile", 3, 100, 1.0),
        ("tail", 5, 4097, 3.0),
        ("large", 2, 5000, 100.0),
    ):
        logits = torch.randn(rows, vocab) * scale
        targets = torch.randint(0, vocab, (rows,))
        targets[0] = vocab - 1
        leaf = logits.double().requires_grad_()
        identity = torch.eye(vocab, dtype=torch.float64)
        loss = linear_cross_entropy_reference(leaf, identity, targets)
        (gradient,) = torch.autograd.grad(loss, leaf)
        losses = torch.full((rows,), float("nan"))
        for needs_gradient in (False, True):
            cross_entropy_kernels.softmax_kernel[(rows,)](
                logits, targets, losses, vocab, NEEDS_GRADIENT=needs_gradient, BLOCK=4096
            )
            found[f"softmax_{name}_{needs_gradient}"] = [
                (losses.double().sum() - loss).abs().item() / loss.item()
            ]
        found[f"softmax_{name}_True"].append(
            ((logits.double() - gradient).norm() / gradient.norm()).item()
        )
    return found


def shard_cases() -> dict[str, list[float]]:
    """The softmax over logits that are split into shards, one of them without columns."""
    found = {}
    for name, rows, widths, scale in (
        ("one_shard", 3, (100,), 1.0),
        ("uneven", 5, (70, 4097, 0, 33), 3.0),
        ("large", 2, (2500, 2500), 100.0),
    ):
        vocab = sum(widths)
        logits, targets = torch.randn(rows, vocab) * scale, torch.randint(0, vocab, (rows,))
        targets[0], targets[1] = vocab - 1, 0
        leaf = logits.double().requires_grad_()
        identity = torch.eye(vocab, dtype=torch.float64)
        loss = linear_cross_entropy_reference(leaf, identity, targets)
        (gradient,) = torch.autograd.grad(loss, leaf)
        shards = [part.contiguous() for part in logits.split(widths, 1)]
        firsts = [sum(widths[:n]) for n in range(len(widths))]
        statistics = torch.full((len(widths), rows, 3), float("nan"))
        for shard, first, into in zip(shards, firsts, statistics, strict=True):
            shard_kernels.statistics_kernel[(rows,)](
                shard, targets, into, shard.shape[1], first, BLOCK=4096
            )
        losses, normalizers = cross_entropy_shard.combine_statistics(statistics)
        for shard, first in zip(shards, firsts, strict=True):
            grid = (rows, -(-shard.shape[1] // 64))
            if shard.numel():
                shard_kernels.gradient_kernel[grid](
                    shard, targets, normalizers, shard.shape[1], first, BLOCK=64
                )
        got = torch.cat(shards, 1).double()
        found[f"shard_{name}"] = [
            (losses.double().sum() - loss).abs().item() / loss.item(),
            ((got - gradient).norm() / gradient.norm()).item(),
        ]
    return found


def main() -> None:
    torch.manual_seed(0)
    for module in (rms_norm, rotary, router, cross_entropy, cross_entropy_shard):
        module.torch = Poisoned()
    numpy.seterr(all="ignore")
    print(
        json.dumps(norm_cases() | rotary_cases() | router_cases() | softmax_cases() | shard_cases())
    )


if __name__ == "__main__":
    main()
