"""How far a model's next tokens are from the base's, by position in the context.

Both models read the same conversations (teacher forcing). For every token but the first one:
the Kullback-Leibler divergence of the model's distribution from the base's, in nats, over the whole
vocabulary and not over a few likely tokens; and whether both models' most likely tokens agree.

Only one model is open at a time. The base leaves its final hidden states on disk, which are a
seventieth of its logits (20b: 5.6 KiB per token), and the other models compute its logits from
them: neither compression nor fine-tuning changes lm_head, which is checked. Logits exist for a few
rows at a time. Files are removed when the stage is done.

Passes are those of `perplexity`: if several processes share the work, each writes and reads the
states of its batches, in the same passes, so that equal models differ by exactly 0.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.nn import functional

from sparselong.checkpoint import Checkpoint, same_bytes, write_tensors
from sparselong.evaluate.perplexity import Sample, bucket_bounds, predicted_states, split_batches
from sparselong.evaluate.spread import Spread
from sparselong.files import write_atomically
from sparselong.model import PartialHead
from sparselong.parallel.vocabulary import (
    COMPARED_ROWS,
    Divergence,
    combine_divergence,
    shard_divergence,
)
from sparselong.runtime import current

STATES = "states"
"""Folder of the base's hidden states in the stage's directory."""
_WHOLE = "whole.json"
_HEAD = "lm_head.weight"


def is_saved(folder: Path) -> bool:
    """Return whether all of the base's hidden states are in a folder."""
    return (folder / _WHOLE).exists()


def has_same_head(base: Path, directory: Path) -> bool:
    """Return whether a checkpoint's lm_head is the base's, bit for bit."""
    left, right = Checkpoint(base), Checkpoint(directory)
    return all(_HEAD in each.tensors for each in (left, right)) and same_bytes(left, right, _HEAD)


@torch.inference_mode()
def save_states(
    model: Any, samples: Sequence[Sample], batch_size: int, spread: Spread, folder: Path
) -> None:
    """Write the base's final hidden states of every predicted token.

    Args:
        model: the base.
        samples: the tokenized conversations.
        batch_size: maximum number of conversations per pass.
        spread: the processes among which they are spread; each writes those of its batches.
        folder: for the files, one for each batch.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _WHOLE).unlink(missing_ok=True)
    written = 0

    def save(number: int, states: torch.Tensor) -> None:
        nonlocal written
        written += states.nbytes
        if len(states):
            write_tensors(folder / f"{number}.safetensors", {"states": states})

    for _ in _passes(model, samples, batch_size, spread, save):
        pass
    total = sum(spread.collect(written))
    if spread.rank == 0:
        write_atomically(folder / _WHOLE, json.dumps({"bytes": total}) + "\n")


@torch.inference_mode()
def measure(
    model: Any, samples: Sequence[Sample], batch_size: int, spread: Spread, folder: Path
) -> dict[str, Any]:
    """Return how far a model is from the base; arguments as for `save_states`.

    Returns:
        `supervised` and `all`: {kl (mean, in nats), agreement (share of equal most likely tokens),
        tokens}; `by_position`: the same for all tokens by bucket, with `first` and `last` position;
        `conversations`: their number.
    """
    found: list[tuple[list[int], torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def compare(number: int, states: torch.Tensor) -> Divergence:
        path = folder / f"{number}.safetensors"
        reference = load_file(path)["states"] if len(states) else states
        return compare_states(model.lm_head, reference.to(states), states)

    for batch, owner, position, compared in _passes(model, samples, batch_size, spread, compare):
        kept = torch.stack([compared.nats.double(), compared.agrees.double()], 1).cpu()
        found.append((batch, owner, position, kept))
    bounds = bucket_bounds(max(len(sample.input_ids) for sample in samples))
    by_position = torch.zeros(len(bounds) - 1, 3, dtype=torch.float64)
    supervised = torch.zeros(3, dtype=torch.float64)
    for batch, owner, position, kept in chain(*spread.collect(found)):
        rows = torch.cat([kept, torch.ones(len(kept), 1, dtype=torch.float64)], 1)
        bucket = torch.bucketize(position, torch.tensor(bounds), right=True) - 1
        by_position.index_add_(0, bucket, rows)
        places = zip(owner.tolist(), position.tolist(), strict=True)
        counted = [samples[batch[row]].supervised[column] for row, column in places]
        supervised += rows[torch.tensor(counted, dtype=torch.bool)].sum(0)
    return {
        "supervised": _summary(supervised),
        "all": _summary(by_position.sum(0)),
        "by_position": [
            {"first": first, "last": last - 1, **_summary(sums)}
            for (first, last), sums in zip(pairwise(bounds), by_position, strict=True)
            if sums[2] > 0
        ],
        "conversations": len(samples),
    }


def compare_states(head: Any, reference: torch.Tensor, states: torch.Tensor) -> Divergence:
    """Return each row's divergence from a reference.

    Args:
        head: lm_head of both, or the part of it that this process holds; then the call is
            collective.
        reference: [rows, width], the reference's final hidden states.
        states: [rows, width], those of the model.
    """
    if isinstance(head, PartialHead):
        exchange: Any = current().vocabulary
        return exchange.compare(reference, states, head.weight, head.total)
    parts = []
    chunks = zip(reference.split(COMPARED_ROWS), states.split(COMPARED_ROWS), strict=True)
    for theirs, ours in chunks:
        both = functional.linear(torch.cat([theirs, ours]), head.weight)
        statistics, best = shard_divergence(both[: len(theirs)], both[len(theirs) :], 0)
        parts.append(combine_divergence(statistics[None], best[None]))
    nats, agrees = zip(*parts, strict=True)
    return Divergence(torch.cat(nats), torch.cat(agrees))


def _passes(
    model: Any,
    samples: Sequence[Sample],
    batch_size: int,
    spread: Spread,
    use: Callable[[int, torch.Tensor], Any],
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor, Any]]:
    """Yield batch, row in the batch, position and what `use` returns of each of its passes.

    `use` gets the batch's number and the states of its predicted tokens. In a process without a
    batch it gets none of them, and what it returns is not yielded.
    """
    for turn, together in enumerate(spread.rounds(list(split_batches(samples, batch_size)))):
        texts = [[samples[i].input_ids for i in batch] for batch in together]
        with spread.settings(texts):
            owner, position, states, _ = predicted_states(model, texts[spread.rank])
            used = use(turn * spread.size + spread.rank, states)
        if together[spread.rank]:
            yield together[spread.rank], owner, position, used


def _summary(sums: torch.Tensor) -> dict[str, Any]:
    nats, agreed, tokens = sums.tolist()
    known = tokens > 0
    return {
        "kl": nats / tokens if known else None,
        "agreement": agreed / tokens if known else None,
        "tokens": int(tokens),
    }
