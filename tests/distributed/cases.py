"""Functions that the processes of a pool run, one per part under test."""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from sparselong.kernels.attention.op import Backend, attention
from sparselong.parallel import gradients as gradients_module
from sparselong.parallel.collectives import count_bytes, progress, sum_over_ranks
from sparselong.parallel.gradients import reduce_gradients
from sparselong.parallel.loss import StepCounts, add_losses, count_step, mean_loss
from sparselong.parallel.mesh import build_mesh
from sparselong.parallel.sequence import attention as sharded
from sparselong.parallel.sequence import context as context_module
from sparselong.parallel.sequence.context import Context, Layout
from sparselong.parallel.sequence.shard import chunks_of, shard_batch
from sparselong.runtime.recompute import checkpoint_contexts
from tests.distributed import flash_attn_stand_in

mesh_of = functools.cache(build_mesh)  # create the groups once per process


def place(context_size: int) -> tuple[int, ...]:
    mesh = build_mesh(context_size)
    members = [dist.get_process_group_ranks(g) for g in (mesh.context_group, mesh.data_group)]
    where = (mesh.context_rank, mesh.context_size, mesh.data_rank, mesh.data_size)
    return (*where, *map(tuple, members))  # type: ignore[return-value]


def refused(context_size: Any) -> str:
    try:
        build_mesh(context_size)
    except ValueError as error:
        return str(error)
    return ""


def shard(batch: dict[str, torch.Tensor], context_size: int) -> dict[str, torch.Tensor]:
    return shard_batch(batch, mesh_of(context_size))


def shard_own(batches: list[dict[str, torch.Tensor]], context_size: int) -> str:
    """Return the error message if every rank passes its own batch."""
    try:
        shard_batch(batches[dist.get_rank()], mesh_of(context_size))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def count(
    batches: list[list[dict[str, torch.Tensor]]], tokens: list[int], context_size: int
) -> StepCounts:
    """Return the counts that normalize a step; micro-batches and their tokens by data rank."""
    mesh = mesh_of(context_size)
    return count_step(batches[mesh.data_rank], mesh, tokens[mesh.data_rank])


def losses(context_size: int) -> tuple[float, float]:
    """Return (sum of rank + 1, mean loss of 10 nats over two micro-batches of one label each)."""
    mesh, rank = mesh_of(context_size), dist.get_rank()
    shard = {"shift_labels": torch.tensor([[3, -100]])}
    total = add_losses(torch.tensor(float(rank + 1), requires_grad=True), mesh)
    return float(total), mean_loss([(torch.tensor(4.0), shard), (torch.tensor(6.0), shard)], mesh)


def reduced(
    dtype: torch.dtype, context_size: int, part: int
) -> tuple[list[torch.Tensor], int, int]:
    """Return the gradients reduced in parts of at most `part` elements, the bytes sent, and the
    number of exchanges."""
    mesh, rank = mesh_of(context_size), dist.get_rank()
    generator = torch.Generator().manual_seed(rank)
    parameters = [torch.nn.Parameter(torch.zeros(n, 3, dtype=dtype)) for n in (1, 5, 2)]
    for n, parameter in enumerate(parameters):
        if n != 1 or rank != 1:  # rank 1 has no gradient for the second parameter
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
    frozen = torch.nn.Parameter(torch.zeros(2), requires_grad=False)
    before = progress()[0]
    with count_bytes() as sent, mock.patch.object(gradients_module, "PART_ELEMENTS", part):
        reduce_gradients([*parameters, frozen], mesh)
    assert frozen.grad is None
    exchanges = progress()[0] - before
    return [p.grad for p in parameters], sent["gradients"], exchanges  # type: ignore[misc]


