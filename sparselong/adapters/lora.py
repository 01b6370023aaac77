"""LoRA layer whose forward pass is the stored layer: prune and round the sum, then multiply.

    W  = M + s·B·A              M: stage 02's masters (bf16); A, B: trained (fp32); s = alpha/r
    Wq = bf16(q · scale)        q = round(mask ∘ W / scale), the canonical dequantization
    y  = x Wqᵀ + bias

The trained layer is the stored layer: forward and baking share `codes()`, so the codes in the final
checkpoint are those of the last forward pass, bit for bit. An ordinary adapter next to the packed
weight would have to be merged and rounded afterwards, which would lose much of what it learned.

The gradient passes straight through the rounding and is zero where the mask drops a weight or a
code saturates:

    dX = dY Wq        G = s (dYᵀ X) ∘ mask ∘ [not saturated]        dB = G Aᵀ        dA = Bᵀ G

G has the size of the weight, so this takes one more matmul per layer than ordinary LoRA; for the
attention projections of gpt-oss that is about 5 % of a training step. Nothing of weight size is
kept from the forward pass to the backward pass: W and Wq are recomputed by a rank-r matmul and a
rounding. In a checkpointed layer the recomputation saves Wq, and a bit a weight for mask and
saturation, for the backward pass that follows immediately.

The layer is a PEFT LoRA layer (built through PEFT's registry of custom modules), so PEFT and
transformers save, load and resume its A and B as a plain adapter. Adding that adapter to the
original dense model gives a different model: it was trained through this mask and this rounding.

Source of the method: SQFT's SparsePEFT (Muñoz et al., 2024) prunes the sum W + sBA; the
straight-through gate at saturation is that of Bengio et al. (2013) and LSQ. Not supported: dropout
on the adapter, merging into the base in memory, several adapters at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from torch.nn import functional

from sparselong.adapters import masks
from sparselong.kernels import make_opaque
from sparselong.kernels.dense import MaskedWeight, sum_weight
from sparselong.model import PackedLinear, StoredBuffers
from sparselong.packing import DenseFormat, dense, two_four
from sparselong.runtime import is_checkpointed


class _MaskedLinear(torch.autograd.Function):
    """x [..., in] → [..., out] through pruned and rounded M + s·B·A; see the module docstring.

    Saved for the backward pass: x and, in a checkpointed layer, the rounded weight and its gate,
    because there only the recomputation's saved tensors persist. `made_from` is referenced, not
    saved: a step changes it only after its backward passes.
    """

    @staticmethod
    def forward(ctx, x, lora_a, lora_b, bias, made_from):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.made_from = made_from  # has A and B too; as inputs they get gradients
        weight, kept = round_for_backward(made_from)
        ctx.save_for_backward(x, *kept)
        return functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        needs_x, *needs_factors = ctx.needs_input_grad[:3]
        grad_x, factors = differentiate_product(
            ctx.made_from, grad, list(ctx.saved_tensors), needs_x, any(needs_factors)
        )
        return grad_x, *(factors or (None, None)), None, None


def _masked_linear(
    x: torch.Tensor,
    factors: list[torch.Tensor],
    bias: torch.Tensor | None,
    master: torch.Tensor,
    patterns: torch.Tensor | None,
    scale: torch.Tensor | None,
    scaling: float,
    bits: int,
) -> torch.Tensor:
    """Return `_MaskedLinear`'s product for torch.compile."""
    a, b = factors
    weight = MaskedWeight(master, a, b, scaling, patterns, scale, bits).round().to(x.dtype)
    return functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _like_masked_linear(
    x: torch.Tensor,
    factors: list[torch.Tensor],
    bias: torch.Tensor | None,
    master: torch.Tensor,
    *_: Any,
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], master.shape[0])


def _differentiate_masked_linear(
    arguments: Any, results: Any, gradients: Any, needs: Any
) -> list[torch.Tensor | None]:
    x, factors, _, master, patterns, scale, scaling, bits = arguments
    a, b = factors
    made_from = MaskedWeight(master, a, b, scaling, patterns, scale, bits)
    grad_x, found = differentiate_product(
        made_from, gradients[0], [x, None, None], needs[0], needs[1] or needs[2]
    )
    given: list[Any] = [grad_x, *(found or (None, None))]
    return given + [None] * (len(needs) - len(given))


