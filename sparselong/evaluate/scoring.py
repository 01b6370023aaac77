"""Likelihoods of texts' last tokens under a model, for processes that answer lm-eval together.

They are what lm-eval computes in one process: log-softmax in float32 of logits in the model's
dtype, and whether every scored token is the most likely one. No process ever holds a batch's
logits: they exist for a chunk of the scored tokens at a time, or are sharded.

Texts of similar length share a batch, padded on the right, where causal attention does not look.
Texts that differ in their last token alone, such as questions with the choices A to D, are one row.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch

from sparselong.evaluate.spread import Spread, pad
from sparselong.evaluate.work import Request
from sparselong.model import score_tokens


@torch.inference_mode()
def score(
    model: Any, requests: list[Request], batch_size: int, spread: Spread
) -> list[tuple[float, bool]]:
    """Return each request's log-likelihood in nats, and whether its tokens are the most likely.

    Args:
        model: a GptOssForCausalLM (its `model` is called and its `lm_head` weight is read).
        requests: the texts; each has at least one token before the scored ones.
        batch_size: maximum number of texts per pass.
        spread: the processes among which batches are spread; all get all results.
    """
    same: dict[tuple[int, ...], list[int]] = {}
    for i, request in enumerate(requests):
        same.setdefault(tuple(request.tokens[:-1]), []).append(i)
    # In lm-eval's order, so that its passes in one process hold the same texts.
    order = sorted(
        same.values(), key=lambda row: (-len(requests[row[0]].tokens), requests[row[0]].tokens)
    )
    batches = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
    found: dict[int, tuple[float, bool]] = {}
    for together in spread.rounds(batches):
        texts = [[[requests[i] for i in row] for row in batch] for batch in together]
        answers = _score_batch(model, texts, spread)
        found |= dict(zip(chain(*together[spread.rank]), answers, strict=True))
    everything = {i: answer for part in spread.collect(found) for i, answer in part.items()}
    return [everything[i] for i in range(len(requests))]


def _score_batch(
    model: Any, texts: list[list[list[Request]]], spread: Spread
) -> list[tuple[float, bool]]:
    """Return the results of this process's texts, row by row; `texts` are those of each process."""
    device = model.lm_head.weight.device
    inputs = [[row[0].tokens[:-1] for row in batch] for batch in texts]
    own = [request for row in texts[spread.rank] for request in row]
    with spread.settings(inputs):
        ids, _ = pad(inputs[spread.rank])
        hidden = model.model(ids.to(device), use_cache=False).last_hidden_state
        states = hidden[:0].flatten(0, 1)
        if own:
            states = torch.cat(
                [
                    row[len(request.tokens) - 1 - request.scored : len(request.tokens) - 1]
                    for row, requests in zip(hidden, texts[spread.rank], strict=True)
                    for request in requests
                ]
            )
        del hidden
        labels = [token for request in own for token in request.tokens[-request.scored :]]
        targets = torch.tensor(labels, dtype=torch.long, device=device)
        scores, best = score_tokens(model.lm_head, states, targets)
    lengths = [request.scored for request in own]
    sums = [part.double().sum().item() for part in scores.cpu().split(lengths)]
    greedy = [bool(part.all()) for part in (best == targets).cpu().split(lengths)]
    return list(zip(sums, greedy, strict=True))
