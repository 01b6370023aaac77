"""Attention's forward and backward pass as two functions, for the compiler's operators.

They compute what `op.attention` does. What the forward pass decided, its backend and determinism,
travels to the backward pass as an int64 tensor on the host: settings may have changed by then.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from sparselong.kernels.attention.choice import BACKENDS
from sparselong.kernels.attention.mask import AttentionCall, Gradients, SavedForward
from sparselong.kernels.attention.op import (
    check_arguments,
    load_backend,
    make_mask,
    pick_backend,
)


class Choice(NamedTuple):
    """What the choice of a backend depends on, beside the tensors.

    Attributes:
        backend: as in `op.attention`.
        deterministic: whether the backward pass must be.
        trains: whether there is one.
    """

    backend: str | None
    deterministic: bool
    trains: bool


def run_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor | None,
    window: int | None,
    scale: float | None,
    choice: Choice,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return out and lse, without gradients, and what was decided, int64 [2] on the host.

    The last query has the last key's position. Arguments, results and errors are otherwise those of
    `op.attention`; out is laid out as [batch, queries, heads, head_dim].

    Args:
        q: as in `op.attention`.
        k: as in `op.attention`.
        v: as in `op.attention`.
        sinks: as in `op.attention`.
        cu_seqlens: as in `op.attention`.
        window: as in `op.attention`.
        scale: as in `op.attention`.
        choice: what the choice of a backend depends on.
    """
    call = _describe(q, k, v, sinks, cu_seqlens, window, scale, choice.deterministic)
    with torch.enable_grad() if choice.trains else torch.no_grad():
        name = pick_backend(choice.backend, q, call)
    with torch.no_grad(), torch.cuda.device_of(q):
        out, lse, _ = load_backend(name).attend(q, k, v, sinks, call)
    decided = torch.tensor([BACKENDS.index(name), int(choice.deterministic)], device="cpu")
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse.contiguous(), decided


def run_backward(
    dout: torch.Tensor,
    saved: SavedForward,
    decided: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor | None,
    window: int | None,
    scale: float | None,
    needs_dsinks: bool,
) -> Gradients:
    """Return the gradients of q, k, v and sinks.

    Args:
        dout: out's gradient.
        saved: arguments and results of `run_forward`.
        decided: its third result.
        cu_seqlens: as there.
        window: as there.
        scale: as there.
        needs_dsinks: whether the sinks' gradient is needed; if not, it is None.
    """
    number, deterministic = decided.tolist()
    call = _describe(*saved[:4], cu_seqlens, window, scale, bool(deterministic), needs_dsinks)
    with torch.cuda.device_of(dout):
        return load_backend(BACKENDS[number]).attend_backward(dout, saved, call)


def _describe(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    window: int | None,
    scale: float | None,
    deterministic: bool,
    needs_dsinks: bool = True,
) -> AttentionCall:
    offset = k.shape[2] - q.shape[2]
    check_arguments(q, k, v, sinks, window, scale, offset)
    mask = make_mask(q, k, cu_seqlens, window, offset)
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    return AttentionCall(mask, scale, deterministic, needs_dsinks)
