"""Paired comparison of two models on the same items and tokens, with its statistical uncertainty.

The standard error of one accuracy says how much it would vary with other items. Two models answer
the *same* items, so most of this variation is shared. The difference has a smaller standard error,
computed from the differences per item. Items that both models answer alike do not show which is
better: McNemar's exact test gives the probability of a split at least this uneven among the items
that flipped, if each flip were a coin toss.

Perplexities are compared by the mean difference of the losses on the same tokens. Tokens of one
conversation are correlated, so the standard error counts conversations, not tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def compare_answers(base: Sequence[float], other: Sequence[float]) -> dict[str, Any]:
    """Compare two models' right (1) and wrong (0) answers, or their scores, item by item.

    Returns:
        `difference` of the means (other - base), its `stderr` (0 for a model against itself),
        `gained` and `lost` items (better in `other`, in `base`) and `p`, two-sided.

    Raises:
        ValueError: the numbers of items differ, or there are fewer than two.
    """
    if len(base) != len(other) or len(base) < 2:
        raise ValueError(f"two or more items each are required, not {len(base)} and {len(other)}")
    differences = [theirs - mine for mine, theirs in zip(base, other, strict=True)]
    count = len(differences)
    mean = sum(differences) / count
    variance = sum((d - mean) ** 2 for d in differences) / (count - 1)
    gained, lost = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    return {
        "difference": mean,
        "stderr": math.sqrt(variance / count),
        "gained": gained,
        "lost": lost,
        "p": mcnemar_exact_p(gained, lost),
    }


def compare_losses(
    base: Sequence[tuple[float, int]], other: Sequence[tuple[float, int]]
) -> dict[str, float | None]:
    """Compare two models' losses on the same conversations.

    Args:
        base: for each conversation, (summed loss in nats, number of tokens).
        other: the same for the other model.

    Returns:
        `ratio` of the perplexities (1 = equal); `difference`, the mean loss of `other` minus that
        of `base` in nats per token, and its `stderr` (None for a single conversation).

    Raises:
        ValueError: the conversations differ.
    """
    pairs = [(theirs[0] - mine[0], mine[1]) for mine, theirs in zip(base, other, strict=True)]
    if [mine[1] for mine in base] != [theirs[1] for theirs in other]:
        raise ValueError("the two models were measured on different tokens")
    tokens, count = sum(size for _, size in pairs), len(pairs)
    difference = sum(change for change, _ in pairs) / tokens
    squares = sum((change - difference * size) ** 2 for change, size in pairs)
    stderr = math.sqrt(squares * count / (count - 1)) / tokens if count > 1 else None
    return {"ratio": math.exp(difference), "difference": difference, "stderr": stderr}


def mcnemar_exact_p(gained: int, lost: int) -> float:
    """Return the two-sided exact p of a split this uneven in gained + lost fair coin tosses."""
    flips = gained + lost
    tail = sum(math.comb(flips, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**flips)
