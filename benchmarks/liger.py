#!/usr/bin/env python3
"""Liger's kernels beside ours where both could serve gpt-oss, in the 20b's widths and bf16.

Norm, rotary embedding and loss, forward and backward: relative L2 errors against fp32 of the output
and of the inputs' gradients, and ms. `Liger` is what transformers' `use_liger_kernel` installs: its
norm rounds before the product with the weight, as in Llama, where gpt-oss rounds once. `Liger,
fp32` is the same kernel with its Gemma rounding, which is gpt-oss's. Liger's SwiGLU has another
formula than gpt-oss's, so only its error is shown: no time is reported for an arm whose error is
more than twice that of plain torch. Needs a CUDA device.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.command_line import add_result, command_of, has_device, machine_of
from benchmarks.neighbours import (
    EPS,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    VOCAB,
    draw,
    time_ms,
    torch_chunks,
)
from benchmarks.record import row, write
from sparselong.kernels.layer.cross_entropy import linear_cross_entropy
from sparselong.kernels.layer.norm import rms_norm
from sparselong.kernels.layer.norm_torch import rms_norm_torch
from sparselong.kernels.layer.rotary import rotate
from sparselong.kernels.layer.rotary_torch import rotate_torch

Arm = Callable[..., tuple[torch.Tensor, ...]]
Rows = list[dict[str, Any]]
ALLOWED = 2.0
"""Times plain torch's error, up to which an arm computes the same function."""
ROUNDING = 2.0**-9
"""Relative error of one rounding to bf16, which is always allowed."""


def run(arm: Arm, inputs: list[torch.Tensor], upstream: list[torch.Tensor]) -> tuple:
    """Return (outputs, gradients) of fresh inputs: Liger overwrites some in place."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    outputs = arm(*(t * 1 for t in leaves))  # as after a projection: no leaf, may be overwritten
    ups = [up.to(o.dtype, copy=True) for up, o in zip(upstream, outputs, strict=True)]
    return [o.detach() for o in outputs], torch.autograd.grad(outputs, leaves, ups)


def error(got: Any, wanted: Any) -> float:
    """Return the largest relative L2 error."""
    pairs = zip(got, wanted, strict=True)
    return max(float((g.float() - w.float()).norm() / w.float().norm()) for g, w in pairs)


def measure(
    case: dict, exact: Arm, arms: dict[str, Arm], inputs: list, upstream: list, timed: bool = True
) -> Rows:
    """Return rows of errors and ms; the first arm, plain torch, is the yardstick.

    Args:
        case: operation and tokens.
        exact: computes in fp32 from the inputs in fp32.
        arms: name → function of the inputs.
        inputs: bf16.
        upstream: gradients of the outputs.
        timed: whether any arm's time is of interest.
    """
    truth = run(exact, [t.float() for t in inputs], upstream)
    rows, limits = [], None
    for name, arm in arms.items():
        errors = [error(*pair) for pair in zip(run(arm, inputs, upstream), truth, strict=True)]
        limits = limits or [max(ALLOWED * value, ROUNDING) for value in errors]
        rows.append(row(case, name, "error_out", errors[0], "1"))
        rows.append(row(case, name, "error_gradients", errors[1], "1"))
        text = f"{case['operation']:10} {case['tokens']:6} {name:12}"
        text += "".join(f" {value:.1e}" for value in errors)
        if timed and all(e <= limit for e, limit in zip(errors, limits, strict=True)):
            ms = time_arm(arm, inputs, upstream)
            rows += [row(case, name, f"{what}_ms", value, "ms") for what, value in ms.items()]
            text += "".join(f"  {what} {value:.3f} ms" for what, value in ms.items())
        print(text, file=sys.stderr)
    return rows


def time_arm(arm: Arm, inputs: list, upstream: list) -> dict[str, float]:
    """Return ms of forward, and of forward and backward."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    free = [t.detach().clone() for t in inputs]
    with torch.no_grad():
        forward = time_ms(lambda: arm(*free))

    def both() -> object:
        # Views are no leaves, and Liger may overwrite what they show; the values do not matter.
        outputs = arm(*(t.view_as(t) for t in leaves))
        ups = [up.to(out.dtype) for up, out in zip(upstream, outputs, strict=True)]
        return torch.autograd.grad(outputs, leaves, ups)

    return {"forward": forward, "forward_backward": time_ms(both)}


