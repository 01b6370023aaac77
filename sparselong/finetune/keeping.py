"""`training.keep_attention` settled on the GPU that trains: what is kept, and why.

`auto` keeps full attention's outputs between a checkpointed layer's two passes where the planner's
peak with them, and the margin by which the planner may be wrong, fits what the GPU can still lend
and has lent to this process. Ranks that share a sequence exchange keys and values in a pass, so all
of them must do the same: the one with the least memory decides.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparselong.finetune import ranks
from sparselong.memory import CONTEXT_BYTES, MARGIN, format_bytes


@dataclass(frozen=True)
class Keeping:
    """The decision, as the receipt and the manifest have it.

    Attributes:
        asked: `auto`, `always` or `never`.
        kept: whether full attention's outputs are kept.
        predicted_peak_bytes: the planner's peak if they are.
        available_bytes: what the GPU can lend to this process in all; None without a GPU.
    """

    asked: str
    kept: bool
    predicted_peak_bytes: int
    available_bytes: int | None

    def __str__(self) -> str:
        text = f"keep_attention {self.asked}: {'kept' if self.kept else 'computed twice'}"
        if self.available_bytes is None:
            return f"{text} (no GPU: only the GPU's attention can be kept)"
        predicted, available = map(format_bytes, (self.predicted_peak_bytes, self.available_bytes))
        return f"{text}; predicted peak with it {predicted}, the GPU lends {available}"


def decide_keeping(asked: str, predicted_peak_bytes: int) -> Keeping:
    """Settles `training.keep_attention`; every rank calls it and gets the same answer.

    Args:
        asked: `auto`, `always` or `never`.
        predicted_peak_bytes: memory.finetune_memory's peak with kept outputs.
    """
    own = available_bytes() if torch.cuda.is_available() else None
    found = [size for size in ranks.collect(own) if size is not None]
    if not found:
        return Keeping(asked, False, predicted_peak_bytes, None)
    fits = predicted_peak_bytes * MARGIN <= min(found)
    return Keeping(
        asked, asked == "always" or (asked == "auto" and fits), predicted_peak_bytes, min(found)
    )


def available_bytes() -> int:
    """What the current GPU can lend to this process: free memory, what torch holds already, and the
    CUDA context, which the planner counts too."""
    free, _ = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved() + CONTEXT_BYTES
