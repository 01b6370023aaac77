"""Every kind of parallelism, applied to a batch in order: the one place where they meet.

    shard, changes = share_batch(batch, mesh, heads_k_stride)
    with using(**changes):
        model(**shard, num_items_in_batch=count).loss.backward()

Each takes its part of the batch, and says in the pass's settings what the model must know of it.
Data parallelism is not here: every data rank is given a batch of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sparselong.parallel.mesh import Mesh
from sparselong.parallel.sequence import Context, shard_batch, take_layout


def share_batch(
    batch: Mapping[str, torch.Tensor], mesh: Mesh | None, heads_k_stride: int = 1
) -> tuple[Mapping[str, torch.Tensor], dict[str, Any]]:
    """Return this rank's part of a batch, and the settings under which the model runs on it.

    Args:
        batch: what the data rank trains on, as for `sequence.shard_batch`.
        mesh: this process's place; None where it trains alone.
        heads_k_stride: KV heads that a full layer gathers at a time; a divisor of their number.

    Returns:
        The model's arguments, the batch itself where nothing is shared, and changes for
        `runtime.using`.

    Raises:
        ValueError, StageError: as from `sequence.shard_batch`.
    """
    changes: dict[str, Any] = {}
    if mesh is not None and mesh.context_size > 1:
        shard = shard_batch(dict(batch), mesh)
        changes["sequence"] = Context(mesh, take_layout(shard, heads_k_stride))
        batch = shard
    return batch, changes
