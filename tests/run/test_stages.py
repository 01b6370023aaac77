"""The table of stages: what makes a stage stale, and what may change during a run."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from sparselong.config import leaves as config_leaves
from sparselong.config.keys import Section, is_incidental, known_keys
from sparselong.config.schema import Config, load
from sparselong.errors import StageError
from sparselong.run import Stage, run_stage
from sparselong.run.manifests import show_manifest
from sparselong.run.stages import (
    STAGES,
    Declaration,
    deciding_sections,
    describe_done,
    stage_hash,
)

TINY = str(Path(__file__).resolve().parents[2] / "configs/tiny.yaml")
CHANGED = {
    "sequence_parallel_degree": "2",
    "expert_parallel_degree": "1",
    "experts.placement": "host",
    "heads_k_stride": "2",
    "ring_attn_func": "varlen_llama3",  # the only value so far
    "training.gradient_checkpointing": "true",
    "training.keep_attention": "never",
    "training.keep_experts": "never",
    "training.slice_rows": "64",
    "training.offload_checkpoints": "true",
    "training.logging_steps": "2",
    "training.save_steps": "40",
    "training.save_total_limit": "1",
    "training.metrics": "figures.py:accuracy",
    "training.use_tensorboard": "true",
    "training.wandb_project": "trial",
    "training.trackio_project": "trial",
    "evaluation.compare": "[runs/other]",
    "cost.per_gpu_hour": "{H200: 3.5}",
}
"""Every incidental key, with a value different from the tiny config's."""
NEEDED = {
    key: ["training.gradient_checkpointing=true"]
    for key in ("training.slice_rows", "training.offload_checkpoints")
}
"""Incidental keys that another key's changed value requires."""


def leaves() -> dict[str, type[Section]]:
    """Map the dotted name of every key that is not a section to the section class."""
    keys = known_keys(Config)
    return {k: s for k, s in keys.items() if not any(o.startswith(f"{k}.") for o in keys)}


def marked(key: str) -> bool:
    return is_incidental(leaves()[key].model_fields[key.rpartition(".")[2]])


def with_other(config: Any, key: str) -> Any:
    """Return the config with another value of a key, even one that no file could hold."""
    name, _, rest = key.partition(".")
    value = getattr(config, name)
    return config.model_copy(update={name: with_other(value, rest) if rest else [value, "other"]})


@pytest.mark.parametrize("key", leaves())
@pytest.mark.parametrize("stage", STAGES)
def test_a_key_changes_the_hash_of_stages_that_read_it_unless_incidental(stage, key):
    plain = load(TINY)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # pydantic warns of a value of another type
        changes = stage_hash(with_other(plain, key), stage) != stage_hash(plain, stage)
    assert changes is (key.partition(".")[0] in deciding_sections(stage) and not marked(key))


def test_every_key_affects_a_stage_after_health_unless_incidental_or_profile():
    """A profile is a set of other keys' values, which are hashed themselves."""
    sections = {section for stage in list(STAGES)[1:] for section in deciding_sections(stage)}
    unread = {key for key in leaves() if key.partition(".")[0] not in sections}
    assert {key for key in unread if not marked(key)} == {"profile"}


def test_stages_that_read_another_depend_on_its_sections():
    assert deciding_sections("02_compress") < deciding_sections("03_finetune")
    assert deciding_sections("03_finetune") < deciding_sections("04_eval")
    assert "training" not in deciding_sections("02_compress")


def test_every_stage_is_in_the_table_after_those_it_reads():
    names = list(STAGES)
    for name, declared in STAGES.items():
        assert all(names.index(earlier) < names.index(name) for earlier in declared.reads)


def test_the_incidental_keys_are_those_tested_here():
    assert {key for key in leaves() if marked(key)} == set(CHANGED)


@pytest.fixture
def start(tmp_path):
    """Run a stage with the given body in one run directory and return the exit code."""

    def start(name: str, execute, *overrides: str) -> int:
        arguments = ["--config", TINY, "--run-dir", str(tmp_path / "run"), *overrides]
        return run_stage(name, "test", arguments, execute, lambda c, r, n: {}, str)

    return start


def write(content: str):
    def execute(stage: Stage) -> None:
        (stage.dir / "out").write_text(content)
        stage.outputs = [stage.dir / "out"]

    return execute


def stop(stage: Stage) -> None:
    """Fail once there is something to keep."""
    (stage.dir / "trained.json").write_text("{}")
    raise StageError("it stopped", "", "", "")


def bug(stage: Stage) -> None:
    raise AssertionError(f"{stage.name} was done again")


