"""Packed modules against transformers' modules on decoded weights: values and gradients."""

import copy

import pytest
import torch
from torch import nn
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from sparselong.checkpoint.format import pack_two_four_experts, unpack_two_four_experts
from sparselong.kernels.experts.op import ALPHA, LIMIT
from sparselong.kernels.experts.torch_backend import apply_gate
from sparselong.model.packed_experts import PackedExperts
from sparselong.model.packed_linear import PackedLinear
from sparselong.packing import dense, integer, mxfp4, two_four
from sparselong.packing.dense import DenseFormat

CONFIG = GptOssConfig(
    hidden_size=64, intermediate_size=96, num_local_experts=5, num_experts_per_tok=4
)


@pytest.fixture
def experts() -> tuple[PackedExperts, GptOssExperts]:
    torch.manual_seed(0)
    packed, plain = PackedExperts(CONFIG), GptOssExperts(CONFIG)
    for name in ("gate_up_proj", "down_proj"):
        shape = getattr(plain, name).transpose(1, 2).shape
        blocks, scales = mxfp4.encode(torch.randn(shape) * 0.3)
        getattr(packed, f"{name}_blocks").copy_(blocks)
        getattr(packed, f"{name}_scales").copy_(scales)
        bias = torch.randn(shape[:2])
        getattr(packed, f"{name}_bias").data.copy_(bias)
        decoded = mxfp4.decode(blocks, scales, torch.float32).transpose(1, 2).contiguous()
        setattr(plain, name, nn.Parameter(decoded))
        setattr(plain, f"{name}_bias", nn.Parameter(bias.clone()))
    return packed.double(), plain.double()


@pytest.mark.parametrize("case", ["random", "one expert", "one token"])
def test_experts_match_transformers(experts, case):
    packed, plain = experts
    tokens = 1 if case == "one token" else 37
    x = torch.randn(tokens, 64, dtype=torch.float64) * 3  # large enough to reach the clamp at 7
    indices = torch.stack([torch.randperm(5)[:4] for _ in range(tokens)])
    if case == "one expert":
        indices = torch.full((tokens, 1), 3)
    weights = torch.rand(indices.shape, dtype=torch.float64)
    upstream = torch.randn(tokens, 64, dtype=torch.float64)
    results = []
    for module in (packed, plain):
        x_in, weights_in = x.clone().requires_grad_(), weights.clone().requires_grad_()
        y = module(x_in, indices, weights_in)
        y.backward(upstream)
        results.append((y, x_in.grad, weights_in.grad))
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() <= 1e-12 * theirs.norm()


def test_the_clamp_is_reached_and_matters(experts):
    packed, _ = experts
    x = torch.randn(37, 64, dtype=torch.float64) * 3
    indices, weights = torch.zeros(37, 1, dtype=torch.int64), torch.ones(37, 1).double()
    loose = copy.deepcopy(packed)
    loose.limit = 1e9
    assert not torch.allclose(packed(x, indices, weights), loose(x, indices, weights), atol=1e-2)


@pytest.mark.parametrize(
    "fmt", [DenseFormat(4, "2:4", 64), DenseFormat(8, "none", 32), DenseFormat(16, "2:4", 64)]
)
def test_packed_linear_equals_the_decoded_linear(fmt):
    torch.manual_seed(0)
    mask = torch.tensor([True, False, False, True]).repeat(48, 32) if fmt.is_sparse else None
    scale = (torch.rand(48, 128 // fmt.group_size) + 0.1).bfloat16() if fmt.is_quantized else None
    weight = torch.randn(48, 128)
    values = (
        integer.quantize(weight, scale, fmt.weight_bits) if scale is not None else weight.bfloat16()
    )
    layer = PackedLinear(128, 48, True, fmt)
    layer.load_state_dict({**dense.pack(fmt, values, mask, scale), "bias": torch.randn(48)})
    decoded = layer.dequantize().float()
    x = torch.randn(3, 5, 128, requires_grad=True)
    x_plain = x.detach().clone().requires_grad_()
    y, y_plain = layer(x), nn.functional.linear(x_plain, decoded, layer.bias)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    y_plain.backward(upstream)
    assert torch.equal(y, y_plain) and torch.equal(x.grad, x_plain.grad)
    if mask is not None:
        assert not decoded[~mask].any() and decoded[mask].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    "fmt", [DenseFormat(4, "2:4", 64), DenseFormat(8, "none", 32), DenseFormat(16, "2:4", 64)]
)
def test_a_converted_model_keeps_the_stored_bits(fmt, dtype):
    layer = PackedLinear(64, 8, True, fmt)
    for tensor in layer.packed().values():
        tensor.view(torch.uint8).random_(0, 64)  # as bf16: 3e-39 to 1e-19, less than fp16 has
    before = {name: tensor.clone() for name, tensor in layer.packed().items()}
    nn.Sequential(layer).to(dtype)
    assert layer.bias is not None and layer.bias.dtype == dtype
    for name, tensor in layer.packed().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]), name
    assert {t.device.type for t in layer.to("meta").packed().values()} == {"meta"}


def test_bias_gets_a_gradient_if_required():
    layer = PackedLinear(64, 8, True, DenseFormat(16, "none", 64))
    layer.weight_packed.copy_(torch.randn(8, 64))
    layer.bias = nn.Parameter(torch.zeros(8))
    layer(torch.randn(2, 7, 64)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((8,), 14.0))


def test_two_four_experts_keep_the_largest_codes_exactly():
    torch.manual_seed(0)
    blocks = torch.randint(0, 256, (3, 10, 2, 16), dtype=torch.uint8)
    kept, patterns = pack_two_four_experts(blocks)
    assert (kept.nbytes + patterns.nbytes) * 8 / (3 * 10 * 64) == 2.75  # 3.0 with the scale
    expanded = unpack_two_four_experts(kept, patterns)
    before, after = mxfp4.unpack_codes(blocks), mxfp4.unpack_codes(expanded)
    assert bool(two_four.is_two_four((after & 7) != 0).all())
    assert bool(((after == before) | (after == 0)).all())
    magnitudes = (before & 7).reshape(-1, 4).sort(1, descending=True).values
    kept_magnitudes = (after & 7).reshape(-1, 4).sort(1, descending=True).values
    assert torch.equal(magnitudes[:, :2], kept_magnitudes[:, :2])


def test_a_nan_scale_is_detected_at_every_load(experts):
    packed, _ = experts
    call = (torch.randn(3, 64).double(), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1))
    packed(*call)
    packed.down_proj_scales[4, 1, 0] = 255
    with pytest.raises(ValueError, match="down_proj_scales: contains 255"):
        packed(*call)


def test_gate_formula():
    """(up + 1) · gate · σ(1.702 · gate), interleaved columns, gate ≤ 7, |up| ≤ 7, by hand."""
    gate_up = torch.tensor([2.0, 3.0, 9.0, -9.0, -9.0, 9.0], dtype=torch.float64)
    gated = apply_gate(gate_up, ALPHA, LIMIT)
    sigmoid = lambda z: 1 / (1 + torch.exp(torch.tensor(-1.702 * z, dtype=torch.float64)))  # noqa: E731
    expected = [4 * 2 * sigmoid(2), -6 * 7 * sigmoid(7), 8 * -9 * sigmoid(-9)]
    assert torch.allclose(gated, torch.stack([torch.as_tensor(e) for e in expected]))
