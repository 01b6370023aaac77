"""ring-flash-attn's llama3-style attention with sinks: a baseline for attention across GPUs.

The package (its function `llama3_flash_attn_varlen_func`, which Axolotl's context parallelism
calls) gathers the keys of a few KV heads from all ranks, and runs flash-attn on a rank's contiguous
queries. It knows no sinks. Its out and log-sum-exp are therefore joined with them, after which its
own backward pass returns exact gradients (`sparselong/kernels/attention/torch_operators.py` says
why). Used as it comes, without this, it does not compute gpt-oss.

ring-flash-attn 0.1.8 does not import beside transformers 5, which dropped a name that its adapter
for transformers reads; no more than that name is supplied.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from transformers import modeling_flash_attention_utils

from sparselong.kernels.attention.installed import refuse_flash_attn
from sparselong.kernels.attention.join import join
from sparselong.kernels.attention.mask import SavedForward
from sparselong.kernels.attention.torch_operators import sink_gradient
from sparselong.parallel.collectives import record_bytes


def refuse_ring() -> str | None:
    """Return why there is no ring-flash-attn to use, or None if there is."""
    if importlib.util.find_spec("ring_flash_attn") is None:
        return "ring_flash_attn is not installed; allowed: ./install.sh --with-flash-attn"
    return refuse_flash_attn()


@functools.cache
def load_ring() -> Any:
    """Return the package's module of llama3-style attention."""
    missing = "is_flash_attn_greater_or_equal_2_10"
    with mock.patch.object(modeling_flash_attention_utils, missing, True, create=True):
        return importlib.import_module("ring_flash_attn.llama3_flash_attn_varlen")


def attend_by_ring(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor,
    boundaries: tuple[int, ...],
    window: int | None,
    heads_k_stride: int,
    group: dist.ProcessGroup,
) -> torch.Tensor:
    """Return attention of this rank's contiguous tokens, with gradients for q, k, v and sinks.

    Args:
        q: [1, heads, T, D], this rank's queries.
        k: [1, kv_heads, T, D], this rank's keys.
        v: [1, kv_heads, T, D], this rank's values.
        sinks: [heads].
        boundaries: of the documents in the whole sequence, from 0 to T times the ranks.
        window: keys that a query sees, or None.
        heads_k_stride: KV heads that are gathered at a time.
        group: the ranks.

    Returns:
        [1, heads, T, D].
    """
    ranks = (dist.get_rank(group), dist.get_world_size(group))
    *sizes, keys = _prepare(boundaries, *ranks, q.device)
    options = {
        "heads_k_stride": heads_k_stride,
        "local_k_slice": keys,
        "softmax_scale": q.shape[-1] ** -0.5,
        "dropout_p": 0.0,
        "causal": True,
        "window_size": (-1, -1) if window is None else (window - 1, 0),
    }
    return _Ring.apply(q, k, v, sinks, sizes, options, group)  # pyright: ignore[reportReturnType]


@functools.cache
def _prepare(boundaries: tuple[int, ...], rank: int, size: int, device: torch.device) -> Any:
    """Return the boundaries of a rank's queries and keys, the longest, and the slice of its keys.

    Computed once for a batch, as by the package's users, because it waits for the device.
    """
    bounds = torch.tensor(boundaries, dtype=torch.int32, device=device)
    return load_ring().llama3_flash_attn_prepare_cu_seqlens(bounds, True, rank, size)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, k, v, sinks, sizes, options, group):
        _record(k, group, "keys")
        out, lse = load_ring().llama3_flash_attn_varlen_forward(
            group, *_token_major(q, k, v), *sizes, **options
        )
        out, lse = join([(out.transpose(0, 1)[None], lse[None])], sinks)
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.sizes, ctx.options, ctx.group = sizes, options, group
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor):
        saved = SavedForward(*ctx.saved_tensors)
        dsinks = sink_gradient(dout, saved) if ctx.needs_input_grad[3] else None
        _record(saved.k, ctx.group, "keys")
        _record(saved.k, ctx.group, "key gradients")
        packed = _token_major(dout, saved.q, saved.k, saved.v, saved.out)
        grads = load_ring().llama3_flash_attn_varlen_backward(
            ctx.group, *packed, saved.lse[0], *ctx.sizes, **ctx.options
        )
        return *(grad.transpose(0, 1)[None] for grad in grads), dsinks, None, None, None


def _token_major(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return [tokens, heads, head_dim] of [1, heads, tokens, head_dim]."""
    return tuple(t[0].transpose(0, 1).contiguous() for t in tensors)


def _record(k: torch.Tensor, group: dist.ProcessGroup, tag: str) -> None:
    """Count what the package sends of keys and values, or of their gradients."""
    record_bytes(2 * k.nbytes * (dist.get_world_size(group) - 1), tag)
