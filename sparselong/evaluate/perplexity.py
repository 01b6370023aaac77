"""Perplexity on the held-out conversations, overall and by position in the context.

Perplexity is exp of the mean negative log-likelihood over *tokens*, not over batches or
conversations. Sums and counts are kept in double precision for the whole set and divided once, so
the figure does not depend on the batch size, the order or the number of GPUs. Two token sets are
reported: the supervised tokens (those fine-tuning trains on, normally the assistant turns) and all
tokens. A token's position is the number of tokens before it. Every doubling has two buckets
(…, 64-95, 96-127, …), because the value of context grows with its logarithm.

The conversations are those of stage 03's evaluations (data/encoding.py says which are left out), so
that a model has the same perplexity in both stages.

Batches hold conversations of similar length, padded on the right, where causal attention does not
look. Padding is dropped before the head, so it is neither computed there nor counted. The loss is
stage 03's (kernels/layer/cross_entropy.py): it computes logits for 512 tokens at a time, because
those of 16,384 tokens would take 13 GB.

Several processes may share the work (`spread.py`): each computes some of the batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import torch

from sparselong.data import Encoded
from sparselong.evaluate.spread import Spread, pad
from sparselong.kernels.layer import token_losses
from sparselong.model import PartialHead, score_tokens

_BATCH_TOKENS = 16384


@dataclass(frozen=True)
class Sample:
    """One tokenized conversation; `supervised[i]` says whether token i counts."""

    input_ids: list[int]
    supervised: list[bool]


def load_samples(encoded: Encoded, rows: Sequence[int]) -> list[Sample]:
    """Return rows of the validation file as samples."""
    return [Sample(*encoded[row]) for row in rows]


@torch.inference_mode()
def measure(
    model: Any, samples: list[Sample], batch_size: int, spread: Spread | None = None
) -> dict[str, Any]:
    """Return the negative log-likelihood of the samples under a causal model, as JSON-ready sums.

    Args:
        model: a GptOssForCausalLM (its `model` is called and its `lm_head` weight is read).
        samples: the tokenized conversations.
        batch_size: maximum number of conversations per forward pass; fewer if they are long.
        spread: the processes among which conversations are spread; all get the whole result.

    Returns:
        `supervised` and `all`: {nll (summed, in nats), tokens, perplexity}; `by_position`: the same
        for supervised tokens by bucket, with `first` and `last` position; `conversations`: [nll,
        tokens] of the supervised tokens of each sample, in order.
    """
    bounds = bucket_bounds(max(len(sample.input_ids) for sample in samples))
    by_position = torch.zeros(len(bounds) - 1, 2, dtype=torch.float64)
    by_sample = torch.zeros(len(samples), 2, dtype=torch.float64)
    everything = torch.zeros(2, dtype=torch.float64)
    spread = spread or Spread()
    measured = []
    for together in spread.rounds(list(split_batches(samples, batch_size))):
        texts = [[samples[i].input_ids for i in batch] for batch in together]
        measured.append((together[spread.rank], *_losses(model, texts, spread)))
    for batch, owner, position, losses in chain(*spread.collect(measured)):
        pairs = torch.stack([losses, torch.ones_like(losses)], dim=1)
        everything += pairs.sum(dim=0)
        counted = torch.tensor(
            [
                samples[batch[row]].supervised[column]
                for row, column in zip(owner.tolist(), position.tolist(), strict=True)
            ],
            dtype=torch.bool,
        )
        rows = torch.tensor(batch, dtype=torch.long)[owner[counted]]
        by_sample.index_add_(0, rows, pairs[counted])
        bucket = torch.bucketize(position[counted], torch.tensor(bounds), right=True) - 1
        by_position.index_add_(0, bucket, pairs[counted])
    return {
        "supervised": _summary(by_sample.sum(dim=0)),
        "all": _summary(everything),
        "by_position": [
            {"first": first, "last": last - 1, **_summary(sums)}
            for (first, last), sums in zip(pairwise(bounds), by_position, strict=True)
            if sums[1] > 0
        ],
        "conversations": [[nll, int(tokens)] for nll, tokens in by_sample.tolist()],
    }


def bucket_bounds(most_tokens: int) -> list[int]:
    """Return 1, 2, 3, 4, 6, 8, 12, … up to the first bound that no position reaches."""
    bounds = [1]
    while bounds[-1] < most_tokens:
        bounds.append(bounds[-1] + (1 << max(0, bounds[-1].bit_length() - 2)))
    return bounds


def split_batches(samples: Sequence[Sample], batch_size: int) -> Iterator[list[int]]:
    """Yield indices of samples, longest first, in groups that fit one pass."""
    order = sorted(range(len(samples)), key=lambda i: -len(samples[i].input_ids))
    while order:
        longest_tokens = len(samples[order[0]].input_ids)
        count = max(1, min(batch_size, _BATCH_TOKENS // longest_tokens))
        yield order[:count]
        order = order[count:]


def _losses(
    model: Any, texts: list[list[list[int]]], spread: Spread
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return row in the batch, position and float64 loss (nats) of each predicted token, on CPU.

    They are those of this process's texts; `texts` are those of each process.
    """
    head = model.lm_head
    with spread.settings(texts):
        owner, position, states, targets = predicted_states(model, texts[spread.rank])
        if isinstance(head, PartialHead):
            losses = -score_tokens(head, states, targets)[0]
        else:
            losses = token_losses(states, head.weight, targets)
    return owner, position, losses.double().cpu()


def predicted_states(
    model: Any, texts: list[list[int]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return row, position, final hidden state before it, and id of each predicted token.

    The first two are on the CPU, the others on the model's device. It is a pass of the model, also
    without a text.
    """
    device = model.lm_head.weight.device
    ids, present = pad(texts)
    hidden = model.model(ids.to(device), use_cache=False).last_hidden_state
    owner, before = present[:, 1:].nonzero(as_tuple=True)
    position = before + 1
    states, targets = hidden[owner.to(device), before.to(device)], ids[owner, position]
    return owner, position, states, targets.to(device)


def _summary(pair: torch.Tensor) -> dict[str, float]:
    nll, tokens = pair.tolist()
    return {"nll": nll, "tokens": int(tokens), "perplexity": _exp(nll / tokens)}


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
