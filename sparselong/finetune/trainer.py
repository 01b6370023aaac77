"""Run stage 03: prepare the data, train with Axolotl, check the receipt, publish the results.

    03_finetune/axolotl.yaml      generated
                supervision.txt   some conversations with their supervised tokens marked
                spent.json        for how long each session trained (run/spent.py)
                receipt.json      what the plugin replaced and attached; required for a result
                metrics.jsonl     a row per logged step and per evaluation
                checkpoints/      checkpoint-N: adapter, masks, scales, optimizer, random state
                tensorboard/      event files, if asked for; wandb/ likewise
                axolotl/          what else Axolotl writes; nothing reads it
                best -> checkpoints/checkpoint-N
                model/  adapter/  the results
                loss.png

If interrupted, the same command resumes from the last whole checkpoint (checkpoints.py). It leaves
damaged ones as they are, and drops the rows of metrics.jsonl after that checkpoint's step. If only
baking was interrupted, only baking is repeated.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from sparselong.data import (
    check_chats,
    check_ruler,
    describe_lengths,
    encode_files,
    select_usable,
    warn_before_training,
)
from sparselong.errors import StageError
from sparselong.figures import format_seconds
from sparselong.files import parse_json, point_to, read_json, write_atomically
from sparselong.finetune import axolotl_config, checkpoints, plot
from sparselong.finetune.training_run import (
    AXOLOTL_YAML,
    BAKED,
    METRICS,
    RECEIPT,
    SUPERVISION,
    TrainingRun,
    trainer_arguments,
)
from sparselong.finetune.watching import (
    MetricFunction,
    begin_session,
    check_trackers,
    note_session,
    sum_sessions,
)
from sparselong.memory import cost_lines, make_plan
from sparselong.model import load_tokenizer
from sparselong.processes import TrainerEnded, find_world, train_together
from sparselong.provenance import are_rows, gpu_name, refuse_changes
from sparselong.run import Stage

_BAKED = (
    *("best_checkpoint", "best_step", "best_eval_loss", "steps", "mask_updates", "peak_bytes"),
    *("two_four_conforming", "files"),
)
"""Keys of baked.json that every result has."""
_CALLBACKS = ("MaskUpkeep", "Recomputation", "RouterWatch", "Metrics", "Stopping")


def finetune(stage: Stage) -> None:
    """Fine-tune stage 02's model, and write `model/` and `adapter/`.

    Raises:
        StageError: the machine or the data does not fit the config, or training failed.
    """
    here = find_world(stage.config).here
    check_trackers(stage.config)
    if stage.config.training.metrics is not None:
        MetricFunction(stage.config.training.metrics)  # refused now, not after an hour
    axolotl_config.refuse_unsupported(stage.config, torch.cuda.device_count(), here)
    earlier = stage.run_dir / "02_compress"
    tokenizer = load_tokenizer(earlier / "model")
    check_ruler(stage.config, tokenizer)  # of stage 04's tasks, before hours of training
    check_chats(stage.config, tokenizer)
    data = encode_files(stage.config, stage.run_dir, tokenizer)
    stage.note_date(data.date)
    sources = (data.train.source, data.validation.source)
    stage.check_rows(sources)
    usable = select_usable(data, stage.config.sequence_len)
    warnings = warn_before_training(stage.config, data.train.source, tokenizer)
    stage.metrics |= {"remarks": usable.left_out, "warnings": warnings}
    if not (stage.dir / BAKED).exists():
        for sentence in (*usable.left_out, *(f"warning: {each}" for each in warnings)):
            stage.log(sentence)
        for line in describe_lengths(data.train, usable.train):
            stage.log(line)
        stage.log(describe_lengths(data.validation, usable.validation)[0])
        _train(stage)
    stage.inputs = [earlier / "model", earlier / "masters", *sources]
    _publish(stage)


def _train(stage: Stage) -> None:
    run = TrainingRun.of_stage(stage)
    resume_from = find_resumable(stage, run.checkpoints)
    rows = keep_rows(stage.dir / METRICS, checkpoints.step_of(resume_from) if resume_from else None)
    run.forget_end(resume_from)
    if resume_from:
        stage.log(f"resuming from {resume_from.name} ({rows} rows of {METRICS} kept)")
    (stage.dir / RECEIPT).unlink(missing_ok=True)
    world = find_world(stage.config)
    gpus = world.size if torch.cuda.device_count() else 0
    _tell_estimate(stage, gpus)
    document = axolotl_config.build(run, resume_from)
    text = _HEADER + yaml.safe_dump(document, sort_keys=False)
    write_atomically(stage.dir / AXOLOTL_YAML, text)
    processes = f" in {world.size} processes" if world.size > 1 else ""
    stage.log(f"starting Axolotl{processes} (importing it takes a while)")
    begin_session(stage.dir, gpus)
    try:
        _train_explained(stage, run)
    finally:
        note_session(stage.dir)
    asked = {
        "processes": world.size,
        "attention": axolotl_config.attention_of(stage.config),
        "expert_parallel_degree": stage.config.expert_parallel_degree,
        "experts.placement": stage.config.experts.placement,
        "training.slice_rows": stage.config.training.slice_rows,
        "training.offload_checkpoints": stage.config.training.offload_checkpoints,
    }
    try:
        check_receipt(stage, asked)
    except StageError:
        (stage.dir / BAKED).unlink(missing_ok=True)  # so that a rerun does not publish it
        raise


def _tell_estimate(stage: Stage, gpus: int) -> None:
    """Tell what training will take on this machine's GPUs, or on its processor if there are 0."""
    name = gpu_name() if gpus else None
    device = "cuda" if gpus else "cpu"
    (made,) = make_plan(stage.config, device, name or "RTX 3090", gpus=gpus or None).estimates
    row = made.describe()
    rough = f"estimated time on {row['gpu']}: {format_seconds(3600 * row['hours'])}"
    for line in cost_lines([row]) or [rough]:
        stage.log(line)