_masked_linear_operator = make_opaque(
    _masked_linear, like=_like_masked_linear, differentiate=_differentiate_masked_linear
)


def round_for_backward(
    made_from: MaskedWeight,
) -> tuple[torch.Tensor, tuple[torch.Tensor | None, torch.Tensor | None]]:
    """Return the rounded weight, and what to save of weight and gate for the backward pass."""
    if is_checkpointed():
        kept = made_from.round_with_gate()
        return kept[0], kept
    return made_from.round(), (None, None)


def differentiate_product(
    made_from: MaskedWeight,
    grad: torch.Tensor,
    saved: list[Any],
    needs_x: bool,
    needs_factors: bool,
) -> tuple[torch.Tensor | None, list[torch.Tensor] | None]:
    """Return the gradients of x, and of A and B of each layer in `made_from`, where needed.

    Args:
        made_from: defines the weight.
        grad: the product's gradient, [..., out].
        saved: the product's input x [..., in], and what `round_for_backward` returned to save;
            emptied, so that the weight can be freed before its gradient is allocated.
        needs_x: whether to return the gradient of x.
        needs_factors: whether to return those of A and B.
    """
    grad_x = factors = None
    x, weight, gate = saved
    saved.clear()
    with torch.autocast(x.device.type, enabled=False):
        if weight is None:
            weight, gate = made_from.round_with_gate()
        if needs_x:
            grad_x = grad @ weight.to(grad.dtype)
        del weight
        if needs_factors:
            outer = sum_outer(grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1]))
            factors = [each for pair in made_from.factor_gradients(outer, gate) for each in pair]
    return grad_x, factors


