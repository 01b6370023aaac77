"""gpt-oss's network for training from scratch, in plain torch.

transformers' model would do the same and is what the exported checkpoint is opened with; a test
compares the two. This one is written for speed with small widths: norms, rotary embedding and gate
are fused by torch.compile on a GPU, tokens are sorted by expert once a layer, and every gradient of
the sorting is a gather. Parameters are fp32 and have transformers' names; experts are stored
[experts, outputs, inputs], as in the published files. Each is rounded to bf16 where it is used, and
experts, if asked, to MXFP4, with the gradient passed straight through. Layer inputs, products and
the residual stream have the compute dtype: bf16 on a GPU, fp32 on a CPU.

Shapes: B rows, T tokens, N = B*T, H hidden, E experts, K experts per token, I intermediate.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

from sparselong.kernels.attention import attention
from sparselong.packing import mxfp4

_LIMIT, _SLOPE = 7.0, 1.702
"""The clamp and the sigmoid's slope of gpt-oss's gate."""


class Batch(NamedTuple):
    """Packed documents.

    Attributes:
        ids: int64 [B, T].
        positions: int64 [B, T], from 0 in each document.
        boundaries: int32 [documents + 1] on the flattened axis.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    boundaries: torch.Tensor


class Setting(NamedTuple):
    """What all layers of a pass share.

    Attributes:
        boundaries: see Batch.
        cos: [B, T, 32], in the compute dtype.
        sin: like cos.
        rounds: whether experts are rounded to MXFP4.
        functions: norm, rotate and gate, compiled or not.
    """

    boundaries: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    rounds: bool
    functions: Functions


class Routing(NamedTuple):
    """Sums over a pass for the auxiliary losses, and how often each expert was chosen.

    Attributes:
        balance: scalar, 1 if all experts are used equally.
        squared: scalar, mean square of the log-sum-exp of the router's logits.
        shares: [E], fractions of the routed tokens.
    """

    balance: torch.Tensor
    squared: torch.Tensor
    shares: torch.Tensor


