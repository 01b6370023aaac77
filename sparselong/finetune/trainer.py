"""Stage 03 from config to manifest: prepare, train through Axolotl, check, publish.

    03_finetune/axolotl.yaml      generated
                supervision.txt   which tokens are learned from
                receipt.json      what the plugin replaced and attached; no receipt, no result
                metrics.jsonl     a row per logged step and per evaluation
                checkpoints/      checkpoint-N: adapter, masks, scales, optimizer, random state
                best -> checkpoints/checkpoint-N
                model/  adapter/  the end products
                loss.png

After a kill the same command goes on from the last whole checkpoint: directories of checkpoints
that were not written to their end are removed, and rows of metrics.jsonl behind that checkpoint's
step with them. When training was over and only baking was interrupted, only baking is done.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
from pathlib import Path
from typing import Any

import torch
import yaml

from sparselong.data import conversations
from sparselong.errors import StageError
from sparselong.files import write_atomically
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
    """Fine-tune stage 02's model and leave `model/` and `adapter/`.

    Raises:
        StageError: the machine or the data does not fit the config, or training failed; the message
            says what to do.
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
    if resume_from is None:  # whatever was trained is gone
        (stage.dir / TRAINED).unlink(missing_ok=True)
    rows = keep_rows(stage.dir / METRICS, state.step_of(resume_from) if resume_from else None)
    if resume_from:
        stage.log(f"going on from {resume_from.name} ({rows} rows of {METRICS} kept)")
    (stage.dir / RECEIPT).unlink(missing_ok=True)
    with data.train.open(encoding="utf-8") as file:
        conversations_count = sum(1 for _ in file)
    document = axolotl_config.build(run, data, resume_from, conversations_count)
    text = _HEADER + yaml.safe_dump(document, sort_keys=False)
    write_atomically(stage.dir / AXOLOTL_YAML, text)
    world = find_world(stage.config)
    processes = f" in {world.size} processes" if world.size > 1 else ""
    stage.log(f"starting Axolotl{processes} (its imports take a while)")
    train_together(stage, trainer_arguments(stage))
    check_receipt(stage)


_HEADER = "# Generated from config.yaml by sparselong/finetune/axolotl_config.py; edits are lost.\n"


def remove_unfinished_checkpoints(stage: Stage, checkpoints: Path) -> None:
    """Remove the checkpoints that were not written to their end."""
    for path in sorted(checkpoints.glob("checkpoint-*"), key=state.step_of):
        if not state.is_whole(path):
            stage.log(f"removing {path.name}, which was not written to its end")
            shutil.rmtree(path)


def find_last_checkpoint(checkpoints: Path) -> Path | None:
    """Return the whole checkpoint of the latest step, or None if there is none."""
    whole = filter(state.is_whole, checkpoints.glob("checkpoint-*"))
    return max(whole, key=state.step_of, default=None)


def keep_rows(path: Path, last_step: int | None) -> int:
    """Keeps metrics rows up to a step (none for None); returns how many."""
    rows = [row for row in read_rows(path) if last_step is not None and row["step"] <= last_step]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
    return len(rows)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; a last line cut off by a kill is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def check_receipt(stage: Stage) -> dict[str, Any]:
    """The plugin's receipt.

    Raises:
        StageError: there is none, or it does not account for every layer and callback: Axolotl has
            trained something else.
    """
    path = stage.dir / RECEIPT
    receipt = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    missing = [name for name in _CALLBACKS if name not in receipt.get("callbacks", ())]
    replaced = {name.rpartition(".")[2] for name in receipt.get("modules_replaced", ())}
    lora = stage.config.lora
    beside = {"experts": bool(lora.expert_targets), "router": lora.router}
    targets = {*lora.target_modules, *(name for name, asked in beside.items() if asked)}
    missing += sorted(targets - replaced)
    attends = {
        "processes": find_world(stage.config).size,
        "attention": axolotl_config.attention_of(stage.config),
        "attention_backend": stage.config.attention_backend,
        "deterministic": stage.config.deterministic,
    }
    missing += [f"{key} {asked}" for key, asked in attends.items() if receipt.get(key) != asked]
    if missing or not (stage.dir / BAKED).exists():
        raise StageError(
            "Axolotl has run without this project's plugin, or not to its end",
            f"{path.name} with every target module and callback, and {BAKED}",
            f"not accounted for: {', '.join(missing)}" if missing else f"no {BAKED}",
            f"look for 'Failed to load plugin' in {stage.dir / 'log.txt'}",
        )
    return receipt


def _publish(stage: Stage) -> None:
    receipt = check_receipt(stage)
    baked = json.loads((stage.dir / BAKED).read_text(encoding="utf-8"))
    rows = read_rows(stage.dir / METRICS)
    best = stage.dir / "best"
    best.unlink(missing_ok=True)
    best.symlink_to(Path("checkpoints") / baked["best_checkpoint"])
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
