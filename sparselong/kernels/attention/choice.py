"""Which attention backend serves which call: a measured table. No torch.

Keys are architecture, layer kind, packed or not, and keys up to a size; values are backends in the
order of their measured forward + backward time. The first that can take the call does, but cuDNN
only where lengths come again (`attention.choose_backend`). An architecture on which nothing was
measured is said to be so, and takes the order that the arithmetic suggests: FlashAttention-2 was
written for it, and the window kernel reads less.
"""

from __future__ import annotations

from dataclasses import dataclass

BACKENDS = ("triton", "torch_flash", "torch_cudnn", "flash_attn", "torch")
NO_LIMIT = 1 << 62


@dataclass(frozen=True)
class Row:
    """One line of the table: calls it serves, backends fastest first, and the evidence."""

    kind: str
    packed: bool
    up_to_keys: int
    order: tuple[str, ...]
    evidence: str


# Forward + backward, bf16, 64/8 heads, head_dim 64, batch 1: benchmarks/results/attention-h200-*.
MEASURED: dict[str, tuple[Row, ...]] = {
    "sm_90": (
        Row(
            *("full", False, NO_LIMIT, ("torch_cudnn", "triton", "torch_flash")),
            "H200, 16,384 tokens: torch_cudnn 17.6 ms, triton 19.6, torch_flash 29.2",
        ),
        Row(
            *("full", True, NO_LIMIT, ("triton", "torch_flash")),
            "H200, 16,384 tokens, documents of 1,024 on average: triton 1.98 ms, torch_flash 3.9",
        ),
        Row(
            *("window", False, NO_LIMIT, ("triton", "torch_flash")),
            "H200, 16,384 tokens, window 128: triton 0.72 ms, torch_flash 2.05",
        ),
        Row(
            *("window", True, NO_LIMIT, ("triton", "torch_flash")),
            "H200, 16,384 tokens, window 128, documents: triton 0.75 ms, torch_flash 2.24",
        ),
    ),
}
_NOT_TIMED = "not timed on this architecture"
_UNMEASURED = (
    Row("full", False, NO_LIMIT, ("torch_flash", "triton"), _NOT_TIMED),
    Row("full", True, NO_LIMIT, ("torch_flash", "triton"), _NOT_TIMED),
    Row("window", False, NO_LIMIT, ("triton", "torch_flash"), _NOT_TIMED),
    Row("window", True, NO_LIMIT, ("triton", "torch_flash"), _NOT_TIMED),
)


def rank_backends(architecture: str, kind: str, packed: bool, keys: int) -> Row:
    """The table's row for a call.

    Args:
        architecture: "cpu", or sm_ and the compute capability's digits, as in "sm_86".
        kind: "full" or "window".
        packed: whether documents are packed.
        keys: keys of a batch row.
    """
    if architecture == "cpu":
        return Row(kind, packed, NO_LIMIT, ("torch",), "no CUDA device")
    for row in MEASURED.get(architecture, _UNMEASURED):
        if (row.kind, row.packed) == (kind, packed) and keys <= row.up_to_keys:
            return row
    raise LookupError(f"no row for {architecture} {kind} packed={packed} {keys}")


def describe_choice(
    architecture: str, packed: bool, keys: int, deterministic: bool = False
) -> dict[str, str]:
    """For each layer kind, the backend that `backend=None` takes in training with bf16, and why.

    For the health report: {"full": "torch_cudnn (H200, ...)", "window": "triton (...)"}.
    """
    told = {}
    for kind in ("full", "window"):
        row = rank_backends(architecture, kind, packed, keys)
        able = [name for name in row.order if not (deterministic and name == "torch_cudnn")]
        told[kind] = f"{able[0]} ({row.evidence})"
    return told
