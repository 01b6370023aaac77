"""A model's figures: perplexity, distance from the base, and accuracy on multiple-choice items.

Perplexity, divergence and likelihoods are stage 04's own functions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.compared.text import Items
from sparselong.evaluate import divergence, perplexity
from sparselong.evaluate.perplexity import Sample
from sparselong.evaluate.scoring import score
from sparselong.evaluate.spread import Spread

BOUNDS = (1, 32, 128, 512, 2048, math.inf)
"""Positions at which a new line of the table begins; all are bounds of stage 04's buckets."""
BATCH = 32
Figures = dict[str, tuple[float, str]]
"""Value and unit by metric."""


@dataclass(frozen=True)
class Measures:
    """What every model is measured on.

    Attributes:
        held_out: pieces of held-out documents.
        compared: those of them on which every next token is compared with the base's.
        items: multiple-choice items.
        tuned: held-out conversations of the fine-tuning data.
        states: folder for the base's hidden states.
    """

    held_out: list[Sample]
    compared: list[Sample]
    items: Items
    tuned: list[Sample]
    states: Path

    @property
    def _compared_texts(self) -> dict[Path, list[Sample]]:
        """Texts that are compared with the base, by the folder of its states."""
        return {self.states / "held_out": self.compared, self.states / "tuned": self.tuned}

    def note_base(self, base: Any) -> None:
        """Keep the base's hidden states, with which other models are compared."""
        for folder, samples in self._compared_texts.items():
            divergence.save_states(base, samples, BATCH, Spread(), folder)

    def measure(self, model: Any) -> Figures:
        """Return a model's figures: on held-out documents, items, and tuned conversations."""
        found = perplexity.measure(model, self.held_out, BATCH)
        distance, elsewhere = (
            divergence.measure(model, samples, BATCH, Spread(), folder)
            for folder, samples in self._compared_texts.items()
        )
        tuned = perplexity.measure(model, self.tuned, BATCH)
        scores = [
            likelihood for likelihood, _ in score(model, self.items.requests, BATCH, Spread())
        ]
        return {
            "perplexity": (found["all"]["perplexity"], "1"),
            **by_position(found["by_position"], "perplexity"),
            "kl": (distance["all"]["kl"], "nats"),
            **by_position(distance["by_position"], "kl"),
            "top-1 agreement": (distance["all"]["agreement"], "1"),
            **grade(scores, self.items),
            "tuned perplexity": (tuned["supervised"]["perplexity"], "1"),
            "tuned kl": (elsewhere["all"]["kl"], "nats"),
        }


def by_position(buckets: Sequence[dict[str, Any]], metric: str) -> Figures:
    """Return a metric by position, from stage 04's buckets, joined into those of BOUNDS."""
    found: Figures = {}
    for first, last in zip(BOUNDS, BOUNDS[1:], strict=False):
        inside = [each for each in buckets if first <= each["first"] < last]
        tokens = sum(each["tokens"] for each in inside)
        if not tokens:
            continue
        place = f"from {first}" if last == math.inf else f"{first} to {last - 1}"
        if metric == "perplexity":
            value, unit = math.exp(sum(each["nll"] for each in inside) / tokens), "1"
        else:
            value, unit = sum(each[metric] * each["tokens"] for each in inside) / tokens, "nats"
        found[f"{metric}, positions {place}"] = (value, unit)
    return found


def grade(likelihoods: Iterable[float], items: Items) -> Figures:
    """Return hellaswag's accuracies, in all and per character, with the first one's stderr."""
    endings = len(items.requests) // len(items.labels)
    rows = list(zip(likelihoods, items.characters, strict=True))
    right, right_norm = [], []
    for number, label in enumerate(items.labels):
        row = rows[number * endings : (number + 1) * endings]
        plain = [likelihood for likelihood, _ in row]
        normed = [likelihood / characters for likelihood, characters in row]
        right.append(plain.index(max(plain)) == label)
        right_norm.append(normed.index(max(normed)) == label)
    shares = [torch.tensor(each, dtype=torch.float64) for each in (right, right_norm)]
    acc, acc_norm = (float(each.mean()) for each in shares)
    return {
        "accuracy": (acc, "1"),
        "accuracy, stderr": (float(shares[0].std() / len(right) ** 0.5), "1"),
        "accuracy per character": (acc_norm, "1"),
    }
