"""Refining a layer's compressed attention by gradient steps on its output.

After stage 02 has compressed a layer, its four projections together are drawn towards the base's
attention on the same states: masks and scales stay, masters move, and codes follow, straight
through the rounding. The error is the mean square of the difference of the outputs, relative to
that of the output; each step reads one batch of calibration states.

An experiment: stage 02 does not do this.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, islice, repeat
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn import functional

from sparselong.checkpoint import PROJECTIONS
from sparselong.compress.calibration import HiddenStates
from sparselong.compress.layer import CalibratedLayer, CompressedLayer
from sparselong.packing import DenseFormat, dense, integer

STEPS, RATE = 60, 0.1
"""Steps for each layer; the peak rate of Adam as a fraction of the projection's mean scale."""


class _Refined(nn.Module):
    """A projection whose masters are trained under a fixed mask and fixed scales.

    Args:
        packed: the compressed projection.
        master: its master [out, in].
    """

    def __init__(self, packed: Any, master: torch.Tensor):
        super().__init__()
        self.fmt: DenseFormat = packed.fmt
        self.in_features, self.out_features = packed.in_features, packed.out_features
        self.bias, stored = packed.bias, packed.packed()
        self.mask, self.scale = dense.unpack_mask(self.fmt, stored), stored.get("weight_scale")
        self.master = nn.Parameter(master.to(packed.weight_packed.device).float())

    @torch.no_grad()
    def pack(self) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Return the stored tensors, and the bf16 master that rounds to them."""
        master = self.master.to(torch.bfloat16)
        codes = master if self.mask is None else torch.where(self.mask, master, 0.0)
        if self.scale is not None:
            codes = integer.quantize(codes, self.scale, self.fmt.weight_bits)
        return dense.pack(self.fmt, codes, self.mask, self.scale), master

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] → [..., out] by the rounded weight; its gradient passes the rounding."""
        weight = self.master if self.mask is None else torch.where(self.mask, self.master, 0.0)
        with torch.no_grad():
            stored, _ = self.pack()
            rounded = dense.unpack(self.fmt, stored).float()
        straight = weight + (rounded - weight).detach()
        return functional.linear(x, straight.to(x.dtype), self.bias)


@contextmanager
def refining(steps: int = STEPS, rate: float = RATE) -> Iterator[None]:
    """Make stage 02 refine each layer that it has compressed inside the block."""
    compress = CalibratedLayer.compress

    def compress_and_refine(layer: Any, states: HiddenStates, *given: Any) -> CompressedLayer:
        before = {name: getattr(layer.layer.self_attn, name) for name in PROJECTIONS}
        result = compress(layer, states, *given)
        refine(layer, states, before, result, steps, rate)
        return result

    with mock.patch.object(CalibratedLayer, "compress", compress_and_refine):
        yield


def refine(
    layer: Any,
    states: HiddenStates,
    before: dict[str, nn.Module],
    result: CompressedLayer,
    steps: int,
    rate: float,
) -> list[float]:
    """Refine a compressed layer and its result; return the error of each step.

    Args:
        layer: the CalibratedLayer.
        states: of the calibration sequences, before the layer.
        before: the base's projections.
        result: what `compress` returned; changed.
        steps: number of steps.
        rate: see RATE.
    """
    stem, attention = f"model.layers.{layer.index}.self_attn", layer.layer.self_attn
    packed = {name: getattr(attention, name) for name in PROJECTIONS}
    masters = {name: result.masters[f"{stem}.{name}.weight"] for name in PROJECTIONS}
    refined = {name: _Refined(packed[name], masters[name]) for name in PROJECTIONS}
    optimizer = torch.optim.Adam(
        [{"params": [one.master], "lr": rate * _unit(one)} for one in refined.values()]
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    errors, seen = [], []
    hook = attention.register_forward_hook(lambda _m, _i, output: seen.append(output[0]))
    mlp, layer.layer.mlp = layer.layer.mlp, _Nothing()
    batches = chain.from_iterable(states.batches() for _ in repeat(None))
    for _, batch in islice(batches, steps):
        layer._exchange(before)
        with torch.no_grad():
            layer._forward(batch)
        expected = seen.pop().float()
        layer._exchange(refined)
        layer._forward(batch)
        error = (seen.pop().float() - expected).square().mean() / expected.square().mean()
        error.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        errors.append(error.detach())
    hook.remove()
    layer.layer.mlp = mlp
    layer._exchange(packed)
    for name, one in refined.items():
        _take(one, packed[name], f"{stem}.{name}", result)
    return torch.stack(errors).tolist()


def _take(one: _Refined, packed: nn.Module, name: str, result: CompressedLayer) -> None:
    """Put a refined projection into the packed one and into the layer's result."""
    tensors, master = one.pack()
    packed.load_state_dict(tensors, strict=False)
    result.stored |= {f"{name}.{key}": tensor.cpu() for key, tensor in tensors.items()}
    result.masters[f"{name}.weight"] = master.cpu()


class _Nothing(nn.Module):
    """Replacement for the experts."""

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(hidden_states), None


def _unit(one: _Refined) -> float:
    """Return what a step is measured in: the mean scale, or a sixteenth of the mean weight."""
    if one.scale is not None:
        return float(one.scale.float().mean())
    return float(one.master.detach().abs().mean()) / 16
