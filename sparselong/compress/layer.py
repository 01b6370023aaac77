"""One decoder layer: run calibration states through it and compress its attention.

The layer is transformers' own, inside a GptOssModel with one layer and no final norm, so masks and
rotary embedding are transformers' too. Its input states come from the compressed layers before it.

    norm        →  one Hessian for q, k and v, which read the same inputs; they are compressed
    attention   →  o's Hessian, on the inputs that the compressed q, k and v produce, and how far
                   these are from those of the dense ones: o is fitted to make up for it
    attention   →  all four are refined by gradient steps (refine.py)
    experts     →  their scores, if some are dropped (fewer_experts.py)
    whole layer →  the output states, computed from the stored weights

The experts run in the last two of these passes alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from transformers import GptOssConfig, GptOssModel
from transformers.models.gpt_oss.modeling_gpt_oss import (
    GptOssDecoderLayer,
    GptOssRotaryEmbedding,
)

from sparselong.checkpoint import pack_two_four_experts, unpack_two_four_experts
from sparselong.compress.background import Seconds
from sparselong.compress.calibration import HiddenStates
from sparselong.compress.fewer_experts import Scorer
from sparselong.compress.refine import refine
from sparselong.compress.weights import (
    Compressed,
    Drift,
    Hessian,
    compress_weight,
    empty,
    make_up,
)
from sparselong.compress.work import Spread
from sparselong.config import CalibrationSection
from sparselong.errors import StageError
from sparselong.model import NAME, PackedExperts, PackedLinear, fuse
from sparselong.packing import DenseFormat, dense

_INPUTS = (("q_proj", "k_proj", "v_proj"), ("o_proj",))
"""Projections by the inputs that they share, in the order in which they are compressed."""
_EXPERTS_AT_ONCE = 4
"""Experts pruned to 2:4 at once."""


class _NoMlp(nn.Module):
    """Replacement for the experts when only attention is needed."""

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(hidden_states), None


@dataclass
class CompressedLayer:
    """Result of compressing a layer.

    Attributes:
        stored: tensors of the compressed checkpoint by name.
        masters: dense masters by name.
        relative_error: the solver's, by projection.
        attention_error: mean square error of attention's output, relative to the output, before and
            after refinement; empty without.
    """

    stored: dict[str, torch.Tensor]
    masters: dict[str, torch.Tensor]
    relative_error: dict[str, float]
    attention_error: dict[str, float]


class CalibratedLayer:
    """A layer on a device, ready to be calibrated, compressed and run.

    Args:
        config: the model's architecture.
        index: the layer's index.
        tensors: the layer's tensors by full name; on a CPU the layer uses their memory.
        device: device of the computation.
        dtype: dtype of the computation.
        attn_implementation: transformers' name of the attention implementation.
    """

    def __init__(
        self,
        config: GptOssConfig,
        index: int,
        tensors: dict[str, torch.Tensor],
        device: torch.device,
        dtype: torch.dtype,
        attn_implementation: str,
    ):
        self.index, self.device = index, device
        single = GptOssConfig.from_dict(config.to_dict())
        single.num_hidden_layers = 1
        single.layer_types = [config.layer_types[index]]
        single._attn_implementation = attn_implementation
        with torch.device("meta"):
            model = GptOssModel(single)
            layer = cast(GptOssDecoderLayer, model.layers[0])
            layer.mlp.experts = PackedExperts(single)
        prefix = f"model.layers.{index}."
        state = {
            name.removeprefix(prefix): tensor.to(
                device, dtype if tensor.is_floating_point() else tensor.dtype, non_blocking=True
            )
            for name, tensor in tensors.items()
        }
        layer.load_state_dict(state, assign=True)
        unused = {"embed_tokens": nn.Identity(), "norm": nn.Identity()}
        model._modules |= {**unused, "rotary_emb": GptOssRotaryEmbedding(single).to(device)}
        if attn_implementation == NAME:
            fuse(model)
        self.model, self.layer = model.requires_grad_(False).eval(), layer

    def prune_experts(self) -> dict[str, torch.Tensor]:
        """Prune the experts to 2:4 and return the tensors to store, on the CPU."""
        stored, prefix = {}, f"model.layers.{self.index}.mlp.experts"
        for name in ("gate_up_proj", "down_proj"):
            blocks: torch.Tensor = getattr(self.layer.mlp.experts, f"{name}_blocks")
            parts = []
            for part in blocks.split(_EXPERTS_AT_ONCE):
                kept, patterns = pack_two_four_experts(part)
                part.copy_(unpack_two_four_experts(kept, patterns))
                parts.append((kept.cpu(), patterns.cpu()))
            for key, found in zip(("kept", "patterns"), zip(*parts, strict=True), strict=True):
                stored[f"{prefix}.{name}_{key}"] = torch.cat(found)
        return stored

    @torch.no_grad()
    def run(self, states: HiddenStates) -> None:
        """Take the states through the layer.

        Raises:
            StageError: a state after the layer is not finite; the states are then those before it.
        """
        bad = torch.zeros((), dtype=torch.int64, device=self.device)
        for place, batch in states.batches():
            out = self._forward(batch)
            bad += (~torch.isfinite(out)).sum()
            states.put(place, out)
        if int(bad):
            raise StageError(
                f"calibration failed in layer {self.index}",
                "finite hidden states",
                f"{int(bad)} NaN or infinite values",
                "check the base checkpoint; raise calibration.dampening if it is intact",
            )
        states.advance()

    def _forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.model(inputs_embeds=batch, use_cache=False).last_hidden_state

    @torch.no_grad()
    def _measure_norm(self, states: HiddenStates, spread: Spread) -> torch.Tensor:
        """Return the Hessian of q's, k's and v's inputs over all processes' states."""
        norm = self.layer.input_layernorm
        hessian = Hessian(len(norm.weight), f"layer {self.index}'s attention", self.device)
        for _, batch in states.batches():
            hessian.add(norm(batch))
        return _sum_up(hessian, states, spread)

    @torch.no_grad()
    def _measure_attention(
        self, states: HiddenStates, before: dict[str, nn.Module], spread: Spread
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the Hessian of o's inputs over all processes' states, and their drift.

        The experts are left out.

        Args:
            states: of this process's calibration sequences, before the layer.
            before: q, k and v as they were in the base; empty: the drift is not measured.
            spread: the processes that share the work.
        """
        o_proj, seen = self.layer.self_attn.o_proj, []
        given = (o_proj.in_features, f"layer {self.index}'s o_proj", self.device)
        hessian, drift = Hessian(*given), Drift(*given) if before else None
        handle = o_proj.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
        mlp, self.layer.mlp = self.layer.mlp, _NoMlp()
        try:
            for _, batch in states.batches():
                self._forward(batch)
                inputs = seen.pop()
                hessian.add(inputs)
                if drift is not None:
                    compressed = self._exchange(before)
                    self._forward(batch)
                    self._exchange(compressed)
                    drift.add(seen.pop(), inputs)
        finally:
            handle.remove()
            self.layer.mlp = mlp
        summed = _sum_up(hessian, states, spread)
        return summed, None if drift is None else _sum_up(drift, states, spread)

    def _exchange(self, projections: dict[str, nn.Module]) -> dict[str, nn.Module]:
        """Put projections into attention by name; return those that were there."""
        attention = self.layer.self_attn
        found = {name: getattr(attention, name) for name in projections}
        for name, module in projections.items():
            setattr(attention, name, module)
        return found

    @torch.no_grad()
    def score_experts(self, states: HiddenStates, spread: Spread) -> torch.Tensor:
        """Return `Scorer.sums` of the layer's experts over all processes' states."""
        experts = cast(PackedExperts, self.layer.mlp.experts)
        scorer = Scorer(experts)
        self.layer.mlp._modules["experts"] = scorer
        try:
            for _, batch in states.batches():
                self._forward(batch)
        finally:
            self.layer.mlp._modules["experts"] = experts
        return spread.add(scorer.sums, "scores of experts")

    def keep_experts(self, kept: list[int]) -> dict[str, torch.Tensor]:
        """Drop all experts but these, and their rows of the router.

        Returns:
            What is left of both, on the CPU in the base's dtypes, by full name.
        """
        mlp, rows = self.layer.mlp, torch.tensor(kept, device=self.device)
        single = GptOssConfig.from_dict(self.model.config.to_dict())
        single.num_local_experts = len(kept)
        with torch.device("meta"):
            experts = PackedExperts(single)
        state = {name: tensor[rows] for name, tensor in mlp.experts.state_dict().items()}
        experts.load_state_dict(state, assign=True)
        mlp._modules["experts"] = experts.requires_grad_(False).eval()
        for name, parameter in mlp.router.named_parameters():
            setattr(mlp.router, name, nn.Parameter(parameter[rows], requires_grad=False))
        mlp.router.num_experts = len(kept)
        return {
            f"model.layers.{self.index}.mlp.{name}": tensor.cpu().to(
                torch.bfloat16 if tensor.is_floating_point() else tensor.dtype
            )
            for name, tensor in mlp.state_dict().items()
        }

    def compress(
        self,
        states: HiddenStates,
        fmt: DenseFormat,
        calibration: CalibrationSection,
        spread: Spread,
        seconds: Seconds,
    ) -> CompressedLayer:
        """Compress q, k, v, then o, and replace the dense layers by the packed ones.

        Args:
            states: of this process's calibration sequences, before the layer.
            fmt: the storage format.
            calibration: dampening and solver.
            spread: the processes that share the work; each solves some of the projections.
            seconds: where the seconds of the parts are added.

        Returns:
            Tensors on the CPU, the same in every process.

        Raises:
            StageError: see `compress_weight` and `Hessian.add`.
        """
        attention, drift = self.layer.self_attn, None
        dense = {name: getattr(attention, name) for names in _INPUTS for name in names}
        makes_up = calibration.solver == "sweep"
        before = {name: dense[name] for name in _INPUTS[0] if makes_up}
        made: dict[str, Compressed] = {}
        for names in _INPUTS:
            with seconds.measuring("calibrate"):
                if names == _INPUTS[0]:
                    hessian = self._measure_norm(states, spread)
                else:
                    hessian, drift = self._measure_attention(states, before, spread)
            with seconds.measuring("solve"):
                made |= self._solve(names, (hessian, drift), fmt, calibration, spread)
            with seconds.measuring("pack"):
                for name in names:
                    self._replace(name, made[name], fmt)
        steps, attention_error = calibration.refinement_steps, {}
        if steps:
            with seconds.measuring("refine"):
                made, attention_error = self._refine(states, dense, made, fmt, steps, spread)
        with seconds.measuring("pack"):
            result = self._store(made, fmt)
        result.attention_error.update(attention_error)
        return result

    def _refine(
        self,
        states: HiddenStates,
        dense: dict[str, nn.Module],
        made: dict[str, Compressed],
        fmt: DenseFormat,
        steps: int,
        spread: Spread,
    ) -> tuple[dict[str, Compressed], dict[str, float]]:
        """Return the refined projections, the first process's in all of them, and the errors."""
        found = refine(self._attend, states, dense, made, fmt, steps)
        projections = found.projections
        if spread.size > 1:
            projections = {name: _send(each, 0, spread) for name, each in projections.items()}
        return projections, {"solved": found.before, "refined": found.after}

    def _store(self, made: dict[str, Compressed], fmt: DenseFormat) -> CompressedLayer:
        """Put the compressed projections into the layer, and return what is stored of them."""
        result = CompressedLayer({}, {}, {}, {})
        for name, each in made.items():
            full = f"model.layers.{self.index}.self_attn.{name}"
            packed = self._replace(name, each, fmt)
            result.stored |= {f"{full}.{key}": tensor.cpu() for key, tensor in packed.items()}
            result.masters[f"{full}.weight"] = each.master.cpu()
            result.relative_error[name] = each.relative_error
        return result

    def _attend(self, batch: torch.Tensor, projections: dict[str, nn.Module]) -> torch.Tensor:
        """Return the output of attention with these projections, [sequences, length, hidden]."""
        seen, attention = [], self.layer.self_attn
        handle = attention.register_forward_hook(lambda _m, _i, output: seen.append(output[0]))
        mlp, self.layer.mlp = self.layer.mlp, _NoMlp()
        others = self._exchange(projections)
        try:
            self._forward(batch)
        finally:
            self._exchange(others)
            self.layer.mlp = mlp
            handle.remove()
        return seen.pop()

    def _solve(
        self,
        names: tuple[str, ...],
        moments: tuple[torch.Tensor, torch.Tensor | None],
        fmt: DenseFormat,
        calibration: CalibrationSection,
        spread: Spread,
    ) -> dict[str, Compressed]:
        """Return the compressed projections, each solved in one process and sent to the others.

        `moments` are the Hessian of their inputs and, if they should make up for it, the drift.
        """
        (hessian, drift), damp, solved = moments, calibration.dampening, {}
        weights = {name: getattr(self.layer.self_attn, name).weight for name in names}
        owners = {name: number % spread.size for number, name in enumerate(names)}
        for name, weight in weights.items():
            if owners[name] == spread.rank:
                full = f"model.layers.{self.index}.self_attn.{name}"
                if drift is not None:
                    weight = make_up(weight, hessian, drift, damp, full)
                solved[name] = compress_weight(weight, hessian, fmt, damp, full, calibration.solver)
        if spread.size == 1:
            return solved
        return {
            name: _send(solved.get(name) or empty(weight, fmt), owners[name], spread)
            for name, weight in weights.items()
        }

    def _replace(self, name: str, made: Compressed, fmt: DenseFormat) -> dict[str, torch.Tensor]:
        """Put a packed projection in the dense one's place and return its stored tensors."""
        linear: nn.Linear | PackedLinear = getattr(self.layer.self_attn, name)
        packed = dense.pack(fmt, made.codes, made.mask, made.scale)
        module = PackedLinear(
            linear.in_features, linear.out_features, linear.bias is not None, fmt
        ).to(self.device)
        module.load_state_dict(
            {**packed, **({"bias": linear.bias} if linear.bias is not None else {})}, assign=True
        )
        setattr(self.layer.self_attn, name, module.requires_grad_(False))
        return packed


def _sum_up(moment: Hessian | Drift, states: HiddenStates, spread: Spread) -> torch.Tensor:
    """Return a moment over all processes' states, fp32 [in, in]."""
    moment.total = spread.add(moment.total, "Hessians")
    moment.tokens = states.tokens
    return moment.matrix


def _send(made: Compressed, owner: int, spread: Spread) -> Compressed:
    """Return the owner's compressed weight; that of another process is overwritten."""
    sent = [
        None if tensor is None else spread.send(tensor.contiguous(), owner, "compressed weights")
        for tensor in (made.codes, made.scale, made.mask, made.master)
    ]
    error = torch.tensor([made.relative_error], dtype=torch.float64, device=made.codes.device)
    error = spread.send(error, owner, "compressed weights")
    codes, scale, mask, master = sent
    assert codes is not None and master is not None
    return Compressed(codes, scale, mask, master, float(error))
