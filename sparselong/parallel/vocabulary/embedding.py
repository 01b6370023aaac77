"""Embeddings of tokens from tables that are sharded over ranks, bit for bit those of one table.

Every rank looks up the tokens of all ranks that its rows cover. A token is in exactly one share, so
its owner's part is taken, and the other parts are never read. Sending only the owners' parts would
save bytes on average, but needs a host synchronization for their numbers, and gains little at the
busiest rank: a tokenizer's frequent tokens have low ids, which are all in the first share.
"""

from __future__ import annotations

import torch

from sparselong.parallel.collectives import start_all_gather
from sparselong.parallel.vocabulary.rows import join_rows, pad_rows, start_return
from sparselong.parallel.vocabulary.shares import Share

IDS, EMBEDDINGS = "token ids", "embeddings"


@torch.no_grad()
def embed_rows(
    ids: torch.Tensor, table: torch.Tensor, vocab: int, share: Share, rows: tuple[int, ...]
) -> torch.Tensor:
    """Return the embeddings of this rank's tokens, where each rank has tokens of its own.

    Args:
        ids: int64 [...].
        table: [held, width].
        vocab: number of tokens in the vocabulary.
        share: this rank's share.
        rows: number of every rank's tokens.
    """
    most = max(rows)
    if not most:
        return table.new_empty(*ids.shape, table.shape[1])
    rank, group = share.placement.rank, share.group
    gathered = start_all_gather(pad_rows(ids.flatten(), most), group, IDS).wait()
    everyones = join_rows(gathered, rows)
    check_ids(everyones, vocab)
    partial = look_up(everyones, table, share.held(vocab))
    parts = start_return(partial, rows, rank, group, EMBEDDINGS).wait()
    own = take_owners(
        parts.view(len(rows), rows[rank], table.shape[1]), ids, share.most_held(vocab)
    )
    return own.view(*ids.shape, table.shape[1])


@torch.no_grad()
def embed_replicated(
    ids: torch.Tensor, table: torch.Tensor, vocab: int, share: Share
) -> torch.Tensor:
    """Return the same, where all ranks have the same tokens."""
    check_ids(ids, vocab)
    partial = look_up(ids.flatten(), table, share.held(vocab))
    parts = start_all_gather(partial, share.group, EMBEDDINGS).wait()
    return take_owners(parts, ids, share.most_held(vocab)).view(*ids.shape, table.shape[1])


def check_ids(ids: torch.Tensor, vocab: int) -> None:
    """Raise if an id is outside the vocabulary; on a GPU by a device-side assertion."""
    are_inside = ((ids >= 0) & (ids < vocab)).all()
    if ids.is_cuda:
        message = f"a token id is not between 0 and {vocab - 1}"
        torch._assert_async(are_inside, message)  # pyright: ignore[reportPrivateImportUsage]
    elif not are_inside:
        raise IndexError(
            f"token ids: between {int(ids.min())} and {int(ids.max())}; allowed: 0 to {vocab - 1}"
        )


def look_up(ids: torch.Tensor, table: torch.Tensor, held: range) -> torch.Tensor:
    """Return [tokens, width]: the held rows of these tokens, any values for other tokens."""
    if not held:
        return table.new_zeros(len(ids), table.shape[1])
    return table.index_select(0, (ids - held.start).clamp(0, len(held) - 1))


def take_owners(parts: torch.Tensor, ids: torch.Tensor, most_held: int) -> torch.Tensor:
    """Return [tokens, width]: of every rank's part, [P, tokens, width], that of a token's owner."""
    tokens = torch.arange(ids.numel(), device=ids.device)
    return parts[ids.flatten() // most_held, tokens]
