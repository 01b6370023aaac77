"""Training of the small model by transformers' Trainer or TRL's, on each form of batches."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, Trainer, TrainingArguments, default_data_collator
from transformers.data.data_collator import (
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
)

from tests.conftest import ROOT
from tests.examples.separate import MESSAGES

EXAMPLE = runpy.run_path(str(ROOT / "examples/transformers_trainer.py"))
FORMS = ("packing", "padding-free", "padding")
ROWS = 4
"""Of MESSAGES when they are packed."""


def train(
    front: str,
    trained: str,
    form: str,
    base: Path,
    data: Path,
    out: Path,
    steps: int,
    batch: int,
    dtype: torch.dtype = torch.float32,
    **changed: Any,
) -> Any:
    """Train on MESSAGES, all tokens supervised, and return the trainer.

    Args:
        front: transformers or TRL.
        trained: lora, dense or full.
        form: of the batches, one of FORMS.
        base: an upstream checkpoint.
        data: MESSAGES as a file.
        out: where the trainer saves.
        steps: steps of training.
        batch: conversations a process and step; packed, as great a part of the rows, at least one.
        dtype: of the parameters.
        changed: other training arguments than the example's, or than `_arguments`.
    """
    torch.manual_seed(0)  # of the adapters
    if front == "transformers" and form == "padding-free" and not changed:
        return EXAMPLE["train"](str(base), data, out, trained, steps, batch)
    make = _trl if front == "TRL" else _transformers
    model = EXAMPLE["open_model"](str(base), trained)
    model = model if dtype == torch.float32 else model.to(dtype)
    if form == "packing":
        batch = max(1, ROWS * batch // len(MESSAGES))
    trainer = make(model, form, base, data, _arguments(out, steps, batch) | changed)
    trainer.train()
    return trainer


def losses_of(trainer: Any) -> list[float]:
    """Return the loss of each step."""
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def tokenize(base: Path) -> list[list[int]]:
    """Return the tokens of each conversation of MESSAGES."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    return tokenizer.apply_chat_template([row["messages"] for row in MESSAGES])["input_ids"]


def _arguments(out: Path, steps: int, batch: int) -> dict[str, Any]:
    return {
        **{"output_dir": str(out), "max_steps": steps, "per_device_train_batch_size": batch},
        **{"learning_rate": 1e-5, "logging_steps": 1, "save_strategy": "no", "report_to": "none"},
        **{"bf16": False, "gradient_checkpointing": False},
    }


def _transformers(model: Any, form: str, base: Path, data: Path, arguments: dict[str, Any]):
    rows = tokenize(base)
    collate: Any = DataCollatorWithFlattening()
    dataset: list[dict[str, list[int]]] = [{"input_ids": row} for row in rows]
    if form == "packing":
        dataset, collate = _pack(rows), default_data_collator
    elif form == "padding":
        collate = DataCollatorForLanguageModeling(AutoTokenizer.from_pretrained(base), mlm=False)
    return Trainer(model, TrainingArguments(**arguments), collate, dataset)  # type: ignore[arg-type]


def _pack(rows: list[list[int]]) -> list[dict[str, list[int]]]:
    """Lay the conversations end to end in ROWS rows; what fills up a row is not learned."""
    packed = []
    longest = max(sum(map(len, rows[n::ROWS])) for n in range(ROWS))
    for n in range(ROWS):
        rest = [0] * (longest - sum(map(len, rows[n::ROWS])))
        documents = [*rows[n::ROWS], rest]
        labels = [[-100, *row[1:]] for row in rows[n::ROWS]]
        packed.append(
            {
                "input_ids": sum(documents, []),
                "position_ids": [place for row in documents for place in range(len(row))],
                "labels": [*sum(labels, []), *[-100] * len(rest)],
            }
        )
    return packed


def _trl(model: Any, form: str, base: Path, data: Path, arguments: dict[str, Any]):
    from datasets import Dataset
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    settings = SFTConfig(
        **arguments,
        packing=form == "packing",
        padding_free=form == "padding-free",
        max_length=280 if form == "packing" else None,
        router_aux_loss_coef=0.0,
    )
    adapters = None
    if hasattr(model, "peft_config"):  # TRL attaches the adapters and computes the loss itself
        adapters = model.peft_config["default"]
        model = model.unload()
        del model.forward
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    return SFTTrainer(
        model,
        settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=adapters,
    )