def _train_explained(stage: Stage, run: TrainingRun) -> None:
    """Train; if that is interrupted or fails, say what the same command will do next."""
    try:
        train_together(stage, trainer_arguments(stage))
    except KeyboardInterrupt as signalled:
        raise StageError(
            f"{stage.name} was interrupted",
            "the stage to finish",
            str(signalled) or "Ctrl-C",
            f"run {stage.same_command} again: it {_next_time(run)}",
        ) from None
    except TrainerEnded as failure:
        raise StageError(
            failure.what,
            failure.expected,
            failure.found,
            f"{failure.fix}; with the cause removed, {stage.same_command} {_next_time(run)}",
        ) from failure


def _next_time(run: TrainingRun) -> str:
    """Return what a rerun does, as the end of a sentence."""
    found, _ = checkpoints.find_last(run.checkpoints)
    if found is None:
        return "trains from the start, because there is no whole checkpoint yet"
    if run.is_trained():
        return f"only writes the result, from {found.name} on"
    return f"continues from {found.name}"


_HEADER = "# Generated from config.yaml by sparselong/finetune/axolotl_config.py; edits are lost.\n"


def find_resumable(stage: Stage, folder: Path) -> Path | None:
    """Return the last whole checkpoint, and report each later one with what is wrong with it.

    Raises:
        StageError: the folder of the checkpoints cannot be read.
    """
    try:
        if folder.is_symlink() or folder.exists():
            os.listdir(folder)
        checkpoints.clean(folder)
        found, faults = checkpoints.find_last(folder)
    except OSError as error:
        raise StageError(
            f"the checkpoints in {folder} cannot be read",
            "a directory that this user can read and write, or none yet",
            f"{error.strerror or error}: {error.filename or folder}",
            "restore the directory (or what its link points to), or pass --force to start over",
        ) from error
    for path, fault in faults.items():
        stage.log(f"passing over {path.name}, which stays as it is: {fault}")
    if faults and found is None:
        stage.log("no whole checkpoint is left: training starts over")
    return found


