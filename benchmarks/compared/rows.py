"""The rows of the table: which models are made, and in what order.

All rows of one seed come before those of the next, so that a table that is not finished has every
row, with fewer seeds. Rows that no seed changes are made once.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.compared.compressing import Recipe
from benchmarks.compared.methods import METHODS
from benchmarks.compared.tuning import Arm

DEFAULT = "ours"
ONE_SHOT_EXPERTS = ("base", "magnitude 2:4 + rtn", "sparsegpt 2:4 + gptq", DEFAULT)
"""Methods that are also combined with fewer or sparse experts."""
DISTILLED = 0.5
CEILING = Arm("dense")
ARMS = (
    CEILING,
    Arm("dense", DISTILLED),
    *(
        arm
        for masks in ("static", "dynamic", "learned")
        for arm in (Arm(masks), Arm(masks, DISTILLED), Arm(masks, DISTILLED, "ceiling"))
    ),
)
WITH_EXPERTS = (CEILING, Arm("dynamic"), Arm("dynamic", DISTILLED))
"""Arms of models with fewer or sparse experts; the base that distils has all of them."""


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        recipe: how the base is compressed.
        arm: how it is then fine-tuned; None: not at all.
    """

    recipe: Recipe
    arm: Arm | None = None

    @property
    def case(self) -> dict[str, str | int]:
        """What identifies the row in the results."""
        tuned = "no" if self.arm is None else self.arm.masks
        if self.arm is not None and self.arm.distilled:
            tuned += f", {self.arm.distilled:g} from {self.arm.teacher}"
        recipe = self.recipe
        return {
            "method": recipe.method,
            "experts": recipe.experts if recipe.experts in ("native", "2:4") else "kept",
            "tuned": tuned,
            "seed": recipe.seed,
        }


def list_rows(seeds: int, keep: int) -> list[Row]:
    """Return all rows, with `keep` experts where experts are pruned."""
    rows: list[Row] = []
    for seed in range(seeds):
        for method in METHODS:
            experts = ("native", "2:4", keep) if method in ONE_SHOT_EXPERTS else ("native",)
            for each in experts:
                if seed == 0 or METHODS[method].is_drawn or each == keep:
                    rows.append(Row(Recipe(method, seed, each)))
        rows += [Row(Recipe(_start(arm), seed), arm) for arm in ARMS]
        for each in ("2:4", keep):
            rows += [Row(Recipe(_start(arm), seed, each), arm) for arm in WITH_EXPERTS]
    return rows


def _start(arm: Arm) -> str:
    return "base" if arm.masks == "dense" else DEFAULT
