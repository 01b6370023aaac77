"""Methods of compressing a weight, as solvers for stage 02: the references, and the package's own.

A reference prunes by one rule and then rounds by another; each rule is the one that its paper says:

    magnitude   keep the two largest |w| of every four
    Wanda       keep the two largest |w|·‖x‖ of every four, ‖x‖ over the calibration tokens
    random      keep two of every four, drawn by seed and name
    SparseGPT   llmcompressor's own function, which also corrects the kept weights
    RTN         round to the nearest code; a group's scale is its largest magnitude over half the
                range of the codes
    GPTQ        column by column, each error passed on to later columns: to kept weights alone, or
                ("mask lost") to all, as SparseGPT and GPTQ do when one runs after the other

Stage 02 calls a method in place of the solver `llmcompressor`, so that calibration, Hessians,
masters and storage are its own, and all methods see the same states. "ours" is stage 02 with its
default solver, which also fits o_proj to make up for what compressed q, k and v changed, and then
refines all four by gradient steps; no reference is refined.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal
from unittest import mock

import torch

from sparselong.compress.weights import one_sweep, solver, two_sweeps
from sparselong.compress.weights.factor import factorize
from sparselong.kernels.sweep import Swept
from sparselong.packing import GROUP, DenseFormat, integer

Solve = Callable[[torch.Tensor, torch.Tensor, DenseFormat, float, str], Swept]
"""(weight [out, in], Hessian [in, in], format, dampening, name) → the pruned, rounded weight."""
Rule = Callable[[torch.Tensor, torch.Tensor, str], torch.Tensor]
"""(weight, Hessian, name) → mask, bool [out, in]."""


def keep_two(scores: torch.Tensor) -> torch.Tensor:
    """Return which two of every four consecutive scores are largest, bool of the same shape."""
    fours = scores.reshape(-1, GROUP)
    best = fours.topk(GROUP // 2, dim=-1).indices
    return torch.zeros_like(fours, dtype=torch.bool).scatter_(-1, best, True).reshape(scores.shape)


def by_magnitude(weight: torch.Tensor, hessian: torch.Tensor, name: str) -> torch.Tensor:
    """Return the mask of the largest weights."""
    return keep_two(weight.float().abs())


def by_wanda(weight: torch.Tensor, hessian: torch.Tensor, name: str) -> torch.Tensor:
    """Return the mask of the largest products of weight and its input's norm."""
    return keep_two(weight.float().abs() * hessian.diagonal().sqrt())


def at_random(seed: int) -> Rule:
    """Return a rule that draws the mask; the same seed and name give the same mask."""

    def draw(weight: torch.Tensor, hessian: torch.Tensor, name: str) -> torch.Tensor:
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
        return keep_two(torch.rand(weight.shape, generator=generator)).to(weight.device)

    return draw


def round_to_nearest(weight: torch.Tensor, fmt: DenseFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int8 codes [out, in] and bf16 scales [out, in/group]."""
    scale = two_sweeps.choose_scale(weight, fmt.weight_bits, fmt.group_size)
    return integer.quantize(weight, scale, fmt.weight_bits), scale


def prune_and_round(
    rule: Rule | None,
    weight: torch.Tensor,
    hessian: torch.Tensor,
    fmt: DenseFormat,
    dampening: float,
    name: str,
) -> Swept:
    """Prune by a rule that corrects nothing, then round to the nearest code if the format does."""
    values = weight.float()
    mask = None if rule is None else rule(weight, hessian, name)
    if mask is not None:
        values = torch.where(mask, values, 0.0)
    if not fmt.is_quantized:
        return Swept(values, mask, None, None)
    return Swept(values, mask, *round_to_nearest(values, fmt))


def sparsegpt_and_round(
    weight: torch.Tensor, hessian: torch.Tensor, fmt: DenseFormat, dampening: float, name: str
) -> Swept:
    """Prune with SparseGPT, then round to the nearest code."""
    factorize(weight, hessian, dampening, name)  # refuses a Hessian that SparseGPT would replace
    values, mask = two_sweeps.prune_two_four(weight, hessian, dampening)
    return Swept(values, mask, *round_to_nearest(values, fmt))


def lose_mask(
    weight: torch.Tensor, hessian: torch.Tensor, fmt: DenseFormat, dampening: float, name: str
) -> Swept:
    """Prune with SparseGPT, then round with GPTQ, which makes pruned weights nonzero again."""
    _, factor = factorize(weight, hessian, dampening, name)
    values, _ = two_sweeps.prune_two_four(weight, hessian, dampening)
    scale = two_sweeps.choose_scale(values, fmt.weight_bits, fmt.group_size)
    codes, values = two_sweeps.quantize_masked(values, factor, scale, fmt.weight_bits, None)
    return Swept(values, None, codes, scale)


@dataclass(frozen=True)
class Method:
    """A way to compress the attention projections.

    Attributes:
        bits: 4, or 16 to keep bf16.
        sparsity: of the stored form; a mask that is lost cannot be stored as 2:4.
        solve: seed → the solver; None: stage 02's default.
        is_drawn: whether another seed gives another result.
        is_refined: whether each layer is refined after it, as stage 02 does by default.
    """

    bits: Literal[4, 16]
    sparsity: Literal["none", "2:4"]
    solve: Callable[[int], Solve] | None
    is_drawn: bool = True
    is_refined: bool = False


def _same(solve: Solve) -> Callable[[int], Solve]:
    return lambda seed: solve


def _plain(rule: Rule | None) -> Callable[[int], Solve]:
    return _same(partial(prune_and_round, rule))


def _random(seed: int) -> Solve:
    return partial(prune_and_round, at_random(seed))


METHODS = {
    "base": Method(16, "none", None, is_drawn=False),
    "rtn": Method(4, "none", _plain(None), is_drawn=False),
    "gptq": Method(4, "none", _same(two_sweeps.solve)),
    "ours int4": Method(4, "none", None, is_refined=True),
    "random 2:4": Method(16, "2:4", _random),
    "magnitude 2:4": Method(16, "2:4", _plain(by_magnitude), is_drawn=False),
    "wanda 2:4": Method(16, "2:4", _plain(by_wanda)),
    "sparsegpt 2:4": Method(16, "2:4", _same(two_sweeps.solve)),
    "ours 2:4": Method(16, "2:4", None, is_refined=True),
    "random 2:4 + rtn": Method(4, "2:4", _random),
    "magnitude 2:4 + rtn": Method(4, "2:4", _plain(by_magnitude), is_drawn=False),
    "wanda 2:4 + rtn": Method(4, "2:4", _plain(by_wanda)),
    "sparsegpt 2:4 + rtn": Method(4, "2:4", _same(sparsegpt_and_round)),
    "sparsegpt 2:4 + gptq, mask lost": Method(4, "none", _same(lose_mask)),
    "sparsegpt 2:4 + gptq": Method(4, "2:4", _same(two_sweeps.solve)),
    "ours, sweep alone": Method(4, "2:4", _same(one_sweep.solve)),
    "ours, not refined": Method(4, "2:4", None),
    "ours": Method(4, "2:4", None, is_refined=True),
}
"""By name; int4 where a rule of rounding is named."""


@contextmanager
def solving(method: Method, seed: int) -> Iterator[None]:
    """Make stage 02 compress by a method inside the block."""
    solvers = {} if method.solve is None else {"llmcompressor": method.solve(seed)}
    with mock.patch.dict(solver.SOLVERS, solvers):
        yield
