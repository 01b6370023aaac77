"""Which of the base's experts a checkpoint has, as its config.json says.

Stage 02 adds the key if `experts.keep` is set; exports in transformers' forms carry it along, so a
person and a later run can tell which experts these are:

    "sparselong_experts": {"base": 128, "kept": ["0-3 5 8-9 …", …]}        a text for each layer
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sparselong.checkpoint.checkpoint import Checkpoint, same_bytes, same_rows
from sparselong.memory import DROPPED_EXPERTS

_EXPERTS = ".mlp.experts."
_PARTS = (_EXPERTS, ".mlp.router.")


def describe_kept(document: Mapping[str, Any], experts: int, kept: list[str]) -> dict[str, Any]:
    """Return the keys of config.json that differ from the base's.

    Args:
        document: the base's config.json.
        experts: number of experts in a layer of the base.
        kept: those that are kept in each layer, as from `show_ranges`.
    """
    count = len(read_ranges(kept[0]))
    names = ("num_local_experts", "num_experts")  # transformers reads either
    given = {name: count for name in names if name in document}
    return {**given, DROPPED_EXPERTS: {"base": experts, "kept": kept}}


def read_kept(model: Checkpoint, base: Checkpoint) -> list[list[int]] | None:
    """Return the base's experts that each layer of a model has; None if it has all of them.

    Args:
        model: a model of stage 02 or 03, or an export of it.
        base: its base, from which an earlier run may have dropped experts.
    """
    found = model.config.get(DROPPED_EXPERTS)
    if found is None or found == base.config.get(DROPPED_EXPERTS):
        return None
    return [read_ranges(text) for text in found["kept"]]


def has_expert_rows(name: str) -> bool:
    """Return whether a tensor has a row for each expert: those of experts, and of the router."""
    return any(part in name for part in _PARTS)


def same_base_bytes(model: Checkpoint, base: Checkpoint, name: str) -> bool:
    """Return whether a tensor's stored bytes are the base's, of the experts that the model has."""
    kept = read_kept(model, base) if has_expert_rows(name) else None
    if kept is None:
        return same_bytes(model, base, name)
    return same_rows(model, base, name, kept[int(name.split(".")[2])])


def show_ranges(numbers: Iterable[int]) -> str:
    """Return ascending numbers as text: `0-3 5 8-9`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return " ".join("-".join(map(str, run)) for run in runs)


def read_ranges(text: str) -> list[int]:
    """Return the numbers that `show_ranges` wrote."""
    runs = ([int(end) for end in run.split("-")] for run in text.split())
    return [number for run in runs for number in range(run[0], run[-1] + 1)]
