"""Which sequence the attention of this process belongs to: the shard's place in it.

    local = shard_batch(batch, mesh)
    layout = take_layout(local, heads_k_stride=1)
    with context_parallel(mesh, layout):
        model(**local, num_items_in_batch=count).loss.backward()

Inside the block `model.attention.attention_forward`, the one attention function of all models here,
attends to the whole sequence; the model itself does not change. The backward pass belongs inside
the block too: a checkpointed layer attends again there, in a thread of autograd's own, which is why
the context is the process's and not the thread's.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from sparselong.kernels.attention import attention, load_backend, pick_backend, plan_pays
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
        if self.mesh.context_size == 1:
            out, _ = attention(
                *(q, k, v, sinks),
                cu_seqlens=_boundaries_on(q.device, self.layout),
                window=window, scale=scale, backend=backend, deterministic=deterministic,
            )  # fmt: skip
            return out
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


@functools.lru_cache(maxsize=16)
def _boundaries_on(device: torch.device, layout: Layout) -> torch.Tensor | None:
    """One tensor for all layers, as `find_documents` wants it; None where rows are documents."""
    if len(layout.boundaries) == layout.rows + 1:
        return None
    return torch.tensor(layout.boundaries, dtype=torch.int32, device=device)


_active: Context | None = None


def active_context() -> Context | None:
    """The context in which this process attends, or None: each sequence is all here."""
    return _active


@contextmanager
def context_parallel(mesh: Mesh, layout: Layout) -> Iterator[Context]:
    """Attention inside the block, forward and backward, is that of shards of one sequence."""
    global _active
    outer, _active = _active, Context(mesh, layout)
    try:
        yield _active
    finally:
        _active = outer
