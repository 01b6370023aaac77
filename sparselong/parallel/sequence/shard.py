"""Shard a batch over the context ranks in zigzag order, with labels shifted beforehand.

With P ranks a sequence is padded to a multiple of 2 P tokens and split into 2 P chunks; rank r
takes chunks r and 2P - 1 - r, in this order. The work of causal attention grows along the sequence;
pairing an early chunk with a late one balances the ranks.

Three things must happen before the split. Labels are shifted left by one, across chunk boundaries
too: a chunk's last token predicts the next chunk's first, which another rank holds. Both
transformers' loss and `model.chunk_loss` accept these `shift_labels`. Position ids are assigned for
the whole sequence. Packed documents are found by the same rule as on one GPU: a token starts a
document if its position is not its predecessor's plus one, or if padding begins or ends there.

Every rank of a context group must get the same full batch. This is checked, because a sampler that
gives each process its own sample would otherwise train on a mixture.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from sparselong.errors import StageError
from sparselong.kernels.attention import mark_starts, refuse_gaps
from sparselong.kernels.layer import IGNORED
from sparselong.parallel.collectives import all_gather
from sparselong.parallel.loss import shift_labels
from sparselong.parallel.mesh import Mesh

_KEYS = ("input_ids", "labels", "position_ids", "attention_mask")


def shard_batch(batch: dict[str, torch.Tensor], mesh: Mesh) -> dict[str, torch.Tensor]:
    """Return this rank's shard of a batch, and the document boundaries of the whole batch.

    Args:
        batch: the full batch, the same on every rank of the context group: input_ids [rows,
            tokens], labels [rows, tokens] (-100 is ignored) and, optionally, position_ids
            [rows or 1, tokens] and attention_mask [rows, tokens] (zero for padding).
        mesh: this process's place in the mesh.

    Returns:
        input_ids, position_ids, labels and shift_labels [rows, tokens of the shard], on the batch's
        device, and cu_seqlens int32 [n + 1] on the CPU: the document boundaries in the whole,
        padded, flattened batch (`context.take_layout` removes it). There is no attention_mask: the
        padding is a separate document.

    Raises:
        ValueError: an entry is missing, unknown or has another shape, or padding is followed by
            tokens.
        StageError: the ranks of the group hold different batches.
    """
    _check(batch)
    check_same_batch(batch, mesh)
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    rows, tokens = ids.shape
    missing = -tokens % (2 * mesh.context_size)
    positions = batch.get("position_ids")
    if mask is not None:
        refuse_gaps(mask.bool(), positions)
    if positions is None:
        positions = torch.arange(tokens, device=ids.device)[None]
    starts = torch.zeros(rows, tokens + missing, dtype=torch.bool, device=ids.device)
    mark_starts(starts[:, :tokens], mask, batch.get("position_ids"))
    if missing:
        starts[:, tokens] = True
    padding = torch.arange(missing, device=ids.device)[None].expand(rows, -1)
    whole = {
        "input_ids": functional.pad(ids, (0, missing)),
        "position_ids": torch.cat([positions.expand(rows, -1), padding], 1),
        "labels": functional.pad(batch["labels"], (0, missing), value=IGNORED),
        "shift_labels": shift_labels(batch["labels"], missing),
    }
    local = {key: cut(tensor, mesh) for key, tensor in whole.items()}
    flat = starts.flatten().nonzero().flatten().cpu()
    local["cu_seqlens"] = torch.cat([flat, flat.new_tensor([starts.numel()])]).int()
    return local


def cut(tensor: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """Return this rank's two chunks of [rows, tokens]: [rows, tokens / context_size]."""
    chunks = tensor.chunk(2 * mesh.context_size, 1)
    return torch.cat([chunks[n] for n in chunks_of(mesh.context_rank, mesh.context_size)], 1)


def place_tokens(rows: int, tokens: int, mesh: Mesh | None) -> torch.Tensor:
    """Return where each token of this rank's shard is in the flattened padded batch.

    Args:
        rows: rows of the full batch.
        tokens: its tokens per row.
        mesh: this process's place in the mesh; None if nothing is sharded.

    Returns:
        int64 [rows, tokens of the shard] on the CPU; ascending in the order of the batch's tokens.
    """
    size = 1 if mesh is None else mesh.context_size
    padded = tokens if mesh is None or size == 1 else tokens + -tokens % (2 * size)
    whole = torch.arange(rows * padded).view(rows, padded)
    return whole if mesh is None or size == 1 else cut(whole, mesh)


def chunks_of(rank: int, size: int) -> tuple[int, int]:
    """Return the indices of the two chunks, of 2 * size, that a context rank holds."""
    return rank, 2 * size - 1 - rank


def check_same_batch(batch: dict[str, torch.Tensor], mesh: Mesh) -> None:
    """Raise unless all ranks of the context group hold the same batch.

    Raises:
        StageError: on every rank of the group, if any batch differs.
    """
    if mesh.context_size == 1:
        return
    device = batch["input_ids"].device
    nothing = torch.zeros(3, dtype=torch.int64, device=device)
    mine = torch.stack([_digest(batch[key]) if key in batch else nothing for key in _KEYS])
    all_of_them = torch.stack(all_gather(mine, mesh.context_group, "batch check")).cpu()
    shapes = [list(entry[0, :2].tolist()) for entry in all_of_them]
    others = [n for n, each in enumerate(all_of_them) if not torch.equal(each, all_of_them[0])]
    if others:
        first = mesh.data_rank * mesh.context_size
        ranks = ", ".join(f"rank {first + n} ({shapes[n]} tokens)" for n in others)
        raise StageError(
            "the ranks that share one sequence got different batches",
            f"rank {first}'s batch on each of them, {shapes[0]} tokens",
            f"another batch on {ranks}",
            "give every rank of a context group the same sample: sample by data rank",
        )


def _digest(tensor: torch.Tensor) -> torch.Tensor:
    """Return int64 [3]: rows, columns, and a hash of every value and its position."""
    flat = tensor.flatten().long()
    # Multipliers modulo 2^64 that differ at every position.
    weights = torch.arange(flat.numel(), device=flat.device) * 0x5851F42D4C957F2E + 1
    shape = torch.tensor(tensor.shape, device=flat.device)
    return torch.cat([shape, ((flat + 1) * weights).sum()[None]])


def _check(batch: dict[str, torch.Tensor]) -> None:
    unknown = [key for key in batch if key not in _KEYS]
    missing = [key for key in ("input_ids", "labels") if key not in batch]
    if unknown or missing:
        raise ValueError(
            f"batch: {', '.join(sorted(batch))}; allowed: input_ids and labels, optionally "
            "position_ids and attention_mask"
        )
    rows, tokens = batch["input_ids"].shape
    for key, tensor in batch.items():
        shapes = ([rows, tokens], [1, tokens]) if key == "position_ids" else ([rows, tokens],)
        if list(tensor.shape) not in shapes:
            raise ValueError(f"{key}: shape {list(tensor.shape)}; allowed: input_ids', {shapes[0]}")
