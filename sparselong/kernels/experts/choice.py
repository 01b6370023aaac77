"""Measured table that selects the backend of an expert pass by rows per expert. No torch.

`packed` decodes weights inside the products; `small` does the same with tiles for a few rows.
`decode` expands a bounded chunk of experts first, which pays off when many rows share it.
`generation` is forward-only and takes at most 64 routed tokens in bf16; other calls fall back to
`small`. Architectures without measurements use thresholds estimated from the arithmetic, and their
evidence says so.
"""

from __future__ import annotations

from typing import NamedTuple

BACKENDS = ("generation", "small", "packed", "decode", "torch")
NO_LIMIT = 1 << 62


class Row(NamedTuple):
    """One row of the table: the largest mean rows per expert for a backend, and the evidence."""

    up_to_rows: int
    backend: str
    evidence: str


# 32 experts of 2,880 / 2,880, top-4; forward + backward of the whole pass, balanced routing. The
# position of each limit between two measured points is a guess.
MEASURED: dict[str, tuple[Row, ...]] = {
    "sm_90": (
        Row(1, "generation", "H200, forward: 1 token 0.032 ms, small 0.090; 8 tokens 0.136, 0.263"),
        Row(16, "small", "H200, 1 row per expert: 0.52 ms, packed 0.97"),
        Row(512, "packed", "H200, 128 rows per expert: 1.04 ms, decode 2.32; 512: 3.70, 3.72"),
        Row(NO_LIMIT, "decode", "not timed above 512 rows, where more rows share the decoding"),
    ),
}
_UNMEASURED = (
    Row(8, "small", "not timed on this architecture"),
    Row(512, "packed", "not timed on this architecture"),
    Row(NO_LIMIT, "decode", "not timed on this architecture"),
)


def choose_backend(architecture: str, entries: int, experts: int) -> Row:
    """Return the table's row for a call.

    Args:
        architecture: "cpu", or "sm_" and the digits of the compute capability, as in "sm_86".
        entries: number of routed tokens, tokens * top_k.
        experts: number of experts in the layer.
    """
    if architecture == "cpu":
        return Row(NO_LIMIT, "torch", "no CUDA device")
    for row in MEASURED.get(architecture, _UNMEASURED):
        if entries <= row.up_to_rows * experts:
            return row
    raise LookupError(f"no row for {architecture} with {entries} routed tokens")
