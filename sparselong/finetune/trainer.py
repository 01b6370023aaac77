"""Run stage 03: prepare the data, train with Axolotl, check the receipt, publish the results.

    03_finetune/axolotl.yaml      generated
                supervision.txt   some conversations with their supervised tokens marked
                receipt.json      what the plugin replaced and attached; required for a result
                metrics.jsonl     a row per logged step and per evaluation
                checkpoints/      checkpoint-N: adapter, masks, scales, optimizer, random state
                best -> checkpoints/checkpoint-N
                model/  adapter/  the results
                loss.png

If interrupted, the same command resumes from the last complete checkpoint. It removes incomplete
checkpoint directories and the rows of metrics.jsonl after that checkpoint's step. If only baking
was interrupted, only baking is repeated.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from sparselong.data import conversations
from sparselong.errors import StageError
from sparselong.files import point_to, write_atomically
from sparselong.finetune import axolotl_config, plot, state
from sparselong.finetune.training_run import (
    AXOLOTL_YAML,
    BAKED,
    METRICS,
    RECEIPT,
    SUPERVISION,
    TRAINED,
    TrainingRun,
    trainer_arguments,
)
from sparselong.processes import find_world, train_together
from sparselong.run import Stage

_CALLBACKS = ("MaskUpkeep", "Recomputation", "RouterWatch", "Metrics")


def finetune(stage: Stage) -> None:
    """Fine-tune stage 02's model, and write `model/` and `adapter/`.

    Raises:
        StageError: the machine or the data does not fit the config, or training failed.
    """
    here = find_world(stage.config).here
    axolotl_config.refuse_unsupported(stage.config, torch.cuda.device_count(), here)
    data = conversations.prepare(stage.config, stage.run_dir)
    if not (stage.dir / BAKED).exists():
        _train(stage, data)
    earlier = stage.run_dir / "02_compress"
    stage.inputs = [earlier / "model", earlier / "masters", data.train, data.validation]
    _publish(stage)


def _train(stage: Stage, data: conversations.DataFiles) -> None:
    run = TrainingRun.of_stage(stage)
    remove_unfinished_checkpoints(stage, run.checkpoints)
    resume_from = find_last_checkpoint(run.checkpoints)
    if resume_from is None:  # training starts over
        (stage.dir / TRAINED).unlink(missing_ok=True)
    rows = keep_rows(stage.dir / METRICS, state.step_of(resume_from) if resume_from else None)
    if resume_from:
        stage.log(f"resuming from {resume_from.name} ({rows} rows of {METRICS} kept)")
    (stage.dir / RECEIPT).unlink(missing_ok=True)
    with data.train.open(encoding="utf-8") as file:
        conversations_count = sum(1 for _ in file)
    document = axolotl_config.build(run, data, resume_from, conversations_count)
    text = _HEADER + yaml.safe_dump(document, sort_keys=False)
    write_atomically(stage.dir / AXOLOTL_YAML, text)
    world = find_world(stage.config)
    processes = f" in {world.size} processes" if world.size > 1 else ""
    stage.log(f"starting Axolotl{processes} (importing it takes a while)")
    train_together(stage, trainer_arguments(stage))
    asked = {
        "processes": world.size,
        "attention": axolotl_config.attention_of(stage.config),
    }
    try:
        check_receipt(stage, asked)
    except StageError:
        (stage.dir / BAKED).unlink(missing_ok=True)  # so that a rerun does not publish it
        raise


_HEADER = "# Generated from config.yaml by sparselong/finetune/axolotl_config.py; edits are lost.\n"


def remove_unfinished_checkpoints(stage: Stage, checkpoints: Path) -> None:
    """Remove incomplete checkpoint directories."""
    for path in sorted(checkpoints.glob("checkpoint-*"), key=state.step_of):
        if not state.is_whole(path):
            stage.log(f"removing the incomplete {path.name}")
            shutil.rmtree(path)


def find_last_checkpoint(checkpoints: Path) -> Path | None:
    """Return the latest complete checkpoint, or None if there is none."""
    whole = filter(state.is_whole, checkpoints.glob("checkpoint-*"))
    return max(whole, key=state.step_of, default=None)


def keep_rows(path: Path, last_step: int | None) -> int:
    """Drop metrics rows after `last_step` (all rows if None); return how many are left."""
    rows = [row for row in read_rows(path) if last_step is not None and row["step"] <= last_step]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
    return len(rows)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl, without an incomplete last line."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def check_receipt(stage: Stage, trained_with: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plugin's receipt.

    Args:
        stage: stage 03.
        trained_with: more that the receipt must say; a continued run may ask for something else.

    Raises:
        StageError: there is no receipt, or a layer, callback or setting is missing from it: Axolotl
            trained something else.
    """
    path = stage.dir / RECEIPT
    receipt = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    missing = [name for name in _CALLBACKS if name not in receipt.get("callbacks", ())]
    replaced = {name.rpartition(".")[2] for name in receipt.get("modules_replaced", ())}
    lora = stage.config.lora
    extra = {"experts": bool(lora.expert_targets), "router": lora.router}
    targets = {*lora.target_modules, *(name for name, asked in extra.items() if asked)}
    missing += sorted(targets - replaced)
    attends = {
        **trained_with,
        "attention_backend": stage.config.attention_backend,
        "deterministic": stage.config.deterministic,
    }
    missing += [f"{key} {asked}" for key, asked in attends.items() if receipt.get(key) != asked]
    if missing or not (stage.dir / BAKED).exists():
        raise StageError(
            "Axolotl ran without this project's plugin, or did not finish",
            f"{path.name} with every target module and callback, and {BAKED}",
            f"missing: {', '.join(missing)}" if missing else f"no {BAKED}",
            f"look for 'Failed to load plugin' in {stage.dir / 'log.txt'}",
        )
    return receipt


