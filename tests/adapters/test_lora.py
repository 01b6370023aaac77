"""The masked LoRA layer: forward matches the stored layer, gradients match the formula."""

import gc
import weakref
from functools import partial

import pytest
import torch
from peft import LoraConfig
from torch.utils.checkpoint import checkpoint

from sparselong.adapters import lora
from sparselong.adapters.lora import MaskedLoraLinear, sum_outer
from sparselong.kernels.dense.masked_weight import MaskedWeight
from sparselong.model.packed_linear import PackedLinear
from sparselong.packing import dense, integer
from sparselong.packing.dense import DenseFormat
from sparselong.runtime.recompute import checkpoint_contexts

FORMATS = [DenseFormat(bits, sparsity, 32) for bits in (4, 8, 16) for sparsity in ("2:4", "none")]
OUT, IN, RANK, ALPHA = 24, 64, 4, 8.0


def random_mask(generator: torch.Generator) -> torch.Tensor:
    order = torch.rand(OUT * IN // 4, 4, generator=generator).argsort(-1)[:, :2]
    return torch.zeros(OUT * IN // 4, 4, dtype=torch.bool).scatter_(1, order, True).reshape(OUT, IN)


def make_layer(fmt: DenseFormat, trained: bool, dtype=torch.float32) -> MaskedLoraLinear:
    """A layer on random packed weights; `trained` sets B so that many codes change."""
    generator = torch.Generator().manual_seed(fmt.weight_bits)
    torch.manual_seed(3)
    master = (0.1 * torch.randn(OUT, IN, generator=generator)).to(torch.bfloat16)
    mask = random_mask(generator) if fmt.is_sparse else None
    kept = master.float() if mask is None else torch.where(mask, master.float(), 0.0)
    scale = None
    if fmt.is_quantized:
        largest = kept.abs().reshape(OUT, -1, fmt.group_size).amax(-1)
        scale = (largest / (7.5 if fmt.weight_bits == 4 else 127.5)).to(torch.bfloat16)
    base: torch.nn.Module
    if fmt == DenseFormat(16, "none", 32):
        base = torch.nn.Linear(IN, OUT)
        base.weight.data = master.to(dtype)
    else:
        base = PackedLinear(IN, OUT, True, fmt)
        values = kept.to(torch.bfloat16)
        if scale is not None:
            values = integer.quantize(kept, scale, fmt.weight_bits)
        for name, tensor in dense.pack(fmt, values, mask, scale).items():
            getattr(base, name).copy_(tensor)
    base.bias.data = torch.randn(OUT, generator=generator).to(dtype)
    base.requires_grad_(False)
    layer = MaskedLoraLinear(
        base,
        "default",
        LoraConfig(r=RANK, lora_alpha=ALPHA),
        master_of=lambda name: master,
        target_name="model.layers.0.self_attn.q_proj",
        r=RANK,
        lora_alpha=ALPHA,
    )
    if trained:
        torch.nn.init.normal_(layer.adapter()[1], std=0.2)
    return layer


def reference(layer: MaskedLoraLinear, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor):
    """The formula with a straight-through estimator, in float64 and plain autograd."""
    weight = layer.master.double() + ALPHA / RANK * b @ a
    mask = layer.mask()
    if mask is not None:
        weight = weight * mask
    if layer.scale is None:
        hard = weight.to(torch.bfloat16).double()
        soft = weight
    else:
        lowest, highest = integer.code_range(layer.bits)
        scale = layer.scale.double().repeat_interleave(IN // layer.scale.shape[1], dim=1)
        ratio = weight / scale
        rounded = torch.round(ratio).clamp(lowest, highest)
        hard = (rounded * scale).to(torch.bfloat16).double()
        inside = (torch.round(ratio) >= lowest) & (torch.round(ratio) <= highest)
        soft = torch.where(inside, weight, weight.detach())
    return x @ (soft + (hard - soft).detach()).T + layer.base_layer.bias.double()


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_output_and_gradients_match_the_formula(fmt):
    layer = make_layer(fmt, trained=True)
    x = torch.randn(3, 7, IN, requires_grad=True)
    upstream = torch.randn(3, 7, OUT)
    layer(x).backward(upstream)
    a, b, _ = layer.adapter()
    x64, a64, b64 = (t.detach().double().requires_grad_() for t in (x, a, b))
    expected = reference(layer, x64, a64, b64)
    expected.backward(upstream.double())
    assert torch.allclose(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
    for got, wanted in ((x.grad, x64.grad), (a.grad, a64.grad), (b.grad, b64.grad)):
        error = (got.double() - wanted).norm() / wanted.norm()
        assert error < 1e-5


def test_saturated_and_pruned_weights_pass_no_gradient():
    layer = make_layer(DenseFormat(4, "2:4", 32), trained=True)
    weight, mask, scale = layer.weight(), layer.mask(), layer.scale.float().repeat_interleave(32, 1)
    saturated = mask & (torch.round(weight / scale).abs() > 8)
    assert saturated.any(), "no weight is saturated, so the case is not tested"
    row, column = (int(i[0]) for i in torch.where(saturated))
    x = torch.zeros(1, IN)
    x[0, column] = 1.0  # dW is nonzero in that column only
    upstream = torch.zeros(1, OUT)
    upstream[0, row] = 1.0
    layer(x).backward(upstream)
    a, b, _ = layer.adapter()
    assert not a.grad.any() and not b.grad.any()


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_untrained_layer_equals_the_packed_layer_and_flips_nothing(fmt):
    layer = make_layer(fmt, trained=False)
    x = torch.randn(5, IN)
    assert torch.equal(layer(x), layer.base_layer(x))
    before = {name: tensor.clone() for name, tensor in layer.packed().items()}
    assert layer.update("hysteresis") == 0.0
    assert torch.equal(layer(x), layer.base_layer(x))
    for name, tensor in layer.packed().items():
        assert torch.equal(tensor, before[name])


def test_plain_magnitude_would_flip_an_untrained_layer():
    assert make_layer(DenseFormat(4, "2:4", 32), trained=False).update("magnitude") > 0.2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_stored_codes_equal_those_of_the_last_forward(fmt, dtype):
    """A PackedLinear loaded with `packed()` gives bitwise equal output."""
    layer = make_layer(fmt, trained=True, dtype=dtype)
    layer.update("hysteresis")
    x = torch.randn(6, IN, dtype=dtype)
    last_forward = layer(x)
    stored = {name.rpartition(".")[2]: t for name, t in layer.packed().items()}
    if "weight" in stored:
        baked = torch.nn.functional.linear(x, stored["weight"].to(dtype), layer.base_layer.bias)
    else:
        fresh = PackedLinear(IN, OUT, True, fmt)
        for name, tensor in stored.items():
            getattr(fresh, name).copy_(tensor)
        fresh.bias = layer.base_layer.bias
        baked = fresh(x)
        assert torch.equal(fresh.dequantize(), layer.effective_weight())
    assert torch.equal(last_forward, baked)
    assert not torch.equal(last_forward, layer.base_layer(x))


def test_a_converted_layer_keeps_masters_masks_and_scales():
    layer = make_layer(DenseFormat(4, "2:4", 32), trained=True)
    before = {name: tensor.clone() for name, tensor in layer.named_buffers()}
    layer.half()
    assert layer.adapter()[0].dtype == torch.float16
    assert {"master", "scale", "patterns", "base_layer.weight_scale"} < set(before)
    for name, tensor in layer.named_buffers():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]), name


def test_update_keeps_two_of_four_and_updates_scales():
    layer = make_layer(DenseFormat(4, "2:4", 32), trained=True)
    mask, scale = layer.mask(), layer.scale.clone()
    assert 0.0 < layer.update("hysteresis") < 0.5
    assert (layer.mask().reshape(-1, 4).sum(-1) == 2).all()
    assert not torch.equal(layer.mask(), mask)
    assert not torch.equal(layer.scale, scale)
    kept = torch.where(layer.mask(), layer.weight(), 0.0).abs().reshape(OUT, -1, 32).amax(-1)
    assert ((kept / layer.scale.float()) < 7.5 * 1.02).all()  # nothing far outside the code range


def test_checkpointing_keeps_gradients_and_autocast_is_respected():
    layer = make_layer(DenseFormat(4, "2:4", 32), trained=True, dtype=torch.bfloat16)
    x = torch.randn(4, IN, dtype=torch.bfloat16, requires_grad=True)
    layer(x).sum().backward()
    a, b, _ = layer.adapter()
    plain = [t.grad.clone() for t in (a, b, x)]
    for t in (a, b, x):
        t.grad = None
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    for was, t in zip(plain, (a, b, x), strict=True):
        assert torch.equal(was, t.grad)
    assert a.grad.dtype == b.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x.detach().float())
    assert torch.equal(y, layer(x.detach()))


def test_a_checkpointed_layer_builds_its_weight_once_per_pass(monkeypatch):
    layer = make_layer(DenseFormat(4, "2:4", 32), trained=True, dtype=torch.bfloat16)
    x = torch.randn(4, IN, dtype=torch.bfloat16, requires_grad=True)
    layer(x).square().sum().backward()
    leaves = (*layer.adapter()[:2], x)
    plain = [t.grad.clone() for t in leaves]
    for t in leaves:
        t.grad = None
    made: list[weakref.ref] = []
    original = MaskedWeight.round

    def round_and_note(self: MaskedWeight) -> torch.Tensor:
        weight = original(self)
        made.append(weakref.ref(weight.untyped_storage()))
        return weight

    def sum_once_the_weight_is_freed(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        assert made[-1]() is None, "backward must not hold the weight and its gradient at once"
        return sum_outer(grad, x)

    monkeypatch.setattr(MaskedWeight, "round", round_and_note)
    monkeypatch.setattr(lora, "sum_outer", sum_once_the_weight_is_freed)
    context = partial(checkpoint_contexts, False)
    y = checkpoint(layer, x, use_reentrant=False, context_fn=context)
    assert [ref() for ref in made] == [None], "the forward pass must not keep its weight"
    y.square().sum().backward()
    assert [ref() for ref in made] == [None, None], "backward must use the recomputed weight"
    for was, t in zip(plain, leaves, strict=True):
        assert torch.equal(was, t.grad)


def test_no_weight_sized_tensor_lives_between_forward_and_backward():
    layer = make_layer(DenseFormat(4, "2:4", 32), trained=True)
    x = torch.randn(2, IN, requires_grad=True)
    known = {t.data_ptr() for t in (*layer.buffers(), *layer.parameters(), x)}
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = layer(x)
    assert saved
    assert {t.data_ptr() for t in saved} <= known
    alive = weakref.ref(y)
    del y
    gc.collect()
    assert alive() is None


def test_disabled_adapter_equals_the_packed_layer():
    layer = make_layer(DenseFormat(4, "2:4", 32), trained=True)
    x = torch.randn(5, IN)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), layer.base_layer(x))


def test_masters_of_another_layer_are_refused():
    fmt = DenseFormat(4, "2:4", 32)
    base = make_layer(fmt, trained=False).base_layer
    with pytest.raises(ValueError, match="rounding the masters"):
        MaskedLoraLinear(
            base,
            "default",
            LoraConfig(r=RANK),
            master_of=lambda name: torch.randn(OUT, IN).to(torch.bfloat16),
            target_name="q_proj",
            r=RANK,
            lora_alpha=ALPHA,
        )
