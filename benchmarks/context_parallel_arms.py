"""Baselines for attention across GPUs: contiguous shards that gather everything, and Ulysses.

`contiguous` is llama3-style context parallelism as published: rank r holds tokens [r T, (r + 1) T).
Keys and values of a few KV heads are gathered from all ranks while attention of the previous ones
is computed, and dK and dV are reduce-scattered. `ulysses` (Jacobs et al., 2023, arXiv:2309.14509)
exchanges sequence shards for heads by all-to-all, computes attention of whole sequences with its
heads' sinks, and exchanges back. Both use the same kernels as this project's arm unless
`torch_flash` is named. `ring-flash-attn`, if installed, is that package on flash-attn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from benchmarks.ring_flash_attn_arm import attend_by_ring, refuse_ring
from sparselong.kernels.attention.mask import AttentionCall, Mask, SavedForward
from sparselong.kernels.attention.op import attention, load_backend, pick_backend
from sparselong.parallel.collectives import record_bytes, start_all_to_all
from sparselong.parallel.mesh import Mesh
from sparselong.parallel.sequence.attention import pack
from sparselong.parallel.sequence.context import Context, Layout
from sparselong.parallel.sequence.shard import chunks_of


class Arm(NamedTuple):
    """A method of computing attention: (q, k, v, sinks, window) of this rank's tokens → out."""

    attend: Callable[..., torch.Tensor]
    take: Callable[[torch.Tensor], torch.Tensor]
    """[rows, heads, tokens, head_dim] of the whole sequence → this rank's tokens."""


def make_arms(mesh: Mesh, tokens: int, strides: list[int], best: int) -> dict[str, Arm]:
    """Return all arms by name. `best` is the stride of the baseline and of other kernels."""
    size, rank = mesh.context_size, mesh.context_rank

    def zigzag(whole: torch.Tensor) -> torch.Tensor:
        chunks = whole.chunk(2 * size, 2)
        return torch.cat([chunks[n] for n in chunks_of(rank, size)], 2)

    def contiguous(whole: torch.Tensor) -> torch.Tensor:
        return whole.chunk(size, 2)[rank]

    def ours(stride: int, backend: str | None = None) -> Arm:
        context = Context(mesh, Layout((0, tokens), 1, stride))

        def attend(q, k, v, sinks, window):
            return context.attend(
                q, k, v, sinks, window=window, scale=None, backend=backend, deterministic=False
            )

        return Arm(attend, zigzag)

    def gathering(backend: str | None) -> Arm:
        def attend(q, k, v, sinks, window):
            call = _whole_past(q, sinks, window, mesh)
            name = pick_backend(backend, q, call)  # here, where gradients are enabled
            return _Gathering.apply(q, k, v, sinks, call, best, name, mesh)

        return Arm(attend, contiguous)

    def ulysses(q, k, v, sinks, window):
        q, k, v = (_Swap.apply(t, mesh, True) for t in (q, k, v))
        out, _ = attention(q, k, v, sinks.chunk(size)[rank], window=window)
        return _Swap.apply(out, mesh, False)

    def ring(q, k, v, sinks, window):
        return attend_by_ring(q, k, v, sinks, (0, tokens), window, best, mesh.context_group)

    arms = {f"sparselong, heads_k_stride {stride}": ours(stride) for stride in strides}
    if refuse_ring() is None:
        arms["ring-flash-attn"] = Arm(ring, contiguous)
    return arms | {
        "sparselong on torch_flash": ours(best, "torch_flash"),
        "contiguous": gathering(None),
        "contiguous on torch_flash": gathering("torch_flash"),
        "ulysses": Arm(ulysses, contiguous),
    }


def _whole_past(
    q: torch.Tensor, sinks: torch.Tensor, window: int | None, mesh: Mesh
) -> AttentionCall:
    """Return the call for this rank's queries and all keys up to the last query."""
    tokens = q.shape[2]
    end = (mesh.context_rank + 1) * tokens
    reach = None if window is None or window >= end else window
    mask = Mask(len(q), tokens, end, end - tokens, reach, None)
    return AttentionCall(mask, q.shape[-1] ** -0.5, needs_dsinks=sinks.requires_grad)