def keep_rows(path: Path, last_step: int | None) -> int:
    """Drop metrics rows after `last_step` (all rows if None); return how many are left."""
    rows = [row for row in read_rows(path) if last_step is not None and row["step"] <= last_step]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
    return len(rows)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl, without an incomplete last line.

    Raises:
        StageError: the file cannot be read, or a line is no row that training wrote.
    """
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = []
    place = ""
    try:
        *lines, _ = path.read_text(encoding="utf-8").split("\n")
        for line in lines:
            place = f", line {len(rows) + 1},"
            rows.append(_check_row(parse_json(line)))
    except (OSError, ValueError, TypeError) as error:
        raise StageError(
            f"{path}{place} is not what training wrote",
            "a JSON object with `step` and the figures of a training or evaluation row",
            str(error),
            f"remove the line, or move {path.name} away: its curves then begin at the checkpoint",
        ) from error
    return rows


def _check_row(row: Any) -> dict[str, Any]:
    """Return a row; raise TypeError if it lacks a figure that publishing reads."""
    if not isinstance(row, dict):
        raise TypeError(f"a JSON {type(row).__name__}")
    names = ["step"]
    if "loss" in row:
        names += ["loss", "tokens", "tokens_per_second"]
    elif "eval_loss" in row:
        names += ["eval_loss", "eval_perplexity"]
    for name in names:
        if not isinstance(row.get(name), int | float) or isinstance(row[name], bool):
            raise TypeError(f"`{name}` is {row.get(name)!r}")
    return row


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
    again = f"remove {stage.dir / BAKED}, then run the same command again"
    receipt = read_json(path, again) if path.exists() else {}
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
    sharing = receipt.get("expert_parallel_degree") or {}
    shared = "auto" if sharing.get("asked") == "auto" else sharing.get("chosen")
    placed = "auto" if sharing.get("asked_placement") == "auto" else sharing.get("placement")
    found = {**receipt, "expert_parallel_degree": shared, "experts.placement": placed}
    layers = receipt.get("layers") or {"asked": {}, "chosen": {}}
    for key, chosen in layers["chosen"].items():
        if receipt.get(key, chosen) == chosen:  # the attention backend that passes used
            found[key] = "auto" if layers["asked"][key] == "auto" else chosen
    missing += [f"{key} {asked}" for key, asked in attends.items() if found.get(key) != asked]
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
    again = f"remove {stage.dir / BAKED}: the same command then writes the result again"
    baked = read_json(stage.dir / BAKED, again)
    lacking = [key for key in _BAKED if key not in baked]
    if lacking or not are_rows(baked["files"]):
        found = f"no {', '.join(lacking or ['valid files'])}"
        raise StageError(f"{stage.dir / BAKED} is damaged", ", ".join(_BAKED), found, again)
    refuse_changes(baked["files"], stage.run_dir, stage.name, again)
    stage.described += baked["files"]
    rows = read_rows(stage.dir / METRICS)
    point_to(stage.dir / "best", f"checkpoints/{baked['best_checkpoint']}", stage.log)
    train = [row for row in rows if "loss" in row]
    curve = {row["step"]: row["eval_perplexity"] for row in rows if "eval_perplexity" in row}
    plot.draw(rows, baked["mask_updates"], baked["best_step"], stage.dir / "loss.png")
    stage.peak_bytes |= baked["peak_bytes"]
    stage.metrics |= {
        "steps": baked["steps"],
        "stopped": {"step": baked["steps"], **(baked.get("stopped") or {})},
        "train_loss": train[-1]["loss"] if train else math.nan,
        "eval_perplexity": curve,
        "best_step": baked["best_step"],
        "best_eval_perplexity": math.exp(baked["best_eval_loss"]),
        "tokens": train[-1]["tokens"] if train else 0,
        "tokens_per_second": statistics.median(
            row["tokens_per_second"] for row in train or [{"tokens_per_second": math.nan}]
        ),
        **sum_sessions(stage.dir, stage.config),
        "mask_updates": baked["mask_updates"],
        "two_four_conforming": baked["two_four_conforming"],
        "expert_parallel_degree": receipt.get("expert_parallel_degree"),
        "experts": baked.get("experts"),
        "layers": {
            **(receipt.get("layers") or {}),
            "copied_bytes": baked.get("copied_input_bytes"),
        },
        "keep_attention": receipt["keep_attention"],
        "keep_experts": receipt["keep_experts"],
        "trainable_parameters": receipt["trainable_parameters"],
        "supervised_token_fraction": receipt["supervised_token_fraction"],
        "peak_host_bytes": baked["peak_bytes"]["host"],
        "peak_device_bytes": {k: v for k, v in baked["peak_bytes"].items() if k != "host"},
    }
    stage.metrics |= _list_optional(baked, rows)
    names = ("model", "adapter", AXOLOTL_YAML, RECEIPT, METRICS, "loss.png", SUPERVISION)
    stage.outputs = [stage.dir / name for name in names]


def _list_optional(baked: Mapping[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the metrics of a run with a function of the user's, and of one with tuned experts."""
    found = {}
    if custom := {row["step"]: row["metrics"] for row in rows if "metrics" in row}:
        found["metrics"] = custom
    if "expert_rounding" in baked:
        found["expert_rounding"] = baked["expert_rounding"]
        found["baked_eval_perplexity"] = math.exp(baked["baked_eval_loss"])
    if "baked_metrics" in baked:
        found["baked_metrics"] = baked["baked_metrics"]
    return found