class Network(nn.Module):
    """gpt-oss's decoder with its head."""

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, config: GptOssConfig, compiles: bool = False):
        super().__init__()
        self.config = config
        self.model: Any = nn.ModuleDict(
            {
                "embed_tokens": _Weight(config.vocab_size, config.hidden_size),
                "layers": nn.ModuleList(
                    Layer(config, index) for index in range(config.num_hidden_layers)
                ),
                "norm": _Weight(config.hidden_size),
            }
        )
        self.lm_head = _Weight(config.vocab_size, config.hidden_size)
        self._functions = Functions(config.rms_norm_eps, compiles)
        rotary = GptOssRotaryEmbedding(config)
        table = rotary(torch.zeros(1), torch.arange(config.max_position_embeddings)[None])
        self.register_buffer("cos", table[0][0], persistent=False)
        self.register_buffer("sin", table[1][0], persistent=False)

    def forward(self, batch: Batch, rounds: bool) -> tuple[torch.Tensor, list[Routing]]:
        """Return the last normed states [B, T, H] in the compute dtype, and layers' routing."""
        parts, functions = self.model, self._functions
        dtype = compute_dtype(batch.ids.device)
        cos, sin = (table[batch.positions].to(dtype) for table in (self.cos, self.sin))
        setting = Setting(batch.boundaries, cos, sin, rounds, functions)
        states = F.embedding(batch.ids, parts["embed_tokens"].weight).bfloat16().to(dtype)
        routings = []
        for layer in parts["layers"]:
            states, routing = layer(states, setting)
            routings.append(routing)
        return functions.norm(states, parts["norm"].weight), routings

    def losses(self, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the fp32 loss in nats of each target, [N], after states [N, H]."""
        return self._functions.token_losses(states, cast(self.lm_head.weight, states), targets)


class Layer(nn.Module):
    """Attention and experts, each after a norm and added to the residual stream."""

    def __init__(self, config: GptOssConfig, index: int):
        super().__init__()
        self.input_layernorm = _Weight(config.hidden_size)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = _Weight(config.hidden_size)
        self.mlp: Any = nn.ModuleDict({"router": Router(config), "experts": Experts(config)})

    def forward(self, states: torch.Tensor, setting: Setting) -> tuple[torch.Tensor, Routing]:
        """Return [B, T, H] and the router's routing."""
        norm, parts = setting.functions.norm, self.mlp
        states = states + self.self_attn(norm(states, self.input_layernorm.weight), setting)
        inputs = norm(states, self.post_attention_layernorm.weight).flatten(0, 1)
        weights, chosen, routing = parts["router"](inputs)
        output = parts["experts"](inputs, weights, chosen, setting)
        return states + output.view_as(states), routing


class Attention(nn.Module):
    """Grouped queries, a sink per head, and a window in every other layer."""

    def __init__(self, config: GptOssConfig, index: int):
        super().__init__()
        hidden, width = config.hidden_size, config.head_dim
        self.head_dim = width
        is_sliding = config.layer_types[index] == "sliding_attention"
        self.window = config.sliding_window if is_sliding else None
        queries, keys = config.num_attention_heads * width, config.num_key_value_heads * width
        self.q_proj = _Linear(hidden, queries)
        self.k_proj = _Linear(hidden, keys)
        self.v_proj = _Linear(hidden, keys)
        self.o_proj = _Linear(queries, hidden)
        self.sinks = nn.Parameter(torch.empty(config.num_attention_heads))

    def forward(self, inputs: torch.Tensor, setting: Setting) -> torch.Tensor:
        """Return [B, T, H]."""
        rotate, shape = setting.functions.rotate, (*inputs.shape[:2], -1, self.head_dim)
        q = rotate(self.q_proj(inputs).view(shape), setting.cos, setting.sin)
        k = rotate(self.k_proj(inputs).view(shape), setting.cos, setting.sin)
        v = self.v_proj(inputs).view(shape)
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        sinks = cast(self.sinks, inputs)
        output, _ = attention(q, k, v, sinks, cu_seqlens=setting.boundaries, window=self.window)
        return self.o_proj(output.transpose(1, 2).flatten(2))


class Router(nn.Module):
    """The K most likely experts of each token, with the softmax of their logits as weights."""

    def __init__(self, config: GptOssConfig):
        super().__init__()
        self.most = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(config.num_local_experts, config.hidden_size))
        self.bias = nn.Parameter(torch.empty(config.num_local_experts))

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Routing]:
        """Return weights and experts, both [N, K], of inputs [N, H]."""
        logits = F.linear(inputs, cast(self.weight, inputs), cast(self.bias, inputs))
        values, chosen = logits.topk(self.most, dim=-1)
        wide = logits.float()
        shares = torch.zeros_like(wide).scatter_(1, chosen, 1.0).mean(0) / self.most
        balance = len(self.weight) * (shares * wide.softmax(-1).mean(0)).sum()
        squared = wide.logsumexp(-1).square().mean()
        return values.softmax(-1), chosen, Routing(balance, squared, shares)


