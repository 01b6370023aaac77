"""The loss that packed batches must have: that of each conversation for itself, by transformers."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Mxfp4Config

ROWS = [
    [("user", f"Count to {n}."), ("assistant", " ".join(map(str, range(1, n + 1))))]
    for n in (3, 29, 11, 1, 40, 17)
]
MESSAGES = [{"messages": [{"role": role, "content": text} for role, text in row]} for row in ROWS]


def separate_loss(base: Path, rows: Sequence[Sequence[int]], learned: Sequence[Sequence[int]]):
    """Return the mean loss of the learned tokens, each row in a pass of its own, eager in fp32.

    Args:
        base: an upstream checkpoint.
        rows: the tokens of each conversation.
        learned: 1 for tokens that count; the first of a row never does.
    """
    model = AutoModelForCausalLM.from_pretrained(
        base,
        quantization_config=Mxfp4Config(dequantize=True),
        attn_implementation="eager",
    )
    model.float()  # transformers unpacks to bf16 whatever dtype it is given
    total, count = 0.0, 0
    for tokens, counts in zip(rows, learned, strict=True):
        ids = torch.tensor([tokens])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        mask = torch.tensor(counts[1:], dtype=torch.bool)
        total, count = total + losses[mask].sum().item(), count + int(mask.sum())
    return total / count
