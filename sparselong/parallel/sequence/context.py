"""A shard of a sequence: its place in the mesh, and attention to the other shards' keys.

`runtime.Settings.sequence` is a `Context` if a pass's tokens are a shard (`parallel/apply.py` sets
it). `model.attention.attention_forward`, the attention function of every model here, then attends
to the whole sequence; the model itself does not change. The backward pass, which also exchanges
keys and their gradients, may run after the settings' block has ended: it uses only saved values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparselong.kernels.attention import load_backend, pick_backend, plan_pays
from sparselong.parallel.mesh import Mesh
from sparselong.parallel.sequence.attention import ShardedCall, attend_to_all
from sparselong.parallel.sequence.exchange import ExchangePlan, plan_exchange


@dataclass(frozen=True)
class Layout:
    """A batch's documents, and how its keys are exchanged.

    Attributes:
        boundaries: document boundaries in the whole, padded, flattened batch, including every row's
            start.
        rows: number of sequences in the batch.
        heads_k_stride: KV heads that a full layer gathers at a time; a divisor of their number.
    """

    boundaries: tuple[int, ...]
    rows: int
    heads_k_stride: int = 1


def take_layout(local: dict[str, torch.Tensor], heads_k_stride: int = 1) -> Layout:
    """Remove `cu_seqlens` from a shard of `shard_batch`, leaving only the model's arguments.

    Args:
        local: the shard; modified in place.
        heads_k_stride: KV heads that a full layer gathers at a time.

    Returns:
        The layout that `cu_seqlens` describes.
    """
    boundaries = tuple(local.pop("cu_seqlens").tolist())
    return Layout(boundaries, len(local["input_ids"]), heads_k_stride)


@dataclass(frozen=True)
class Context:
    """A shard's place in the mesh and the batch's layout."""

    mesh: Mesh
    layout: Layout

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor,
        *,
        window: int | None,
        scale: float | None,
        backend: str | None,
        deterministic: bool,
    ) -> torch.Tensor:
        """Return the attention output of the shard's queries, [rows, heads, tokens, head_dim].

        The arguments are those of `kernels.attention.attention`, with the shard's tokens in q, k
        and v.

        Raises:
            ValueError: shapes do not match the layout, the stride does not divide the number of KV
                heads, or the backend does not support the call.
            StageError: another rank is gone, or did not take part in time.
        """
        self._check(q, k)
        scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
        plan = plan_exchange(
            self.layout.boundaries,
            self.layout.rows,
            self.mesh.context_rank,
            self.mesh.context_size,
            window,
            scale,
            deterministic,
            sinks.requires_grad,
            q.device,
        )
        stride = self.layout.heads_k_stride if window is None else k.shape[1]
        backends = _pick_backends(backend, q, plan)
        job = ShardedCall(plan, self.mesh.context_group, stride, backends, is_full=window is None)
        return attend_to_all(q, k, v, sinks, job)

    def _check(self, q: torch.Tensor, k: torch.Tensor) -> None:
        rows, tokens = self.layout.rows, self.layout.boundaries[-1]
        shard = tokens // (rows * self.mesh.context_size)
        if (q.shape[0], q.shape[2], k.shape[2]) != (rows, shard, shard):
            raise ValueError(
                f"q: {q.shape[0]} rows of {q.shape[2]} queries and {k.shape[2]} keys; allowed in "
                f"this shard: {rows} rows of {shard}, and no cache"
            )
        if k.shape[1] % self.layout.heads_k_stride:
            raise ValueError(
                f"heads_k_stride: {self.layout.heads_k_stride} with {k.shape[1]} KV heads; "
                "allowed: a divisor of their number"
            )


def _pick_backends(backend: str | None, q: torch.Tensor, plan: ExchangePlan) -> tuple[str, str]:
    """Return the backends of both query chunks: the later chunk's for both, if it supports both.

    This keeps the ranks' backends as equal as possible: rank 0's early chunk has no keys before it,
    so that another backend might be picked for it alone.
    """
    early, late = (pick_backend(backend, q, run.call) for run in plan.runs)
    call = plan.runs[0].call
    pays = late != "torch_cudnn" or backend is not None or plan_pays(call.mask)
    return (late if pays and load_backend(late).refuse(q, call) is None else early), late
