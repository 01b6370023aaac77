"""A shard of a sequence: its place in the mesh, and attention to the other shards' keys.

`runtime.Settings.sequence` is a `Context` where a pass's tokens are a shard (`parallel/apply.py`
puts it there). Then `model.attention.attention_forward`, the one attention function of all models
here, attends to the whole sequence; the model itself does not change. The backward pass, which
exchanges keys and their gradients too, may come after the settings' block: what it needs is saved.
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
        boundaries: of documents on the whole, padded, flattened batch, every row's start included.
        rows: sequences of the batch.
        heads_k_stride: KV heads that a full layer gathers at a time; a divisor of their number.
    """

    boundaries: tuple[int, ...]
    rows: int
    heads_k_stride: int = 1


def take_layout(local: dict[str, torch.Tensor], heads_k_stride: int = 1) -> Layout:
    """The layout of a shard that `shard_batch` made; its `cu_seqlens` is taken out, so that what
    is left are the model's arguments."""
    boundaries = tuple(local.pop("cu_seqlens").tolist())
    return Layout(boundaries, len(local["input_ids"]), heads_k_stride)


@dataclass(frozen=True)
class Context:
    """A place in a mesh and a layout, in which to attend."""

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
        """Attention of the shard's queries, [rows, heads, tokens, head_dim], out alike.

        Args as for `kernels.attention.attention`; q, k and v hold the shard's tokens.

        Raises:
            ValueError: shapes that do not fit the layout, a stride that does not divide the KV
                heads, a backend that cannot take the call; names it, found and allowed.
            StageError: another rank has gone, or did not take part in time.
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
    """For both runs the later one's where it can take both, so that ranks differ as little as they
    can: the early run of rank 0 has no keys before it."""
    early, late = (pick_backend(backend, q, run.call) for run in plan.runs)
    call = plan.runs[0].call
    pays = late != "torch_cudnn" or backend is not None or plan_pays(call.mask)
    return (late if pays and load_backend(late).refuse(q, call) is None else early), late
