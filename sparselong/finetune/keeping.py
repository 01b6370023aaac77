"""Decide `training.keep_attention` and `keep_experts` on the GPU that trains, and record why.

`auto` keeps results that a checkpointed layer would otherwise recompute, if the planner's peak with
them, plus its error margin, fits the memory available to this process. Ranks that share a sequence
exchange keys and values in a pass, so they must all decide the same: the rank with the least memory
decides. If device or config leave nothing to keep, the decision gives the reason
(`Config.nothing_to_keep`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sparselong.figures import format_bytes
from sparselong.memory import is_kept
from sparselong.processes import available_bytes
from sparselong.processes import world as ranks


@dataclass(frozen=True)
class Keeping:
    """The decision on one key, as recorded in receipt and manifest.

    Attributes:
        asked: `auto`, `always` or `never`.
        kept: whether the results are kept.
        predicted_peak_bytes: the planner's peak if they are kept.
        available_bytes: all GPU memory available to this process; None if not measured, because
            there is nothing to keep.
        nothing_to_keep: why there is nothing to keep; None if there is something.
    """

    asked: str
    kept: bool
    predicted_peak_bytes: int
    available_bytes: int | None
    nothing_to_keep: str | None

    def __str__(self) -> str:
        if self.available_bytes is None or self.nothing_to_keep is not None:
            return f"{self.asked}: not kept ({self.nothing_to_keep})"
        predicted, available = map(format_bytes, (self.predicted_peak_bytes, self.available_bytes))
        return (
            f"{self.asked}: {'kept' if self.kept else 'recomputed'}; "
            f"predicted peak if kept {predicted}, available on the GPU {available}"
        )


def decide_keeping(
    asked: Mapping[str, str],
    predicted_peak_bytes: Mapping[str, int],
    nothing_to_keep: Mapping[str, str],
) -> dict[str, Keeping]:
    """Decide for each key of `training`; every rank must call this and gets the same decisions.

    Args:
        asked: `auto`, `always` or `never`, by key.
        predicted_peak_bytes: peaks from memory.kept_peaks, by key.
        nothing_to_keep: from Config.nothing_to_keep: why a key has nothing to keep, the same on
            every rank.
    """
    possible = [key for key in asked if key not in nothing_to_keep]
    available = min(ranks.collect(available_bytes())) if possible else None
    made = {}
    for key, word in asked.items():
        peak = predicted_peak_bytes[key]
        kept = key in possible and available is not None and is_kept(word, peak, available)
        made[key] = Keeping(word, kept, peak, available, nothing_to_keep.get(key))
    return made