def _publish(stage: Stage) -> None:
    receipt = check_receipt(stage, {})
    baked = json.loads((stage.dir / BAKED).read_text(encoding="utf-8"))
    rows = read_rows(stage.dir / METRICS)
    point_to(stage.dir / "best", f"checkpoints/{baked['best_checkpoint']}", stage.log)
    train = [row for row in rows if "loss" in row]
    curve = {row["step"]: row["eval_perplexity"] for row in rows if "eval_perplexity" in row}
    plot.draw(rows, baked["mask_updates"], baked["best_step"], stage.dir / "loss.png")
    stage.peak_bytes |= baked["peak_bytes"]
    stage.metrics |= {
        "steps": baked["steps"],
        "train_loss": train[-1]["loss"] if train else math.nan,
        "eval_perplexity": curve,
        "best_step": baked["best_step"],
        "best_eval_perplexity": math.exp(baked["best_eval_loss"]),
        "tokens": train[-1]["tokens"] if train else 0,
        "tokens_per_second": statistics.median(row["tokens_per_second"] for row in train),
        "mask_updates": baked["mask_updates"],
        "two_four_conforming": baked["two_four_conforming"],
        "keep_attention": receipt["keep_attention"],
        "keep_experts": receipt["keep_experts"],
        "trainable_parameters": receipt["trainable_parameters"],
        "supervised_token_fraction": receipt["supervised_token_fraction"],
        "peak_host_bytes": baked["peak_bytes"]["host"],
        "peak_device_bytes": {k: v for k, v in baked["peak_bytes"].items() if k != "host"},
    }
    if "expert_rounding" in baked:
        stage.metrics |= {
            "expert_rounding": baked["expert_rounding"],
            "baked_eval_perplexity": math.exp(baked["baked_eval_loss"]),
        }
    names = ("model", "adapter", AXOLOTL_YAML, RECEIPT, METRICS, "loss.png", SUPERVISION)
    stage.outputs = [stage.dir / name for name in names]
