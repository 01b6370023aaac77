"""`training.keep_attention` and `keep_experts` settled on the GPU that trains, and why.

`auto` keeps what a checkpointed layer's second pass or backward pass would compute again where the
planner's peak with it, and the margin by which the planner may be wrong, fits what the GPU can
still lend and has lent to this process. Ranks that share a sequence exchange keys and values in a
pass, so all of them must do the same: the one with the least memory decides. Where device or config
leave nothing to keep, the decision says so (`Config.nothing_to_keep`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from sparselong.memory import CONTEXT_BYTES, format_bytes, is_kept
from sparselong.processes import world as ranks


@dataclass(frozen=True)
class Keeping:
    """The decision on one of them, as the receipt and the manifest have it.

    Attributes:
        asked: `auto`, `always` or `never`.
        kept: whether it is kept.
        predicted_peak_bytes: the planner's peak if it is.
        available_bytes: what the GPU can lend to this process in all; None where it was not asked,
            as nothing can be kept.
        nothing_to_keep: why not; None where it can be.
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
            f"{self.asked}: {'kept' if self.kept else 'computed twice'}; "
            f"predicted peak with it {predicted}, the GPU lends {available}"
        )


def decide_keeping(
    asked: Mapping[str, str],
    predicted_peak_bytes: Mapping[str, int],
    nothing_to_keep: Mapping[str, str],
) -> dict[str, Keeping]:
    """Settles each key of `training`; every rank calls it and gets the same answer.

    Args:
        asked: `auto`, `always` or `never`, by key.
        predicted_peak_bytes: memory.kept_peaks, by key.
        nothing_to_keep: Config.nothing_to_keep: why a key has nothing, the same on every rank.
    """
    possible = [key for key in asked if key not in nothing_to_keep]
    available = min(ranks.collect(available_bytes())) if possible else None
    made = {}
    for key, word in asked.items():
        peak = predicted_peak_bytes[key]
        kept = key in possible and available is not None and is_kept(word, peak, available)
        made[key] = Keeping(word, kept, peak, available, nothing_to_keep.get(key))
    return made


def available_bytes() -> int:
    """What the current GPU can lend to this process: free memory, what torch holds already, and the
    CUDA context, which the planner counts too."""
    free, _ = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved() + CONTEXT_BYTES
