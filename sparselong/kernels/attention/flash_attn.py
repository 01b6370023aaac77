"""The flash-attn package, where it is installed, made exact for sinks as in `torch_operators.py`.

Only its variable-length functions are used: without documents, every batch row is one document.
Written for flash-attn 2.7 and 2.8, an optional package that needs a compiler to install.
"""

from __future__ import annotations

import dataclasses

import torch

from sparselong.kernels.attention import torch_operators as shared
from sparselong.kernels.attention.installed import refuse_flash_attn
from sparselong.kernels.attention.join import join
from sparselong.kernels.attention.mask import (
    Attended,
    AttentionCall,
    Documents,
    Gradients,
    Mask,
    SavedForward,
)


def refuse(q: torch.Tensor, call: AttentionCall) -> str | None:
    """Return why flash-attn cannot take the call, or None if it can."""
    return refuse_flash_attn() or shared.refuse_flash(q, call)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor, call: AttentionCall
) -> Attended:
    """Return (out, lse, tensors for the backward pass); shapes as in `op.attention`."""
    from flash_attn.flash_attn_interface import (  # pyright: ignore[reportMissingImports]
        _flash_attn_varlen_forward,
    )

    mask = _as_packed(call.mask, q.device)
    end = mask.offset + mask.queries
    q, k, v = shared.token_major(mask, q, k[:, :, :end], v[:, :, :end])
    sizes, window = shared.flash_sizes(mask)
    out, lse, _, rng_state = _flash_attn_varlen_forward(
        q, k, v, *sizes, 0.0, call.scale, True, **(window or _NO_WINDOW)
    )
    lse = lse.view(lse.shape[0], mask.batch, mask.queries).transpose(0, 1)
    out = out.view(mask.batch, mask.queries, *out.shape[-2:]).transpose(1, 2)
    return *join([(out, lse)], sinks), (rng_state,)


_NO_WINDOW = {"window_size_left": -1, "window_size_right": -1}


def attend_backward(dout: torch.Tensor, saved: SavedForward, call: AttentionCall) -> Gradients:
    """Return the gradients, computed by the package's own backward."""
    from flash_attn.flash_attn_interface import (  # pyright: ignore[reportMissingImports]
        _flash_attn_varlen_backward,
    )

    q, k, v, _, out, lse, kept = saved
    mask = _as_packed(call.mask, q.device)
    shape = k.shape
    dsinks = shared.sink_gradient(dout, saved) if call.needs_dsinks else None
    end = mask.offset + mask.queries
    q, k, v = shared.token_major(mask, q, k[:, :, :end], v[:, :, :end])
    dout, out = shared.token_major(mask, dout, out)
    sizes, window = shared.flash_sizes(mask)
    lse = lse.transpose(0, 1).reshape(lse.shape[1], -1).contiguous()
    grads = tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    _flash_attn_varlen_backward(
        *(dout, q, k, v, out, lse, *grads, *sizes, 0.0, call.scale, True),
        **(window or _NO_WINDOW),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=call.deterministic,
        rng_state=kept[0] if kept else None,  # without dropout it is not read
    )
    dq, dk, dv = (g.view(mask.batch, -1, *g.shape[-2:]).transpose(1, 2) for g in grads)
    return dq, shared.with_unseen_keys(dk, shape), shared.with_unseen_keys(dv, shape), dsinks


def _as_packed(mask: Mask, device: torch.device) -> Mask:
    """Return the mask; without documents, every batch row becomes one."""
    if mask.documents is not None:
        return mask
    rows = torch.arange(mask.batch + 1, device=device, dtype=torch.int32) * mask.keys
    return dataclasses.replace(mask, documents=Documents(rows, rows, rows, mask.keys))
