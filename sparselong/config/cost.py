"""The config's section `cost`: see schema.py."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from sparselong.config.keys import Incidental, Section
from sparselong.config.values import Scale

GpuType = Literal["RTX 3090", "RTX 4090", "RTX 5090", "A6000", "A100", "H100", "H200"]
"""Types of GPUs whose speed is known, as parts of the names that drivers give."""


class CostSection(Section):
    """What GPUs cost, for estimates and for the manifest of stage 03."""

    per_gpu_hour: Annotated[Scale | dict[str, float] | None, Incidental()] = None
    """Price of one GPU for an hour, in any currency: one number, or a number for each type of GPU,
    as in `{RTX 3090: 0.25, H200: 3.5}`. With the latter, `--dry-run` estimates time and cost for
    each type. Types: RTX 3090, RTX 4090, RTX 5090, A6000, A100, H100, H200."""

    def price(self, gpu_name: str) -> float | None:
        """Return the price of an hour of a GPU by its driver's name; None if it is not set."""
        if not isinstance(self.per_gpu_hour, dict):
            return self.per_gpu_hour
        return self.per_gpu_hour.get(find_type(gpu_name) or "")


def find_type(gpu_name: str) -> GpuType | None:
    """Return the type of a GPU by its driver's name; None for one whose speed is not known."""
    return next((kind for kind in get_args(GpuType) if kind in gpu_name), None)