class Experts(nn.Module):
    """gpt-oss's experts, each applied to the tokens that chose it."""

    def __init__(self, config: GptOssConfig):
        super().__init__()
        count, hidden, inner = (
            config.num_local_experts,
            config.hidden_size,
            config.intermediate_size,
        )
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * inner, hidden))
        self.gate_up_proj_bias = nn.Parameter(torch.empty(count, 2 * inner))
        self.down_proj = nn.Parameter(torch.empty(count, hidden, inner))
        self.down_proj_bias = nn.Parameter(torch.empty(count, hidden))

    def forward(
        self,
        inputs: torch.Tensor,
        weights: torch.Tensor,
        chosen: torch.Tensor,
        setting: Setting,
    ) -> torch.Tensor:
        """Return [N, H]; inputs [N, H], weights and chosen [N, K]."""
        count = len(self.gate_up_proj)
        by_expert, order = chosen.flatten().to(torch.uint8).sort(stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        experts = torch.arange(count, dtype=torch.uint8, device=order.device)
        ends = torch.searchsorted(by_expert, experts, right=True).int()
        is_of = (by_expert[:, None] == experts).to(inputs.dtype)  # [N*K, E], to add biases
        gathered: Any = _Gather.apply(inputs, order, inverse, chosen.shape[1])
        gate_up_bias = cast(self.gate_up_proj_bias, inputs)
        gate_up = grouped(gathered, self._weight(self.gate_up_proj, inputs, setting), ends)
        inner = setting.functions.gate(torch.addmm(gate_up, is_of, gate_up_bias))
        output = grouped(inner, self._weight(self.down_proj, inputs, setting), ends)
        returned: Any = _Return.apply(output, order, inverse)
        summed = setting.functions.combine(returned.view(*chosen.shape, -1), weights)
        spread = torch.zeros(len(inputs), count, dtype=inputs.dtype, device=inputs.device)
        spread = spread.scatter(1, chosen, weights)
        return torch.addmm(summed, spread, cast(self.down_proj_bias, inputs))

    @staticmethod
    def _weight(weight: torch.Tensor, inputs: torch.Tensor, setting: Setting) -> torch.Tensor:
        if not setting.rounds:
            return cast(weight, inputs)
        rounded: Any = _RoundMxfp4.apply(weight, inputs.dtype)
        return rounded


class Functions:
    """The elementwise parts, which torch.compile fuses on a GPU."""

    def __init__(self, epsilon: float, compiles: bool):
        def norm(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            wide = states.float()
            scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
            return (weight.bfloat16().float() * (wide * scale)).to(states.dtype)

        def prepare(function: Any) -> Any:
            return torch.compile(function, dynamic=False) if compiles else function

        self.norm, self.rotate, self.gate = map(prepare, (norm, rotate, gate))
        self.combine, self.token_losses = map(prepare, (combine, token_losses))


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return [B, T, heads, D] rotated by angles [B, T, D / 2]."""
    first, second = states.chunk(2, dim=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def gate(gate_up: torch.Tensor) -> torch.Tensor:
    """Return [N, I] of gpt-oss's gate; gate and up alternate in [N, 2 I]."""
    left, up = gate_up[..., ::2], gate_up[..., 1::2]
    left = left.clamp(max=_LIMIT)
    return (up.clamp(-_LIMIT, _LIMIT) + 1) * (left * torch.sigmoid(left * _SLOPE))


def combine(outputs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the weighted sum over the experts of each token: [N, K, H], [N, K] to [N, H]."""
    return (outputs * weights[..., None]).sum(1)


def token_losses(states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return fp32 losses [N] of states [N, H] under the head's weight [V, H]."""
    logits = F.linear(states, weight).float()
    return F.cross_entropy(logits, targets, reduction="none")


def grouped(inputs: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Return inputs [M, in], sorted by expert, times each expert's weight [E, out, in]."""
    if inputs.is_cuda:
        return F.grouped_mm(inputs, weight.transpose(-2, -1), offs=ends)
    parts = inputs.tensor_split(ends.tolist()[:-1])
    return torch.cat([part @ each.T for part, each in zip(parts, weight, strict=True)])


def cast(weight: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return a parameter with its stored precision, bf16, in the compute dtype."""
    return weight.bfloat16().to(like.dtype)


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return bf16 for a GPU and fp32 for a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@torch.no_grad()
def initialise(network: Network, seed: int) -> None:
    """Draw all parameters: fan-in scaling, smaller outputs of layers, routers near zero."""
    generator = torch.Generator().manual_seed(seed)
    layers = network.config.num_hidden_layers
    for name, value in network.named_parameters():
        if "norm" in name:
            value.fill_(1.0)
            continue
        if name.endswith("bias") or name.endswith("sinks"):
            value.zero_()
            continue
        std = 0.5 if "embed_tokens" in name else value.shape[-1] ** -0.5
        if "o_proj" in name or "down_proj" in name:
            std /= math.sqrt(2 * layers)
        value.copy_(torch.randn(value.shape, generator=generator) * std)


class _Weight(nn.Module):
    def __init__(self, *shape: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))


class _Linear(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return F.linear(inputs, cast(self.weight, inputs), cast(self.bias, inputs))


class _Gather(torch.autograd.Function):
    """Rows of tokens in the order of their experts; backward sums each token's K gradients."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, order: Any, inverse: Any, most: int) -> Any:
        ctx.save_for_backward(inverse)
        ctx.most = most
        return inputs[order // most]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (inverse,) = ctx.saved_tensors
        return grad[inverse].view(-1, ctx.most, grad.shape[1]).sum(1), None, None, None


class _Return(torch.autograd.Function):
    """Rows in the order of experts back to that of tokens."""

    @staticmethod
    def forward(ctx: Any, outputs: torch.Tensor, order: Any, inverse: Any) -> Any:
        ctx.save_for_backward(order)
        return outputs[inverse]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (order,) = ctx.saved_tensors
        return grad[order], None, None


class _RoundMxfp4(torch.autograd.Function):
    """The nearest weight that MXFP4 stores, [..., K] along the last axis; the gradient passes."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, dtype: torch.dtype) -> Any:
        return mxfp4.decode(*mxfp4.encode(weight.bfloat16()), dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad.float(), None
