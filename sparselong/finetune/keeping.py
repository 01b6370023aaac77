"""Decide `training.keep_attention` and `keep_experts` on the GPU that trains, and record why.

`auto` keeps results that a checkpointed layer would otherwise recompute, if the planner's peak with
them, plus its error margin, fits the memory available to this process (`memory.decide_kept`). Ranks
that share a sequence exchange keys and values in a pass, so they must all decide the same: the rank
with the least memory decides. If device or config leave nothing to keep, the decision gives the
reason (`Config.nothing_to_keep`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sparselong.config import Config
from sparselong.figures import format_bytes
from sparselong.memory import (
    Held,
    Kept,
    compressed_shape,
    count_layers,
    decide_kept,
    finetune_memory,
)
from sparselong.processes import available_bytes
from sparselong.processes import world as ranks


@dataclass(frozen=True)
class Keeping:
    """The decision on one key, as recorded in receipt and manifest.

    Attributes:
        asked: `auto`, `always` or `never`.
        kept: in how many layers the results are kept, the last ones of the model.
        layers: how many layers have such results.
        predicted_peak_bytes: the planner's peak that decided: with what is kept, or with the least
            that could be. Attention is decided first, without experts that `auto` keeps.
        available_bytes: all GPU memory available to this process; None if not measured, because
            there is nothing to keep.
        nothing_to_keep: why there is nothing to keep; None if there is something.
    """

    asked: str
    kept: int
    layers: int
    predicted_peak_bytes: int
    available_bytes: int | None
    nothing_to_keep: str | None

    def __str__(self) -> str:
        if self.available_bytes is None or self.nothing_to_keep is not None:
            return f"{self.asked}: not kept ({self.nothing_to_keep})"
        predicted, available = map(format_bytes, (self.predicted_peak_bytes, self.available_bytes))
        outcome = "recomputed; predicted peak if kept"
        if self.kept:
            outcome = f"kept in {count_layers(self.kept, self.layers)}; predicted peak"
        return f"{self.asked}: {outcome} {predicted}, available on the GPU {available}"


def decide_keeping(
    config: Config, device: Literal["cuda", "cpu"], held: Held
) -> dict[str, Keeping]:
    """Decide for each key of `training`; every rank must call this and gets the same decisions.

    Args:
        config: the config of the run, settled.
        device: kind of device that trains.
        held: how the process holds the experts.
    """
    shape = compressed_shape(config)
    nothing = config.nothing_to_keep(device, held.expert_parallel)
    asked = {key: getattr(config.training, key) for key in ("keep_attention", "keep_experts")}
    is_possible = len(nothing) < len(asked)
    available = min(ranks.collect(available_bytes())) if is_possible else None
    kept = decide_kept(shape, config, available or 0, device, held=held)
    full, always = shape.full_layers, shape.layers if asked["keep_experts"] == "always" else 0

    decided = {
        "keep_attention": (full if kept.attention else 0, full, Kept(True, always)),
        "keep_experts": (kept.experts, shape.layers, kept._replace(experts=max(1, kept.experts))),
    }

    def predict(kept: Kept) -> int:
        return finetune_memory(shape, config, device, held=held, kept=kept).peak_bytes

    return {
        key: Keeping(asked[key], count, layers, predict(on), available, nothing.get(key))
        for key, (count, layers, on) in decided.items()
    }
