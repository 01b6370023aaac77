"""The section on the sizes of compressed models, in every combination of formats.

They come from the names, dtypes and shapes of the tensors that stage 02 stores, which it compares
with its files (`sparselong/checkpoint/layout.py`).
"""

from __future__ import annotations

from typing import Any, get_args

from transformers import GptOssConfig

from sparselong.compress.report import MASTERS, Sizes, predict
from sparselong.config import schema
from sparselong.memory import PUBLISHED
from sparselong.model import SparseLongConfig

TEXT = """
## Sizes in every combination

Bytes of the tensors that stage 02 writes for the published models (GB are 10⁹ bytes; headers,
tokenizer and config files are not counted), by the table of names, dtypes and shapes with which it
compares its files. Bits are those of a group's weights, biases and sinks together, scales and 2:4
patterns included. The masters lie beside the model, for stage 03. `2:4` keeps two of every four
weights. Half of the experts is `experts.keep` 16 for 20b and 64 for 120b, which is experimental.
"""
_PLAIN = (16, "none", 64)


def write_section() -> str:
    """Return the section's text."""
    return "\n".join([TEXT, *_write_groups(), "", "Whole models:\n", *_write_models(), ""])


def dense_forms() -> list[tuple[int, str, int]]:
    """Return bits, sparsity and group size of every form of attention that the config allows.

    At 16 bits there are no groups; the largest size stands for all.
    """

    def choices(name: str) -> tuple[Any, ...]:
        return get_args(schema.SharedDenseSection.model_fields[name].annotation)

    groups = choices("group_size")
    return [
        (bits, sparsity, group)
        for bits in choices("weight_bits")
        for sparsity in choices("sparsity")
        for group in (groups if bits < 16 else (max(groups),))
    ]


def expert_forms() -> tuple[str, ...]:
    """Return every form of experts that the config allows."""
    return get_args(schema.ExpertsSection.model_fields["sparsity"].annotation)


def size(model: str, dense: tuple[int, str, int], sparsity: str, share: int = 1) -> Sizes:
    """Return the sizes of a published model.

    Args:
        model: a name in `PUBLISHED`.
        dense: one of `dense_forms`.
        sparsity: one of `expert_forms`.
        share: 2 keeps half of the experts, 1 all.
    """
    shape = PUBLISHED[model]
    sizes: dict[str, Any] = {
        **{"num_hidden_layers": shape.layers, "num_local_experts": shape.experts // share},
        **{"hidden_size": shape.hidden, "intermediate_size": shape.intermediate},
        **{"num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads},
        **{"head_dim": shape.head_dim, "vocab_size": shape.vocab},
    }
    formats: tuple[Any, ...] = (*dense, sparsity)
    return predict(GptOssConfig(**sizes), SparseLongConfig(*formats))


def _write_groups() -> list[str]:
    """Return a row for each form of each group of weights, with bits and bytes."""
    rows = [(f"attention, {_name(dense)}", "attention", dense, "none") for dense in dense_forms()]
    rows += [(f"experts, {_name_experts(one)}", "experts", _PLAIN, one) for one in expert_forms()]
    others = ("embedding", "lm_head", "router_and_norms")
    rows += [(group.replace("_", " "), group, _PLAIN, "none") for group in others]
    rows.append(("masters of packed attention, bf16", MASTERS, dense_forms()[0], "none"))
    head = [f"{_short(model)}, {unit}" for model in PUBLISHED for unit in ("bits", "GB")]
    lines = [_row(["weights", *head]), _row(["---"] * (1 + len(head)))]
    for text, group, dense, sparsity in rows:
        cells = []
        for model in PUBLISHED:
            found = size(model, dense, sparsity)
            cells += [f"{found.bits_per_weight[group]:.3f}", f"{found.bytes[group] / 1e9:.3f}"]
        lines.append(_row([text, *cells]))
    return lines


def _write_models() -> list[str]:
    """Return a row for each form of attention, with whole sizes in GB."""
    columns = [
        (model, sparsity, share)
        for model in PUBLISHED
        for share in (1, 2)
        for sparsity in expert_forms()
    ]
    head = [
        f"{_short(model)}, {_name_experts(sparsity)}" + ", half of the experts" * (share == 2)
        for model, sparsity, share in columns
    ]
    lines = [_row(["attention", *head]), _row(["---"] * (1 + len(head)))]
    for dense in dense_forms():
        sizes = [size(model, dense, sparsity, share) for model, sparsity, share in columns]
        lines.append(_row([_name(dense), *(f"{each.model_bytes / 1e9:.1f}" for each in sizes)]))
    return lines


def _name(dense: tuple[int, str, int]) -> str:
    bits, sparsity, group = dense
    text = "bf16" if bits == 16 else f"int{bits}"
    text += " 2:4" if sparsity == "2:4" else ""
    return text if bits == 16 else f"{text}, groups of {group}"


def _name_experts(sparsity: str) -> str:
    return "MXFP4" if sparsity == "none" else f"MXFP4 {sparsity}"


def _short(model: str) -> str:
    return model.rpartition("-")[2]


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
