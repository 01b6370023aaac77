"""Runs the generation kernels in Triton's interpreter; decode/test_kernels.py starts it.

Runs in its own process, because the interpreter must be chosen before Triton is imported.
`emulated_ptx.py` executes the inline PTX. Prints one JSON document: for each case the relative L2
error against fp64, or a count of wrong results. bf16 represents every input exactly.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import json

import numpy as np
import torch
import triton
from triton.runtime.interpreter import TensorHandle

from sparselong.kernels.decode import attention as generation_attention
from sparselong.kernels.decode import experts as expert_generation
from sparselong.kernels.decode import gemv as packed_gemv
from sparselong.kernels.decode import glue as generation_glue
from sparselong.kernels.decode.token_word import decode_token, holds_finite
from sparselong.kernels.dense import unpack as packed_unpack
from sparselong.kernels.expert_stack import ExpertStack, Gate, PackedWeight
from sparselong.kernels.experts.call import ExpertCall, ExpertOperands
from sparselong.kernels.experts.lora import NO_ADAPTERS
from sparselong.kernels.experts.torch_backend import expert_mlp_torch
from sparselong.packing import dense
from sparselong.packing.dense import DenseFormat
from tests.kernels.emulated_ptx import run_ptx
from tests.kernels.interpreter import patch_once
from tests.references.expert_mlp import expert_mlp_reference
from tests.references.packed_gemv import packed_gemv_reference

GATE = Gate(1.702, 7.0)
FORMATS = {
    "two_four": DenseFormat(4, "2:4", 64),
    "two_four_groups_of_32": DenseFormat(4, "2:4", 32),
    "dense": DenseFormat(4, "none", 64),
}


def emulate_asm(text, constraints, args, dtype, is_pure, pack, _semantic=None):
    """Replace tl.inline_asm_elementwise in the interpreter."""
    arrays = [np.broadcast_arrays(*[arg.handle.data for arg in args])][0]
    words = [np.ascontiguousarray(array).view(np.uint32) for array in arrays]
    (found,) = run_ptx(text.value, 1, words)
    floating = dtype == triton.language.float32
    handle = TensorHandle(found.view(np.float32 if floating else np.int32), dtype)
    kind = triton.language.block_type(dtype, list(found.shape))
    return triton.language.tensor(handle, kind)


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the relative L2 error; NaN if `got` contains NaN."""
    return ((got.double() - exact.double()).norm() / exact.double().norm()).item()


def bf16(*shape: int) -> torch.Tensor:
    """Draw fp32 values that bf16 represents exactly."""
    return torch.randn(shape).bfloat16().float()


