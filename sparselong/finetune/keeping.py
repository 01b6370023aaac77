"""`training.keep_attention` and `keep_experts` settled on the GPU that trains, and why.

`auto` keeps what a checkpointed layer's second pass or backward pass would compute again where the
planner's peak with it, and the margin by which the planner may be wrong, fits what the GPU can
still lend and has lent to this process. Ranks that share a sequence exchange keys and values in a
pass, so all of them must do the same: the one with the least memory decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from sparselong.finetune import ranks
from sparselong.memory import CONTEXT_BYTES, format_bytes, is_kept


@dataclass(frozen=True)
class Keeping:
    """The decision on one of them, as the receipt and the manifest have it.

    Attributes:
        asked: `auto`, `always` or `never`.
        kept: whether it is kept.
        predicted_peak_bytes: the planner's peak if it is.
        available_bytes: what the GPU can lend to this process in all; None without a GPU.
    """

    asked: str
    kept: bool
    predicted_peak_bytes: int
    available_bytes: int | None

    def __str__(self) -> str:
        text = f"{self.asked}: {'kept' if self.kept else 'computed twice'}"
        if self.available_bytes is None:
            return f"{text} (no GPU: only what a GPU computes can be kept)"
        predicted, available = map(format_bytes, (self.predicted_peak_bytes, self.available_bytes))
        return f"{text}; predicted peak with it {predicted}, the GPU lends {available}"


def decide_keeping(
    asked: Mapping[str, str], predicted_peak_bytes: Mapping[str, int]
) -> dict[str, Keeping]:
    """Settles each key of `training`; every rank calls it and gets the same answer.

    Args:
        asked: `auto`, `always` or `never`, by key.
        predicted_peak_bytes: memory.kept_peaks, by key.
    """
    own = available_bytes() if torch.cuda.is_available() else None
    found = [size for size in ranks.collect(own) if size is not None]
    available = min(found, default=None)
    return {
        key: Keeping(
            word,
            available is not None and is_kept(word, predicted_peak_bytes[key], available),
            predicted_peak_bytes[key],
            available,
        )
        for key, word in asked.items()
    }


def available_bytes() -> int:
    """What the current GPU can lend to this process: free memory, what torch holds already, and the
    CUDA context, which the planner counts too."""
    free, _ = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved() + CONTEXT_BYTES