@pytest.mark.parametrize("key", CHANGED)
def test_incidental_keys_may_change_when_a_run_resumes(start, tmp_path, key):
    """Unfinished work resumes with the new value, and a finished stage stays done."""
    change, seen = [*NEEDED.get(key, ()), f"{key}={CHANGED[key]}"], []
    assert start("02_compress", write("model")) == 0
    assert start("03_finetune", stop) == 1

    def resume(stage: Stage) -> None:
        seen.append(stage.config)
        assert load(stage.run_dir / "config.yaml") == stage.config

    assert start("03_finetune", resume, *change) == 0
    assert seen == [load(TINY, change)]
    assert start("03_finetune", bug, *change) == start("03_finetune", bug) == 0


def test_keys_that_affect_a_result_may_not_change(start, capsys):
    assert start("02_compress", write("model")) == 0
    assert start("03_finetune", stop) == 1
    change = ["training.learning_rate=0.5", "lora.r=4", "training.save_steps=40"]
    assert start("03_finetune", bug, *change) == 1
    told = capsys.readouterr().err
    assert "unfinished work of another config" in told
    before = load(TINY)
    rate, r = before.training.learning_rate, before.lora.r
    assert "expected: lora.r=4 training.learning_rate=0.5\n" in told
    assert f"found:    lora.r={r} training.learning_rate={rate}\n" in told


def test_work_that_recorded_only_a_hash_is_refused_by_it(start, tmp_path, capsys):
    """As an older version wrote it."""
    assert start("02_compress", write("model")) == 0
    assert start("03_finetune", stop) == 1
    (path,) = tmp_path.glob("**/03_finetune/started.json")
    started = json.loads(path.read_text())
    del started["config"]
    path.write_text(json.dumps(started))
    assert start("03_finetune", bug, "lora.r=4") == 1
    told = capsys.readouterr().err
    assert f"expected: config hash {stage_hash(load(TINY, ['lora.r=4']), '03_finetune')}" in told
    assert f"found:    {started['config_hash']}\n" in told


def test_only_input_stages_make_a_stage_stale(start, monkeypatch, capsys):
    monkeypatch.setitem(STAGES, "05_export", Declaration(("02_compress", "03_finetune"), ()))
    for name in ("02_compress", "03_finetune", "04_eval", "05_export"):
        assert start(name, write(name)) == 0
    assert start("04_eval", write("other figures"), "evaluation.limit=3", "--force") == 0
    assert start("05_export", bug) == 0
    assert start("03_finetune", write("another model"), "--force") == 0
    assert start("05_export", bug) == 1
    assert "a result of 03_finetune that no longer exists" in capsys.readouterr().err
    assert start("05_export", write("05_export"), "--force") == 0


def test_manifests_record_their_inputs(start, tmp_path):
    for name in ("02_compress", "03_finetune", "04_eval"):
        assert start(name, write(name)) == 0
        manifest = json.loads((tmp_path / "run" / name / "manifest.json").read_text())
        assert tuple(manifest["made_from"]) == STAGES[name].reads


@pytest.mark.parametrize("key", ["training.metrics", "training.use_tensorboard"])
def test_a_finished_stage_says_what_it_was_not_asked_for_when_it_was_made(key, tmp_path):
    before, now = load(TINY), load(TINY, [f"{key}={CHANGED[key]}", "evaluation.compare=[runs/x]"])
    for name in ("02_compress", "03_finetune", "04_eval"):
        manifest = {"stage": name, "config": before.model_dump(mode="json")}
        told = f"{name} is up to date in {tmp_path} for this config"
        assert describe_done(before, manifest, tmp_path) == told
        found = describe_done(now, manifest, tmp_path)
        if name == "03_finetune":  # the others do not read the key
            assert found.startswith(f"{told}, made with {key}=") and "--force" in found
            assert f"with {key}={json.dumps(dict(config_leaves(now.model_dump()))[key])}" in found
        else:
            assert found == told


def test_the_summary_of_a_stage_leaves_out_what_it_does_not_have():
    metrics = {"steps": 4, "cost": None, "peak_device_bytes": {}, "rows": [1], "deep": {"a": {}}}
    metrics |= {"keep": {"kept": 2, "available_bytes": None}, "sizes_bytes": {"all": 2048}}
    metrics["perplexity"] = {0: 8.5, 2: 4.25}  # by step, before the manifest was written
    manifest = {"stage": "03_finetune", "status": "done", "seconds": 28.4, "metrics": metrics}
    assert show_manifest(manifest).splitlines() == [
        *(
            "03_finetune done in 28 s",
            "  steps: 4",
            "  keep: kept 2",
            "  sizes_bytes: all 2.00 KiB",
        ),
        "  perplexity: 0 8.5, 2 4.25",
    ]