def draw_packed(fmt: DenseFormat, rows: int, width: int) -> dict[str, torch.Tensor]:
    """Draw a random weight with every code and every pattern."""
    codes = torch.randint(-8, 8, (rows, width), dtype=torch.int8)
    kept = torch.rand(rows, width // 4, 4).argsort(-1).argsort(-1) < 2
    mask = kept.view(rows, width) if fmt.is_sparse else None
    scale = (0.1 + torch.rand(rows, width // fmt.group_size)).bfloat16()
    return dense.pack(fmt, codes, mask, scale)


def run_gemv(fmt: DenseFormat, width: int, tokens: int, rows: tuple[int, ...]) -> dict[str, float]:
    """Launch once over several matrices, with and without a residual."""
    x, residual = bf16(tokens, width), bf16(tokens, sum(rows))
    tensors = [draw_packed(fmt, count, width) for count in rows]
    biases = [bf16(count) for count in rows]
    matrices = tuple(
        packed_gemv.as_matrix(fmt, tensor, bias)
        for tensor, bias in zip(tensors, biases, strict=True)
    )
    exact = torch.cat(
        [packed_gemv_reference(x, fmt, t, b) for t, b in zip(tensors, biases, strict=True)], 1
    )
    out = torch.full((tokens, sum(rows)), float("nan"))
    packed_gemv.launch_gemv(generation_glue.pack_pairs(x), matrices, out)
    added = residual.clone()
    packed_gemv.launch_gemv(generation_glue.pack_pairs(x), matrices, added, residual=added)
    return {"out": error(out, exact), "with_residual": error(added, exact + residual)}


def count_wrong_weights(fmt: DenseFormat, rows: int, width: int) -> int:
    """Count the weights that differ from `dense.unpack`. The interpreter truncates to bf16, so the
    kernel writes fp32 and torch rounds."""
    tensors = draw_packed(fmt, rows, width)
    out = torch.full((rows, width), float("nan"))
    packed_unpack.launch_unpack(packed_gemv.as_matrix(fmt, tensors, None), out)
    return int((out.bfloat16() != dense.unpack(fmt, tensors)).sum())


def draw_weight(experts: int, out: int, width: int) -> PackedWeight:
    blocks = torch.randint(0, 256, (experts, out, width // 32, 16), dtype=torch.uint8)
    scales = torch.randint(120, 126, (experts, out, width // 32), dtype=torch.uint8)
    return PackedWeight(blocks, scales, bf16(experts, out))


def in_bf16(stack: ExpertStack) -> ExpertStack:
    return ExpertStack(*(weight._replace(bias=weight.bias.bfloat16()) for weight in stack))


def run_experts(
    tokens: int, hidden: int, inner: int, experts: int, top_k: int, wrong_index: bool = False
) -> dict[str, float]:
    """Run the experts on a few tokens of very different magnitudes, or with a wrong index."""
    x = bf16(tokens, hidden) * torch.exp2(torch.randint(-20, 1, (tokens, 1)).float())
    x[:, :32] *= 512.0
    indices = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)])
    weights = torch.rand(indices.shape)
    stack = ExpertStack(
        draw_weight(experts, 2 * inner, hidden), draw_weight(experts, hidden, inner)
    )
    if wrong_index:
        indices[-1, 0] = experts
    out = expert_generation.run_generation(x, indices, weights, stack, GATE)
    if wrong_index:
        return {"numbers": float(torch.isfinite(out[-1]).sum())}
    exact = expert_mlp_reference(x, indices, weights, stack, gate=GATE)
    plain = expert_mlp_torch(
        ExpertCall(x.bfloat16(), indices, weights.bfloat16()),
        ExpertOperands(in_bf16(stack), NO_ADAPTERS, GATE, "torch"),
    )
    return {"out": error(out, exact), "plain_bf16": error(plain, exact)}


def run_attention(capacity: int, is_window: bool, lengths: list[int]) -> dict[str, float]:
    """Decode tokens one by one over a cache, against a softmax over the visible keys."""
    heads, kv_heads, dim, most = 8, 2, 32, max(lengths) + 1
    angle = torch.rand(most, dim // 2) * 6
    angles = (angle.cos(), angle.sin())
    layer = generation_attention.LayerAttention(torch.randn(heads), dim**-0.5, is_window)
    cache = (torch.full((kv_heads, capacity, dim), float("nan")),) * 2
    cache = tuple(tensor.clone() for tensor in cache)
    scratch = (
        torch.full((16, heads, dim), float("nan")),
        torch.full((16, heads), float("nan")),
        torch.zeros(kv_heads, dtype=torch.int32),
    )
    history: list[tuple[torch.Tensor, torch.Tensor]] = []
    worst = 0.0
    for position in range(most):
        qkv = torch.randn(heads + 2 * kv_heads, dim)
        turned = turn(qkv[: heads + kv_heads].double(), *(a[position].double() for a in angles))
        history.append((turned[heads:], qkv[heads + kv_heads :].double()))
        if position not in lengths:
            slot = position % capacity
            cache[0][:, slot], cache[1][:, slot] = history[-1][0].float(), history[-1][1].float()
            continue
        out = torch.full((heads * dim,), float("nan"))
        generation_attention.launch_attend(
            qkv, angles, cache, layer, scratch, out, torch.tensor([position]), pairs=False
        )
        keys, values = (torch.stack(part, 1) for part in zip(*history[-capacity:], strict=True))
        scores = torch.einsum("kgd,ktd->kgt", turned[:heads].view(kv_heads, -1, dim), keys)
        scores = torch.cat([scores * dim**-0.5, layer.sinks.double().view(kv_heads, -1, 1)], -1)
        exact = torch.einsum("kgt,ktd->kgd", scores.softmax(-1)[..., :-1], values)
        worst = max(worst, error(out.view(heads, dim), exact.reshape(heads, dim)))
    return {"out": worst, "left_in_counter": float(scratch[2].abs().sum())}


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high = x.chunk(2, -1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


def run_route(experts: int, width: int) -> dict[str, float]:
    """Run norm, router, top 4 and softmax of one row; two experts tie."""
    x, norm, router, bias = bf16(width), bf16(width), bf16(experts, width), bf16(experts)
    router[1], bias[1] = router[0], bias[0]
    blocks = width // 32
    got = generation_glue.RouteBuffers(
        planes=torch.full((1, 4, blocks * 4), 77, dtype=torch.int32),
        factors=torch.full((blocks,), float("nan")),
        logits=torch.full((experts,), float("nan")),
        counter=torch.zeros(1, dtype=torch.int32),
        indices=torch.full((1, 4), -7, dtype=torch.int32),
        weights=torch.full((1, 4), float("nan")),
    )
    generation_glue.launch_route(x, (norm, 1e-5), router, bias, got)
    normed = x.double() * norm.double() / (x.double().square().mean() + 1e-5).sqrt()
    exact = router.double() @ normed + bias.double()
    values, best = exact.sort(descending=True, stable=True)
    pairs = got.planes.view(torch.int16).view(torch.float16).view(4, -1, 2).float()
    back = pairs.permute(1, 2, 0).reshape(blocks, 32) * got.factors[:, None] * 2.0**-14
    return {
        "words": error(back.flatten(), normed),
        "logits": error(got.logits, exact),
        "wrong_experts": float((got.indices[0] != best[:4]).sum()),
        "weights": error(got.weights[0], values[:4].softmax(0)),
        "left_in_counter": float(got.counter),
    }


def run_head(rows: int, width: int) -> dict[str, float]:
    """Check the head's logits, its token, and that token's embedding in the next step."""
    x, weight = bf16(width), bf16(rows, width)
    weight[rows - 1] = x
    weight[rows // 2] = x  # a tie: the first one wins
    out, best = torch.full((rows,), float("nan")), torch.full((1,), -(1 << 63))
    generation_glue.launch_head(x, weight, None, out, best=best)
    token, is_nan = decode_token(int(best)), not holds_finite(int(best))
    logits = float("nan") if is_nan else error(out, weight.double() @ x.double())
    position, hidden = torch.tensor([41]), torch.full((width,), float("nan"))
    generation_glue.launch_embed(best, position, weight, hidden)
    x[3] = float("nan")
    generation_glue.launch_head(x, weight, None, out, best=best)
    return {
        "logits": logits,
        "wrong_token": float(token != rows // 2),
        "hidden": error(hidden, weight[rows // 2]),
        "wrong_position": float(position != 42),
        "nan_not_seen": float(holds_finite(int(best))),
    }


def main() -> None:
    patch_once()
    triton.language.inline_asm_elementwise = emulate_asm  # pyright: ignore[reportAttributeAccessIssue]
    torch.manual_seed(0)
    results: dict[str, dict[str, float]] = {}
    for name, fmt in FORMATS.items():
        results[f"gemv {name}"] = run_gemv(fmt, 128, 1, (9, 4, 3))
        results[f"unpack {name}"] = {"wrong": count_wrong_weights(fmt, 11, 320)}
    results["gemv short last step"] = run_gemv(FORMATS["two_four"], 1088, 1, (5,))
    results["gemv three tokens"] = run_gemv(FORMATS["two_four"], 64, 3, (6, 2))
    results["experts one token"] = run_experts(1, 64, 32, 5, 4)
    results["experts four tokens"] = run_experts(4, 64, 96, 5, 1)
    results["experts more than one step"] = run_experts(1, 1056, 32, 2, 1)
    results["experts more routed tokens than warps"] = run_experts(2, 64, 96, 8, 6)
    results["wrong index of an expert"] = run_experts(2, 64, 32, 5, 4, wrong_index=True)
    results["attention full"] = run_attention(300, False, [0, 1, 63, 64, 150])
    results["attention window"] = run_attention(128, True, [0, 33, 127, 128, 200])
    results["route"] = run_route(6, 96)
    results["head"] = run_head(37, 64)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