def sum_outer(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return gradᵀ x in fp32: [tokens, out], [tokens, in] → [out, in].

    The sum over tokens must not be rounded to bf16. A GPU accumulates bf16 products in fp32; on a
    CPU the operands are converted to fp32.
    """
    if x.is_cuda and x.dtype == grad.dtype == torch.bfloat16:
        return torch.mm(grad.T, x, out_dtype=torch.float32)
    return grad.float().T @ x.float()


class MaskedLoraLinear(StoredBuffers, LoraLayer):
    """PackedLinear with a trainable low-rank adapter under its mask and rounding.

    Args:
        base_layer: stage 02's PackedLinear with format, mask and scales, or a plain linear layer in
            bf16.
        adapter_name: PEFT's name for the adapter.
        config: PEFT's configuration; its dropout must be 0.
        master_of: module name → bf16 master weight [out, in].
        target_name: name of this module in the model, as PEFT passes it.
        r: rank.
        lora_alpha: sets the scale, s = lora_alpha / r.

    Raises:
        ValueError: Dropout is requested, or the masters do not reproduce the stored codes.
    """

    master: torch.Tensor
    scale: torch.Tensor | None
    patterns: torch.Tensor | None

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        *,
        master_of: Callable[[str], torch.Tensor],
        target_name: str,
        r: int,
        lora_alpha: float,
        **_: Any,
    ):
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        if config.lora_dropout:
            raise ValueError(f"{target_name}: dropout on a masked adapter is not supported")
        # A plain linear layer is what `weight_bits: 16, sparsity: none` leaves in place.
        packed = isinstance(base_layer, PackedLinear)
        self.fmt = base_layer.fmt if packed else DenseFormat(16, "none", 64)
        self.name = target_name
        self._active_adapter = adapter_name
        alpha: Any = lora_alpha  # PEFT annotates int, but only divides it by r
        self.update_layer(adapter_name, r, lora_alpha=alpha, config=config)
        stored = self.stored()
        device = stored["weight_packed"].device
        master = master_of(target_name) if packed else stored["weight_packed"]
        scale, patterns = stored.get("weight_scale"), stored.get("weight_mask")
        self.register_buffer("master", master.to(device), persistent=False)
        for name, tensor in (("scale", scale), ("patterns", patterns)):
            self.register_buffer(name, None if tensor is None else tensor.clone(), persistent=False)
        self.lora_A[adapter_name].to(device=device, dtype=torch.float32)
        self.lora_B[adapter_name].to(device=device, dtype=torch.float32)
        if not torch.equal(self.codes(), dense.unpack_values(self.fmt, stored)):
            raise ValueError(f"{target_name}: rounding the masters does not give the stored codes")

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    @property
    def bits(self) -> int:
        """Bits per kept weight: 4, 8 or 16."""
        return self.fmt.weight_bits

    def stored(self) -> dict[str, torch.Tensor]:
        """Return stage 02's tensors of the layer, by name."""
        base: Any = self.base_layer
        if not isinstance(base, PackedLinear):
            return {"weight_packed": base.weight.to(torch.bfloat16)}
        return base.packed()

    def adapter(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Return A [r, in], B [out, r] and s of the active adapter."""
        name = self.active_adapters[0]
        lora_a, lora_b = self.lora_A[name].weight, self.lora_B[name].weight
        assert isinstance(lora_a, torch.Tensor) and isinstance(lora_b, torch.Tensor)
        return lora_a, lora_b, self.scaling[name]

    def mask(self) -> torch.Tensor | None:
        """Return the current mask, bool [out, in]; None without 2:4."""
        return None if self.patterns is None else two_four.unpack_mask(self.patterns)

    def _made_from(self) -> MaskedWeight:
        return MaskedWeight(self.master, *self.adapter(), self.patterns, self.scale, self.bits)

    @torch.no_grad()
    def weight(self) -> torch.Tensor:
        """Return M + s·B·A, fp32 [out, in], before mask and rounding."""
        return sum_weight(self.master, *self.adapter())

    @torch.no_grad()
    def codes(self) -> torch.Tensor:
        """Return the next forward pass's codes [out, in], int8 (bf16 values at 16 bits)."""
        return self._made_from().codes()

    @torch.no_grad()
    def effective_weight(self) -> torch.Tensor:
        """Return the next forward pass's bf16 weight [out, in]."""
        return self._made_from().round()

    @torch.no_grad()
    def packed(self) -> dict[str, torch.Tensor]:
        """Return the tensors to store, by full name."""
        if not isinstance(self.base_layer, PackedLinear):
            return {f"{self.name}.weight": self.codes()}
        tensors = dense.pack(self.fmt, self.codes(), self.mask(), self.scale)
        return {f"{self.name}.{part}": tensor for part, tensor in tensors.items()}

    @torch.no_grad()
    def update(self, criterion: masks.Criterion) -> float:
        """Update the mask and the scales; return the fraction of mask bits flipped."""
        weight, stored, flipped = self.weight(), self.stored(), 0.0
        before = self.master.float()
        if self.patterns is not None:
            first = two_four.unpack_mask(stored["weight_mask"])
            current = two_four.unpack_mask(self.patterns)
            scale = stored.get("weight_scale")
            chosen = masks.update_mask(weight, self.master, first, current, scale, criterion)
            flipped = masks.flipped_fraction(current, chosen)
            self.patterns.copy_(two_four.pack_mask(chosen))
            weight = torch.where(chosen, weight, 0.0)
            before = torch.where(first, before, 0.0)
        if self.scale is not None:
            self.scale.copy_(masks.update_scale(weight, before, stored["weight_scale"], self.bits))
        return flipped

    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Apply the layer to x [..., in]; return [..., out] in x's dtype, or autocast's if on."""
        if self.disable_adapters:
            return self.base_layer(x)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if torch.compiler.is_compiling():
            a, b, scaling = self.adapter()
            given = (x, [a, b], self.base_layer.bias, self.master, self.patterns, self.scale)
            return _masked_linear_operator(*given, float(scaling), self.bits)
        made_from = self._made_from()
        return _MaskedLinear.apply(
            x, made_from.lora_a, made_from.lora_b, self.base_layer.bias, made_from
        )


def masked_layers(model: nn.Module) -> dict[str, MaskedLoraLinear]:
    """Return the model's masked layers by their name in the base model, in order."""
    return {m.name: m for m in model.modules() if isinstance(m, MaskedLoraLinear)}