def measure_norm(tokens: int) -> Rows:
    """Return rows of RMSNorm; the weight is frozen, as under LoRA."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    weight = 1 + draw(HIDDEN, scale=0.3)

    def liger(mode: str) -> Arm:
        return lambda x: (LigerRMSNormFunction.apply(x, weight, EPS, 0.0, mode, True, None),)

    arms: dict[str, Arm] = {
        "torch": lambda x: (rms_norm_torch(x, weight, EPS),),
        "ours": lambda x: (rms_norm(x, weight, EPS),),
        "Liger": liger("llama"),
        "Liger, fp32": liger("gemma"),
    }
    given = [draw(1, tokens, HIDDEN)], [draw(1, tokens, HIDDEN)]
    exact: Arm = lambda x: (rms_norm_torch(x, weight.float(), EPS),)  # noqa: E731
    return measure({"operation": "norm", "tokens": tokens}, exact, arms, *given)


def measure_rotary(tokens: int) -> Rows:
    """Return rows of the rotary embedding, with YaRN's scaling in cos and sin of half a head."""
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    q, k, dq, dk = (draw(1, tokens, n, HEAD_DIM).transpose(1, 2) for n in (HEADS, KV_HEADS) * 2)
    angle = torch.rand(1, tokens, HEAD_DIM // 2, device="cuda") * 100
    cos, sin = ((1.3466 * t).bfloat16() for t in (angle.cos(), angle.sin()))
    arms: dict[str, Arm] = {
        "torch": lambda q, k: rotate_torch(q, k, cos, sin),
        "ours": lambda q, k: rotate(q, k, cos, sin),
        "Liger": lambda q, k: liger_rotary_pos_emb(q, k, cos, sin),
    }
    exact: Arm = lambda q, k: rotate_torch(q, k, cos.float(), sin.float())  # noqa: E731
    return measure({"operation": "rotary", "tokens": tokens}, exact, arms, [q, k], [dq, dk])


def clamped_swiglu(gate_up: torch.Tensor) -> tuple[torch.Tensor]:
    """Return the activation of gpt-oss's experts, as transformers computes it."""
    gate, up = gate_up[..., ::2].clamp(max=7.0), gate_up[..., 1::2].clamp(-7.0, 7.0)
    return ((up + 1) * gate * torch.sigmoid(1.702 * gate),)


def measure_activation(tokens: int) -> Rows:
    """Return rows of the experts' activation: errors alone."""
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    gate_up = draw(tokens, 2 * HIDDEN, scale=2.0)

    def liger(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (LigerSiLUMulFunction.apply(x[:, ::2].contiguous(), x[:, 1::2].contiguous()),)

    case = {"operation": "activation", "tokens": tokens}
    arms: dict[str, Arm] = {"torch": clamped_swiglu, "Liger": liger}
    return measure(case, clamped_swiglu, arms, [gate_up], [draw(tokens, HIDDEN)], timed=False)


def measure_loss(tokens: int) -> Rows:
    """Return rows of the loss over all tokens and its gradient for the hidden states."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    weight = draw(VOCAB, HIDDEN, scale=3 * HIDDEN**-0.5)
    labels = torch.randint(0, VOCAB, (tokens,), device="cuda")
    fused: Any = liger_fused_linear_cross_entropy
    arms: dict[str, Arm] = {
        "torch": lambda h: (torch_chunks(h, weight, labels),),
        "ours": lambda h: (linear_cross_entropy(h, weight, labels),),
        "Liger": lambda h: (fused(h, weight, labels, reduction="sum"),),
    }

    @functools.cache
    def in_fp32() -> torch.Tensor:
        return weight.float()

    exact: Arm = lambda h: (torch_chunks(h, in_fp32(), labels),)  # noqa: E731
    upstream = [torch.tensor(1 / tokens, device="cuda")]
    case = {"operation": "loss", "tokens": tokens}
    return measure(case, exact, arms, [draw(tokens, HIDDEN)], upstream)


def main() -> None:
    """Measure all operations and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096, 16_384])
    add_result(parser)
    args = parser.parse_args()
    if not has_device(__file__):
        return
    machine, command = machine_of(args), command_of(__file__, args)
    if importlib.util.find_spec("liger_kernel") is None:
        print("benchmarks/liger.py needs liger_kernel: nothing measured")
        return
    rows: Rows = []
    for tokens in args.tokens:
        for operation in (measure_norm, measure_rotary, measure_activation, measure_loss):
            torch.manual_seed(0)
            rows += operation(tokens)
    print(write("liger", machine, command, rows, args.folder))


if __name__ == "__main__":
    main()