def traffic(tokens: int, windows: tuple[int | None, ...], keep: bool | None) -> dict[str, int]:
    """Return the bytes sent, by tag, in one step of gpt-oss's attention over four ranks.

    The exchange is real, in bf16 and gpt-oss's shapes; attention itself is not computed.
    """
    mesh = mesh_of(4)
    context = Context(mesh, Layout((0, tokens), 1, heads_k_stride=4))
    shape = (1, 8, tokens // 4, 64)
    q = torch.zeros(1, 64, tokens // 4, 64, dtype=torch.bfloat16).requires_grad_()
    k, v = (torch.zeros(shape, dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    sinks = torch.zeros(64)

    def attend(q, k, v, sinks, call):
        return torch.zeros_like(q), torch.zeros(q.shape[:3]), ()

    def attend_backward(dout, done, call):
        return torch.zeros_like(done.q), torch.zeros_like(done.k), torch.zeros_like(done.v), None

    def layer(k, v, window):
        extra = {"scale": None, "backend": None, "deterministic": False}
        return context.attend(q, k, v, sinks, window=window, **extra).mean() + k.mean()

    idle = Backend(lambda *_: None, attend, attend_backward)
    with (
        mock.patch.object(sharded, "load_backend", lambda _: idle),
        count_bytes() as sent,
    ):
        for window in windows:
            if keep is None:
                out = layer(k, v, window)
            else:
                contexts = functools.partial(checkpoint_contexts, keep)
                out = checkpoint(layer, k, v, window, use_reentrant=False, context_fn=contexts)
            out.backward()
    return dict(sent)


class _LooksBackward(torch.autograd.Function):
    """Identity whose backward pass records this process's last exchange."""

    @staticmethod
    def forward(ctx, x, seen):
        ctx.seen = seen
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        _ = ctx.saved_tensors  # as in the experts: triggers the recomputation
        ctx.seen.append(progress())
        return grad, None


def exchanges_before_the_experts_backward(keep: bool | None) -> tuple[int, str]:
    """Return how many exchanges a layer's backward pass has begun when it reaches the experts after
    attention, and the tag of the last one."""
    mesh = mesh_of(dist.get_world_size())
    context = Context(mesh, Layout((0, 16), 1, heads_k_stride=1))
    q, k, v = (torch.randn(1, heads, 8, 8).requires_grad_() for heads in (4, 2, 2))
    extra = {"window": None, "scale": None, "backend": None, "deterministic": False}
    seen: list[tuple[int, str]] = []

    def layer(q: torch.Tensor) -> torch.Tensor:
        attended = context.attend(q, k, v, torch.zeros(4), **extra)
        return _LooksBackward.apply(attended, seen)

    contexts = functools.partial(checkpoint_contexts, bool(keep))
    run = functools.partial(checkpoint, use_reentrant=False, context_fn=contexts)
    out = layer(q) if keep is None else run(layer, q)
    before = progress()[0]
    out.sum().backward()
    return seen[0][0] - before, seen[0][1]


def attend_wrongly(heads_k_stride: int, tokens: int) -> str:
    """Return the error message of a call that does not match a layout of 16 tokens."""
    mesh = mesh_of(dist.get_world_size())
    context = Context(mesh, Layout((0, 16), 1, heads_k_stride))
    q, k = torch.zeros(1, 4, tokens, 8), torch.zeros(1, 2, tokens, 8)
    extra = {"window": None, "scale": None, "backend": None, "deterministic": False}
    try:
        context.attend(q, k, k, torch.zeros(4), **extra)
    except ValueError as error:
        return str(error)
    return ""


def differentiate_twice() -> str:
    """Return the error message if second derivatives are requested."""
    mesh = mesh_of(dist.get_world_size())
    context = Context(mesh, Layout((0, 16), 1))
    q, k, v = (torch.randn(1, heads, 8, 8).requires_grad_() for heads in (4, 2, 2))
    extra = {"window": None, "scale": None, "backend": None, "deterministic": False}
    out = context.attend(q, k, v, torch.zeros(4), **extra)
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    try:
        dq.sum().backward()
    except RuntimeError as error:
        return str(error)
    return ""


def attend_by(
    backend: str, window: int | None, boundaries: tuple[int, ...], stride: int
) -> list[float]:
    """Return a GPU backend's errors of out, dq, dk, dv and dsinks for this rank's tokens, against
    plain attention in one process. Triton runs interpreted, flash-attn and -4 are stand-ins."""
    inputs = _inputs(boundaries[-1], 0)
    expected = _attend_alone(inputs, window, boundaries, None)
    with flash_attn_stand_in.installed():
        got = _attend_in_shards(inputs, window, boundaries, backend, stride)
    return _distances(got, _take_own(expected))


def rounding_errors(
    backend: str,
    window: int | None,
    boundaries: tuple[int, ...],
    stride: int,
    device: str,
    seed: int,
) -> tuple[list[float], list[float]]:
    """Return the errors against fp64 of out, dq, dk, dv and dsinks for this rank's tokens with bf16
    inputs: computed in shards, and in one process."""
    inputs = _inputs(boundaries[-1], seed)
    inputs = [*(t.bfloat16() for t in inputs[:3]), inputs[3], inputs[4].bfloat16()]
    exact = _attend_alone([t.double() for t in inputs], window, boundaries, None)
    inputs = [t.to(device) for t in inputs]
    got = _attend_in_shards(inputs, window, boundaries, backend, stride)
    alone = _attend_alone(inputs, window, boundaries, backend)
    wanted = _take_own(exact)
    return _distances(got, wanted), _distances(_take_own(alone), wanted)


def ring_rounding_errors(
    window: int | None, boundaries: tuple[int, ...], stride: int, device: str, seed: int
) -> tuple[list[float], list[float]]:
    """Return the same as `rounding_errors` for ring-flash-attn, whose shards are contiguous."""
    from benchmarks.ring_flash_attn_arm import attend_by_ring

    group = mesh_of(dist.get_world_size()).context_group

    def take(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.chunk(dist.get_world_size(), 2)[dist.get_rank()]

    inputs = _inputs(boundaries[-1], seed)
    inputs = [*(t.bfloat16() for t in inputs[:3]), inputs[3], inputs[4].bfloat16()]
    exact = _attend_alone([t.double() for t in inputs], window, boundaries, None)
    q, k, v, sinks, dout = inputs = [t.to(device) for t in inputs]
    local = [*(take(t).clone().requires_grad_() for t in (q, k, v)), sinks.requires_grad_()]
    out = attend_by_ring(*local, boundaries, window, stride, group)
    got = [out, *torch.autograd.grad(out, local, take(dout))]
    got[4] = sum_over_ranks(got[4], group, "test")
    alone = _attend_alone(inputs, window, boundaries, "flash_attn")
    wanted, own = ([*map(take, whole[:4]), whole[4]] for whole in (exact, alone))
    return _distances(got, wanted), _distances(own, wanted)


def _inputs(tokens: int, seed: int) -> list[torch.Tensor]:
    """Draw q, k, v, sinks and the gradient of out; four heads share two KV heads."""
    generator = torch.Generator().manual_seed(seed)
    q, dout = (torch.randn(1, 4, tokens, 64, generator=generator) for _ in range(2))
    k, v = (torch.randn(1, 2, tokens, 64, generator=generator) for _ in range(2))
    return [q, k, v, torch.randn(4, generator=generator), dout]


def _attend_alone(
    inputs: list[torch.Tensor],
    window: int | None,
    boundaries: tuple[int, ...],
    backend: str | None,
) -> list[torch.Tensor]:
    """Return out, dq, dk, dv and dsinks of the whole sequence."""
    *whole, dout = inputs
    whole = [t.clone().requires_grad_() for t in whole]
    cu_seqlens = torch.tensor(boundaries, device=dout.device) if len(boundaries) > 2 else None
    out = attention(*whole, cu_seqlens=cu_seqlens, window=window, backend=backend)[0]
    return [out, *torch.autograd.grad(out, whole, dout)]


def _attend_in_shards(
    inputs: list[torch.Tensor],
    window: int | None,
    boundaries: tuple[int, ...],
    backend: str,
    stride: int,
) -> list[torch.Tensor]:
    """Return the same for this rank's tokens, but dsinks over all tokens."""
    mesh = mesh_of(dist.get_world_size())
    q, k, v, sinks, dout = inputs
    local = [_take(t).clone().requires_grad_() for t in (q, k, v)]
    local.append(sinks.clone().requires_grad_())
    extra = {"scale": None, "backend": None, "deterministic": False}
    named = mock.patch.object(context_module, "pick_backend", lambda *_: backend)
    with named:
        context = Context(mesh, Layout(boundaries, 1, stride))
        out = context.attend(*local, window=window, **extra)
        got = [out, *torch.autograd.grad(out, local, _take(dout))]
    got[4] = sum_over_ranks(got[4], mesh.context_group, "test")
    return got


def _take(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's tokens of [1, heads, tokens, 64]."""
    mesh = mesh_of(dist.get_world_size())
    chunks = tensor.chunk(2 * mesh.context_size, 2)
    return torch.cat([chunks[n] for n in chunks_of(mesh.context_rank, mesh.context_size)], 2)


def _take_own(whole: list[torch.Tensor]) -> list[torch.Tensor]:
    return [*map(_take, whole[:4]), whole[4]]


def _distances(got: list[torch.Tensor], expected: list[torch.Tensor]) -> list[float]:
    ours, theirs = ([t.detach().double().cpu() for t in each] for each in (got, expected))
    return [float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True)]
