"""The section on compression's quality of BENCHMARKS.md, from benchmarks/results/quality-*.json."""

from __future__ import annotations

from typing import Any

from benchmarks.compared.table import show, show_positions
from benchmarks.compared.verdicts import show_verdicts
from benchmarks.record import newest

TEXT = """
## What compression costs, and what fine-tuning recovers

`benchmarks/quality.py` on the proxy (benchmarks/proxy): attention in 2:4 or int4 or both, by
several methods and by stage 02's own ("ours"); then fine-tuned on conversations, with the same
data, steps and seeds. Means over seeds, ± their standard deviation. `rise` is that of perplexity on
held-out documents over the base's, in percent; `kl` (nats) and `top-1 agreement` compare every next
token with the base's; `accuracy` is that of multiple-choice items in hellaswag's format. `tuned
perplexity` and `tuned kl` are of held-out conversations of the fine-tuning data. `2:4 groups` is
the share of fours with at most two nonzero weights, `bytes` are MB of the whole checkpoint,
`seconds` those of compressing or of fine-tuning. The ceiling is the base, fine-tuned (`dense`).
The second table has what the first one decides: quotients of two rows' figures, taken seed by seed,
with their 95 % interval over seeds. A statement is within noise if its limit is inside of that; of
one seed the figure itself decides.
"""


def write_section() -> str:
    """Return the section's text for all machines; empty if there are no results."""
    found = newest("quality")
    if not found:
        return ""
    return TEXT + "".join(_write_machine(machine, found[machine]) for machine in found)


def _write_machine(machine: str, document: dict[str, Any]) -> str:
    title = (
        f"\n### {machine} (torch {document['versions']['torch']}, {document['date']}, "
        f"`{document['file']}`)\n\n"
    )
    parts = [title, show(document["rows"]), "\n", show_verdicts(document["rows"])]
    for metric in ("perplexity", "kl"):
        parts += [f"\n{metric} by position, before fine-tuning:\n\n"]
        parts.append(show_positions(document["rows"], metric))
    return "".join(parts)
