"""Print the learning rates of schedules that Axolotl makes from our YAML, as JSON.

    python -m tests.finetune.axolotl_schedules '{"NAME": ["key=value", …], …}'

Each schedule runs STEPS steps of an optimizer, once in one go and once interrupted in the middle,
with its state and the optimizer's put into new ones through a file, as a checkpoint's are.
"""

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from axolotl.core.builders.base import TrainerBuilderBase
from axolotl.core.training_args import AxolotlTrainingArguments
from axolotl.utils.dict import DictDefault
from transformers.optimization import GreedyLR

from sparselong.config.schema import load
from sparselong.finetune.axolotl_config import build
from sparselong.finetune.axolotl_plugin import MaskedTrainer
from sparselong.finetune.training_run import TrainingRun
from tests.conftest import ROOT

STEPS, PEAK = 40, 1e-3
LOSSES = [3.0, 2.0, 2.5, 2.5, 2.5, 1.9, 1.8, 1.7, 1.7, 1.7]
"""Validation losses, one after every fourth step."""


def start(document: dict) -> tuple[Any, Any]:
    """Return an optimizer and the schedule that our trainer makes of the generated YAML."""
    arguments: dict[str, Any] = {}
    cfg = DictDefault(document)
    TrainerBuilderBase._configure_scheduler(SimpleNamespace(cfg=cfg), arguments)  # type: ignore[arg-type]
    trainer = object.__new__(MaskedTrainer)
    trainer.args = AxolotlTrainingArguments(
        output_dir="out",
        eval_strategy="steps",
        learning_rate=cfg.learning_rate,
        cosine_min_lr_ratio=cfg.cosine_min_lr_ratio,
        warmup_steps=cfg.warmup_ratio,
        **arguments,
    )
    trainer.lr_scheduler = None
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    trainer.optimizer = torch.optim.AdamW([weight], lr=cfg.learning_rate)
    trainer.create_scheduler(STEPS)
    return trainer.optimizer, trainer.lr_scheduler


def run(optimizer: Any, schedule: Any, steps: range) -> list[float]:
    """Return the learning rates of some steps."""
    rates = []
    waits = isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau | GreedyLR)
    for step in steps:
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        if not waits:
            schedule.step()
        elif step % 4 == 3:
            schedule.step(LOSSES[step // 4])
    return rates


def resume(document: dict) -> list[float]:
    """Return the learning rates of all steps, with an interruption after half of them."""
    one = start(document)
    rates = run(*one, range(STEPS // 2))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in one], file)
    file.seek(0)
    other = start(document)
    for part, state in zip(other, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    return rates + run(*other, range(STEPS // 2, STEPS))


def main() -> None:
    """Print the learning rates by schedule: of an uninterrupted and of a resumed run."""
    found = {}
    for name, overrides in json.loads(sys.argv[1]).items():
        given = [f"training.lr_scheduler={name}", f"training.learning_rate={PEAK}", *overrides]
        config = load(ROOT / "configs/tiny.yaml", given)
        document = build(TrainingRun(Path("/runs/a"), config), None)
        found[name] = [run(*start(document), range(STEPS)), resume(document)]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
