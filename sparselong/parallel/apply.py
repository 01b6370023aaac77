"""Apply each kind of parallelism to a batch, in order.

    shard, changes = share_batch(batch, mesh, heads_k_stride)
    with using(**changes):
        model(**shard, num_items_in_batch=count).loss.backward()

Each kind selects its part of the batch and adds to the settings that the model needs for it. Data
parallelism is not applied here: every data rank loads its own batches.
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
    """Return this rank's part of a batch, and the settings for the model's pass over it.

    Args:
        batch: the data rank's batch, as for `sequence.shard_batch`.
        mesh: this process's place in the mesh; None if it trains alone.
        heads_k_stride: KV heads that a full layer gathers at a time; a divisor of their number.

    Returns:
        The model's arguments (the batch itself if nothing is sharded), and changes for
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
