"""Which backend of the experts' pass serves how many rows: a measured table. No torch.

`packed` decodes weights in the products, `small` does so with tiles for a few rows, `decode`
expands a bounded chunk of experts first, which pays when many rows share it. `generation` is
forward only and takes at most 64 choices in bf16: a call that it cannot take is `small`'s. An
architecture on which nothing was measured takes the thresholds that the arithmetic suggests, and is
said to.
"""

from __future__ import annotations

from typing import NamedTuple

BACKENDS = ("generation", "small", "packed", "decode", "torch")
NO_LIMIT = 1 << 62


class Row(NamedTuple):
    """One line of the table: mean rows an expert up to which the backend is taken, and why."""

    up_to_rows: int
    backend: str
    evidence: str


# 32 experts of 2,880 / 2,880, top-4; forward + backward of the whole pass, balanced rows. Where the
# limits lie between the measured points is a guess.
MEASURED: dict[str, tuple[Row, ...]] = {
    "sm_90": (
        Row(1, "generation", "H200, forward: 1 token 0.032 ms, small 0.090; 8 tokens 0.136, 0.263"),
        Row(16, "small", "H200, 1 row an expert: 0.52 ms, packed 0.97"),
        Row(512, "packed", "H200, 128 rows an expert: 1.04 ms, decode 2.32; 512: 3.70, 3.72"),
        Row(NO_LIMIT, "decode", "not timed above 512 rows, where decoding is shared by more rows"),
    ),
}
_UNMEASURED = (
    Row(8, "small", "not timed on this architecture"),
    Row(512, "packed", "not timed on this architecture"),
    Row(NO_LIMIT, "decode", "not timed on this architecture"),
)


def choose_backend(architecture: str, entries: int, experts: int) -> Row:
    """The table's row for a call.

    Args:
        architecture: "cpu", or sm_ and the compute capability's digits, as in "sm_86".
        entries: tokens * top_k.
        experts: experts of the layer.
    """
    if architecture == "cpu":
        return Row(NO_LIMIT, "torch", "no CUDA device")
    for row in MEASURED.get(architecture, _UNMEASURED):
        if entries <= row.up_to_rows * experts:
            return row
    raise LookupError(f"no row for {architecture} with {entries} entries")
