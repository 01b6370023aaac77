"""Stage 04: measure three models on the same items and held-out conversations."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sparselong.data import (
    Usable,
    check_chats,
    conversations,
    encode_files,
    select_usable,
    warn_of_items,
)
from sparselong.evaluate import (
    divergence,
    health,
    models,
    perplexity,
    report,
    together,
)
from sparselong.evaluate.compared import Compared, check_sizes, describe_compared, find_compared
from sparselong.evaluate.inputs import check_base
from sparselong.evaluate.tasks import list_items, list_questions, load_suite
from sparselong.evaluate.work import BASE, MEMORY_FIX, Mark
from sparselong.files import read_json, write_atomically
from sparselong.model import load_tokenizer
from sparselong.processes import decide_evaluation_sharing, evaluation_world, telling_memory
from sparselong.run import Stage
from sparselong.runtime import using
from sparselong.tiny import resolve_base


def evaluate(stage: Stage) -> None:
    """Measure the base, compressed and fine-tuned models and write the report."""
    world = evaluation_world(stage.config, torch.cuda.device_count())
    files = conversations.prepare(stage.config, stage.run_dir)
    stage.check_rows(files)
    base_dir = resolve_base(stage.config, stage.run_dir, stage.log)
    check_base(stage, base_dir)
    tokenizer = load_tokenizer(base_dir)
    check_chats(stage.config, tokenizer)
    positions = read_json(base_dir / "config.json")["max_position_embeddings"]
    suite = load_suite(stage.config, stage.dir / "tasks", tokenizer, positions)
    encoded = encode_files(stage.config, stage.run_dir, tokenizer)
    stage.note_date(encoded.date)
    usable = select_usable(encoded, stage.config.sequence_len)
    for sentence in usable.left_out:
        stage.log(sentence)
    samples = perplexity.load_samples(encoded.validation, choose_rows(stage, usable))
    warnings = warn_of_items(list_items(suite), files.train)
    for warning in warnings:
        stage.log(f"warning: {warning}")

    compared = find_compared(stage.config)
    degree = stage.config.expert_parallel_degree
    check_sizes(compared, base_dir, world.size if degree == "auto" else degree)
    settings = stage.config.evaluation
    chats = health.list_chats(
        tokenizer, encoded.date, settings.health_prompts, settings.health_tokens, positions
    )
    questions = list_questions(suite)._replace(chats=chats)
    measurements = models.Measurements(suite, questions, samples)
    marks = _list_marks(stage, base_dir, compared, measurements)
    if world.size > 1:
        results = together.measure(stage, world, marks, measurements)
    else:
        held = decide_evaluation_sharing(stage.config)  # refuses what cannot fit before it loads
        measure = partial(models.measure, stage=stage)
        with using(expert_placement=held.placement), telling_memory(fix=MEMORY_FIX):
            results = {mark.name: measure(mark, measurements) for mark in marks}
    _publish(stage, results, compared, warnings)
    shutil.rmtree(stage.dir / divergence.STATES, ignore_errors=True)
    models_read = [stage.run_dir / name / "model" for name in ("02_compress", "03_finetune")]
    stage.inputs = [files.train, files.validation, *models_read]


def choose_rows(stage: Stage, usable: Usable) -> list[int]:
    """Return the validation rows to measure; say so if they are fewer than were asked for."""
    asked = stage.config.evaluation.perplexity_samples
    rows = usable.validation[:asked]
    if len(rows) < asked:
        stage.log(
            f"perplexity is measured on {len(rows):,} validation conversations of the {asked:,} "
            "asked for (evaluation.perplexity_samples): there are no more"
        )
    return rows


def _list_marks(
    stage: Stage, base_dir: Path, compared: list[Compared], measurements: models.Measurements
) -> list[Mark]:
    """Return the models to measure, the base first."""
    before, after = stage.manifests["02_compress"], stage.manifests["03_finetune"]
    own = {"compressed": ("02_compress", before["outputs"])}
    own["finetuned"] = ("03_finetune", after["outputs"])
    found = [(BASE, base_dir, models.fingerprint(before["inputs"]))]
    found += [
        (name, stage.run_dir / folder / "model", models.fingerprint(files))
        for name, (folder, files) in own.items()
    ]
    found += [(each.name, each.directory, each.fingerprint) for each in compared]
    asked = measurements.digest()  # lm-eval or a data set may have been updated since
    marks = []
    for name, path, files in found:
        is_like = name == BASE or divergence.has_same_head(base_dir, path)
        marks.append(Mark(name, str(path.resolve()), f"{files} {asked}", is_like))
    if stage.config.evaluation.divergence_samples and models.lacks_states(marks, stage.dir):
        marks[0] = marks[0]._replace(only_states=True)
    return marks


def _publish(
    stage: Stage,
    results: dict[str, dict[str, Any]],
    compared: list[Compared],
    warnings: list[str],
) -> None:
    """Write the report, and set the stage's metrics and outputs."""
    names = [stage.dir / f"{name}.json" for name in results]
    labels = {each.name: each.label for each in compared}
    results = {labels.get(name, name): result for name, result in results.items()}
    for result in results.values():
        for device, peak_bytes in result["peak_bytes"].items():
            stage.peak_bytes[device] = max(peak_bytes, stage.peak_bytes.get(device, 0))
    document = report.build_results(stage.config, results, warnings)
    document["files"] = {label: path.name for label, path in zip(results, names, strict=True)}
    outputs = [stage.dir / name for name in ("results.json", "report.md", "evaluation.png")]
    write_atomically(outputs[0], json.dumps(document, indent=1) + "\n")
    write_atomically(outputs[1], report.render(document))
    report.draw(document, outputs[2])
    stage.log(f"{report.summarize(document)}\nreport: {outputs[1]}")
    stage.metrics = report.list_metrics(document)
    stage.metrics["experts"] = {name: result.get("experts") for name, result in results.items()}
    stage.metrics["compared"] = describe_compared(compared, stage.run_dir)
    stage.outputs = [*outputs, *names]
