"""Measured table of the attention backends that serve a call, fastest first. Imports no torch.

A row is found by architecture, layer kind, packed or not, and number of keys. It lists backends in
the order of their measured forward + backward time. The first one that accepts the call is used,
except that cuDNN and FlashAttention-4 are skipped where their first call would cost more than they
save (`op.choose_backend`). Rows of an architecture without measurements say so. Their order follows
from the arithmetic: FlashAttention-2 was written for these GPUs, and the Triton kernel reads fewer
keys for a window.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparselong.kernels.attention.installed import refuse_flash_attn_4

BACKENDS = ("triton", "torch_flash", "torch_cudnn", "flash_attn", "flash_attn_4", "torch")
NO_LIMIT = 1 << 62
NOT_CHOSEN_DETERMINISTIC = ("torch_cudnn", "flash_attn_4")
"""cuDNN has no deterministic backward pass, and FlashAttention-4's was not timed."""


@dataclass(frozen=True)
class Row:
    """One row of the table: the calls it serves, backends fastest first, and the evidence."""

    kind: str
    packed: bool
    up_to_keys: int
    order: tuple[str, ...]
    evidence: str


# Forward + backward, bf16, 64/8 heads, head_dim 64, batch 1: benchmarks/results/attention-h200-*.
MEASURED: dict[str, tuple[Row, ...]] = {
    "sm_90": (
        Row(  # shorter than any length at which flash_attn_4 was timed
            *("full", False, 4095, ("torch_cudnn", "triton", "torch_flash")),
            "H200, 16,384 tokens: torch_cudnn 17.6 ms, triton 19.6, torch_flash 29.2",
        ),
        Row(
            *("full", False, NO_LIMIT, ("flash_attn_4", "torch_cudnn", "triton", "torch_flash")),
            "H200, 16,384 tokens: flash_attn_4 14.3 ms, torch_cudnn 18.6, triton 20.6; "
            "another day torch_cudnn 17.6, triton 19.6, torch_flash 29.2",
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
    """Return the table's row for a call.

    Args:
        architecture: "cpu", or sm_ and the compute capability's digits, as in "sm_86".
        kind: "full" or "window".
        packed: whether documents are packed.
        keys: keys in a batch row.

    Raises:
        LookupError: no row serves the call.
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
    """Return the backend of each layer kind in bf16 training with `backend=None`, and why.

    The health report shows it: {"full": "torch_cudnn (16,384 ...)", "window": "triton (...)"}.
    """
    unusable = NOT_CHOSEN_DETERMINISTIC if deterministic else ()
    if refuse_flash_attn_4() is not None:
        unusable += ("flash_attn_4",)
    descriptions = {}
    for kind in ("full", "window"):
        row = rank_backends(architecture, kind, packed, keys)
        usable = [name for name in row.order if name not in unusable]
        descriptions[kind] = f"{usable[0]} ({row.evidence})"
    return descriptions
