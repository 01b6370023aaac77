"""Apply each kind of parallelism to a model and to a batch, in order.

    with using(**shard_model(mesh)):
        model = from_pretrained(...)
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

from sparselong.parallel.collectives import all_gather
from sparselong.parallel.experts import FAR_ROWS, NEAR_ROWS, ShardedExperts
from sparselong.parallel.mesh import Mesh
from sparselong.parallel.placement import Placement
from sparselong.parallel.sequence import Context, shard_batch, take_layout
from sparselong.parallel.vocabulary import ReplicatedVocabulary, ShardedVocabulary


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
    if mesh is not None and mesh.expert_size > 1:
        changes |= shard_model(mesh, *_find_rows(batch["input_ids"], mesh))
    return batch, changes


def shard_model(
    mesh: Mesh | None,
    rows: tuple[int, ...] | None = None,
    sequences: tuple[int, ...] | None = None,
) -> dict[str, Any]:
    """Return changes for `runtime.using` that share experts and vocabulary over an expert group.

    Args:
        mesh: this process's place in the mesh; None or an expert size of 1: nothing is shared.
        rows: number of tokens of each rank of the group in a pass; None: all have the same.
        sequences: number of sequences to which they belong; None: one each.
    """
    if mesh is None or mesh.expert_size == 1:
        return {}
    placement = Placement(mesh.expert_rank, mesh.expert_size)
    chunk_rows = NEAR_ROWS if mesh.expert_near else FAR_ROWS
    return {
        "experts": ShardedExperts(
            placement, mesh.expert_group, rows, chunk_rows=chunk_rows, sequences=sequences
        ),
        "vocabulary": ShardedVocabulary(placement, mesh.expert_group, rows),
    }


def replicate_rows(mesh: Mesh) -> dict[str, Any]:
    """Return the same changes for passes without gradients in which all ranks have the same rows.

    A model is opened with them too.
    """
    placement = Placement(mesh.expert_rank, mesh.expert_size)
    return {
        "experts": ShardedExperts(placement, mesh.expert_group, replicated=True),
        "vocabulary": ReplicatedVocabulary(placement, mesh.expert_group),
    }


def _find_rows(ids: torch.Tensor, mesh: Mesh) -> tuple[tuple[int, ...], ...]:
    """Return the number of tokens, and of sequences, on each rank of the expert group.

    Nothing if all have the same. Ranks that share sequences do, so that nothing is exchanged.
    """
    if mesh.context_size % mesh.expert_size == 0:
        return ()
    shapes = all_gather(torch.tensor(ids.shape), mesh.expert_group, "row counts")
    if all(torch.equal(shape, shapes[0]) for shape in shapes):
        return ()
    return tuple(int(shape.prod()) for shape in shapes), tuple(int(shape[0]) for shape in shapes)