class _Gathering(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, k, v, sinks, call, stride, name, mesh):
        own, end = pack(k, v, stride), call.mask.keys
        out = torch.empty_like(q.transpose(1, 2)).transpose(1, 2)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        share, kept = q.shape[1] // len(own), []
        for group, keys in enumerate(_gather(own, mesh)):
            at = (slice(None), slice(group * share, (group + 1) * share))
            k_all, v_all = keys[:end].permute(1, 2, 3, 0, 4)
            out[at], lse[at], more = load_backend(name).attend(
                q[at], k_all, v_all, sinks[at[1]], call
            )
            kept.append(more)
        ctx.save_for_backward(q, own, sinks, out, lse)
        ctx.call, ctx.name, ctx.mesh, ctx.kept = call, name, mesh, kept
        return out

    @staticmethod
    def backward(ctx: Any, dout):
        q, own, sinks, out, lse = ctx.saved_tensors
        end, size = ctx.call.mask.keys, ctx.mesh.context_size
        dq = torch.empty_like(q.transpose(1, 2)).transpose(1, 2)
        share, pending = q.shape[1] // len(own), []
        for group, keys in enumerate(_gather(own, ctx.mesh)):
            at = (slice(None), slice(group * share, (group + 1) * share))
            k_all, v_all = keys[:end].permute(1, 2, 3, 0, 4)
            done = SavedForward(
                *(q[at], k_all, v_all, sinks[at[1]], out[at], lse[at].contiguous()),
                ctx.kept[group],
            )
            dq[at], dk, dv, _ = load_backend(ctx.name).attend_backward(dout[at], done, ctx.call)
            partial = torch.zeros_like(keys)
            partial[:end, 0] = dk.permute(2, 0, 1, 3)
            partial[:end, 1] = dv.permute(2, 0, 1, 3)
            home = torch.empty_like(own[group])
            record_bytes(partial.nbytes // size * (size - 1), "key gradients")
            work = dist.reduce_scatter_tensor(
                home, partial, group=ctx.mesh.context_group, async_op=True
            )
            pending.append((work, home))
        for work, _ in pending:
            work.wait()
        both = torch.stack([home for _, home in pending])  # [G, T, 2, B, S, D]
        dk, dv = both.permute(2, 3, 0, 4, 1, 5).flatten(2, 3)
        return dq, dk, dv, None, None, None, None, None


def _gather(own: torch.Tensor, mesh: Mesh):
    """Yield each group's keys and values of all ranks, while the next group is being gathered."""
    size = mesh.context_size

    def start(group: int):
        received = own.new_empty(size * own.shape[1], *own.shape[2:])
        record_bytes(own[group].nbytes * (size - 1), "keys")
        work = dist.all_gather_into_tensor(
            received, own[group], group=mesh.context_group, async_op=True
        )
        return work, received

    under_way = start(0)
    for group in range(len(own)):
        work, received = under_way
        work.wait()
        if group + 1 < len(own):
            under_way = start(group + 1)
        yield received


class _Swap(torch.autograd.Function):
    """[B, H, T / P, D] → [B, H / P, T, D], or back."""

    @staticmethod
    def forward(ctx: Any, tensor, mesh, to_heads):
        ctx.mesh, ctx.to_heads = mesh, to_heads
        return _swap(tensor, mesh, to_heads)

    @staticmethod
    def backward(ctx: Any, grad):
        return _swap(grad, ctx.mesh, not ctx.to_heads), None, None


def _swap(tensor: torch.Tensor, mesh: Mesh, to_heads: bool) -> torch.Tensor:
    size = mesh.context_size
    axis = 1 if to_heads else 2
    rows = torch.stack(tensor.chunk(size, axis))  # by receiving rank
    each = [1] * size
    received = start_all_to_all(rows, each, each, mesh.context_group, "heads").wait()
    return torch.cat(list(received), 2 if to_heads else 1)
