"""A batch cut into one shard for each context rank, zigzag; labels shifted before it is cut.

With P ranks a sequence is padded to a multiple of 2 P tokens and cut into 2 P chunks; rank r takes
chunks r and 2P - 1 - r, in this order. Causal attention's work grows along the sequence, and a late
chunk beside an early one gives every rank the same.

Three things must happen to the whole sequence, before it is cut. Labels move one place to the left,
over chunk borders too: the last token of a chunk learns the first of the next, which another rank
holds (`shift_labels`, which transformers' loss and `model.fused.chunk_loss` take as they are).
Position ids stay those of the whole sequence. And packed documents are found, by the same rule as
on one GPU: a token starts one where its position is not its predecessor's plus one, or where
padding begins or ends.

Every rank of a context group is given the same full batch, and that they do have the same is
checked: a sampler that hands each process its own sample would otherwise train on a mixture.
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
    """This rank's shard of a batch, and where the whole batch's documents are.

    Args:
        batch: the full batch, the same on every rank of the context group: input_ids [rows,
            tokens], labels alike (-100 does not count), position_ids [rows or 1, tokens] and
            attention_mask [rows, tokens] (non-zero where a token is), the last two if there are.

    Returns:
        input_ids, position_ids, labels and shift_labels [rows, tokens of the shard], on the batch's
        device, and cu_seqlens int32 [n + 1] on the CPU: the documents' boundaries on the whole,
        padded, flattened batch (`context.take_layout` takes it out). There is no attention_mask:
        the padding is a document of its own.

    Raises:
        ValueError: an entry is missing, unknown or of another shape, or tokens go on behind
            padding.
        StageError: the ranks of the group do not hold the same batch.
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
    """[rows, tokens] to this rank's two chunks of it, [rows, tokens / context_size]."""
    chunks = tensor.chunk(2 * mesh.context_size, 1)
    return torch.cat([chunks[n] for n in chunks_of(mesh.context_rank, mesh.context_size)], 1)


def chunks_of(rank: int, size: int) -> tuple[int, int]:
    """The two chunks of 2 * size that a context rank holds."""
    return rank, 2 * size - 1 - rank


def check_same_batch(batch: dict[str, torch.Tensor], mesh: Mesh) -> None:
    """That all ranks of the context group hold the same batch.

    Raises:
        StageError: on every one of them, if they do not.
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
            "the ranks that share one sequence were given different batches",
            f"on all of them rank {first}'s, {shapes[0]} tokens",
            f"another on {ranks}",
            "give every rank of a context group the same sample: sample by data rank",
        )


def _digest(tensor: torch.Tensor) -> torch.Tensor:
    """int64 [3]: rows, columns, and a number that depends on every value and its place."""
    flat = tensor.flatten().long()
    # Odd multipliers modulo 2^64, different from place to place.
    weights = torch.arange(flat.numel(), device=flat.device) * 0x5851F42D4C957F2E + 1
    shape = torch.tensor(tensor.shape, device=flat.device)
    return torch.cat([shape, ((flat + 1) * weights).sum()[None]])


def _check(batch: dict[str, torch.Tensor]) -> None:
    unknown = [key for key in batch if key not in _KEYS]
    missing = [key for key in ("input_ids", "labels") if key not in batch]
    if unknown or missing:
        raise ValueError(
            f"batch: {', '.join(sorted(batch))}; allowed: input_ids and labels, and, if there are, "
            "position_ids and attention_mask"
        )
    rows, tokens = batch["input_ids"].shape
    for key, tensor in batch.items():
        shapes = ([rows, tokens], [1, tokens]) if key == "position_ids" else ([rows, tokens],)
        if list(tensor.shape) not in shapes:
            raise ValueError(f"{key}: shape {list(tensor.shape)}; allowed: input_ids', {shapes[0]}")
