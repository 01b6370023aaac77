"""Refine a layer's compressed attention by gradient steps on its output.

The solver compresses each projection for its own inputs and output. Here all four together are
drawn towards the base's attention on the same states: masks and scales stay, masters move, and
codes follow, straight through the rounding. A step reads one batch of calibration states.

The error is the mean square of the difference of attention's outputs, relative to that of the
base's output. If it is not lower after the steps than before them, the solver's result is kept.

Source of the method: the reconstruction of a block's output of BRECQ (Li et al., 2021), here by
steps on the masters under fixed scales and 2:4 masks.

Left out: a low-rank residual beside the codes (SLiM, Mozaffari et al., 2024). The best one of rank
3 for 512 inputs, the share that rank 16 has of 2880, lowers the error that the solver leaves in the
proxy's q_proj by 1.5 % and in v_proj by 3 %; rank 16, 31 % and 77 % more bytes, by 7 % and 14 %.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from sparselong.compress.calibration import HiddenStates
from sparselong.compress.weights import Compressed
from sparselong.packing import DenseFormat, integer
from sparselong.runtime import using

RATE = 0.1
"""Peak step of Adam, as a fraction of the distance of neighbouring codes."""
_BF16_CODES = 16
"""A mean bf16 weight is taken to be so many codes large."""
Projections = dict[str, Any]
"""A layer's q_proj, k_proj, v_proj and o_proj by name, modules with a bias."""
Attend = Callable[[torch.Tensor, Projections], torch.Tensor]
"""(states [sequences, length, hidden], projections) → attention's output, of the same shape."""


@dataclass(frozen=True)
class Refined:
    """What refinement found: projections by name, and the error before and after it."""

    projections: dict[str, Compressed]
    before: float
    after: float


class _Trained(nn.Module):
    """A projection whose master is trained under a fixed mask and fixed scales.

    Args:
        made: the solver's result.
        fmt: its format.
        bias: the projection's bias.
    """

    def __init__(self, made: Compressed, fmt: DenseFormat, bias: torch.Tensor | None):
        super().__init__()
        self.made, self.fmt, self.bias = made, fmt, bias
        self.out_features, self.in_features = made.master.shape
        self.master = nn.Parameter(made.master.float())

    @property
    def rate(self) -> float:
        """Adam's peak step."""
        if self.made.scale is not None:
            return RATE * float(self.made.scale.float().mean())
        return RATE * float(self.made.master.float().abs().mean()) / _BF16_CODES

    @torch.no_grad()
    def compressed(self) -> Compressed:
        """Return the result with the present master, a bf16 number that rounds to its code."""
        master, made = self.master.to(torch.bfloat16), self.made
        codes = master if made.mask is None else torch.where(made.mask, master, 0.0)
        if made.scale is not None:
            codes = integer.quantize(codes, made.scale, self.fmt.weight_bits)
        return replace(made, codes=codes, master=master)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] → [..., out] by the rounded weight; its gradient passes the rounding."""
        mask = self.made.mask
        kept = self.master if mask is None else torch.where(mask, self.master, 0.0)
        straight = kept + (self.compressed().weight().float() - kept).detach()
        return functional.linear(x, straight.to(x.dtype), self.bias)


def refine(
    attend: Attend,
    states: HiddenStates,
    dense: Projections,
    made: dict[str, Compressed],
    fmt: DenseFormat,
    steps: int,
) -> Refined:
    """Refine a layer's compressed projections; in every process that shares the states.

    Args:
        attend: runs the layer's attention.
        states: of this process's calibration sequences, before the layer.
        dense: the base's projections by name.
        made: the solver's results by name.
        fmt: the storage format.
        steps: number of steps, at least one.
    """
    trained = {name: _Trained(made[name], fmt, module.bias) for name, module in dense.items()}
    optimizer = torch.optim.Adam(
        [{"params": [one.master], "lr": one.rate} for one in trained.values()]
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    errors = []
    # Deterministic, because an interrupted layer is made again and must have the same bytes.
    with using(deterministic=True), torch.enable_grad():
        for batch in states.take_turns(steps):
            error = _find_error(attend, batch, dense, trained)
            error.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            errors.append(error.detach())
    with torch.no_grad():
        (first,) = states.take_turns(1)
        before, after = float(errors[0]), float(_find_error(attend, first, dense, trained))
    if not after < before:
        return Refined(made, before, before)
    return Refined({name: one.compressed() for name, one in trained.items()}, before, after)


def _find_error(
    attend: Attend, batch: torch.Tensor, dense: Projections, trained: dict[str, _Trained]
) -> torch.Tensor:
    """Return the error of a batch's attention; see the module docstring.

    Both outputs are scaled by a power of two, so that squares of large ones are finite.
    """
    least = torch.finfo(torch.float32).tiny
    with torch.no_grad():
        expected = attend(batch, dense).float()
        _, exponent = torch.frexp(expected.abs().amax().clamp(min=least))
        unit = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), -exponent)
    difference = unit * (attend(batch, {**trained}).float() - expected)
    signal = (unit * expected).square().mean()
    return difference.square().mean() / signal.clamp(min=least)
