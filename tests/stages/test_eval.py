"""04_eval end to end: outputs, results reused after an interruption, refusals.

The base itself stands in for stage 02, and a copy with its attention switched off for stage 03:
the first must equal the base in every figure, the second must not.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from sparselong.config import schema as config_module
from sparselong.errors import StageError
from sparselong.provenance import describe_files, hash_file
from sparselong.run.manifests import FORMAT_VERSION
from sparselong.run.stages import stage_hash
from tests.conftest import ROOT, load_script

eval_script = load_script("04_eval")


@pytest.fixture(scope="module")
def arguments(small_arguments) -> list[str]:
    tasks = ("evaluation.tasks=[demo_hellaswag, ruler_vt]", "evaluation.ruler.lengths=[2048]")
    sizes = ("limit=4", "perplexity_samples=2", "health_prompts=1", "health_tokens=40")
    return [*small_arguments, *tasks, *(f"evaluation.{size}" for size in sizes)]


def write_manifest(run_dir: Path, stage: str, arguments: list[str], label: str = "") -> None:
    config = config_module.load(arguments[1], arguments[2:])
    mark = {"path": "mark", "bytes": 1, "sha256": label}
    manifest = {
        "format_version": FORMAT_VERSION,
        **{"stage": stage, "status": "done", "seconds": 1.0, "metrics": {}},
        "config_hash": stage_hash(config, stage),
        "inputs": describe_files([Path(config.model.base)], run_dir),
        "outputs": [*describe_files([run_dir / stage / "model"], run_dir), mark],
    }
    (run_dir / stage).mkdir(parents=True, exist_ok=True)
    (run_dir / stage / "manifest.json").write_text(json.dumps(manifest))


def silence_attention(directory: Path) -> None:
    for shard in directory.glob("*.safetensors"):
        tensors = load_file(shard)
        for name in tensors:
            if "o_proj" in name:
                tensors[name].zero_()
        shard.unlink()
        save_file(tensors, shard, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, untrained_base, arguments) -> Path:
    """A finished stage 04 over stand-ins for stages 02 and 03."""
    run_dir = tmp_path_factory.mktemp("eval") / "run"
    for stage in ("02_compress", "03_finetune"):
        shutil.copytree(untrained_base, run_dir / stage / "model")
    silence_attention(run_dir / "03_finetune/model")
    for stage in ("02_compress", "03_finetune"):
        write_manifest(run_dir, stage, arguments)
    assert eval_script.main([*arguments, "--run-dir", str(run_dir)]) == 0
    return run_dir


def read_metrics(run_dir: Path) -> dict:
    return json.loads((run_dir / "04_eval/manifest.json").read_text())["metrics"]


def test_manifest_has_the_documented_metrics(run_dir):
    manifest = json.loads((run_dir / "04_eval/manifest.json").read_text())
    rows = manifest["metrics"]["tasks"]["demo_hellaswag"]
    assert list(rows) == ["base", "compressed", "finetuned"]
    for row in rows.values():
        assert {"acc", "acc_norm", "stderr", "paired_flips"} <= set(row) and row["items"] == 4
    assert manifest["peak_bytes"]["host"] > 0
    for row in manifest["metrics"]["tasks"]["ruler_vt_2048"].values():
        assert row["items"] == 4 and 0 <= row["scores"]["score"]["value"] <= 1
    results = json.loads((run_dir / "04_eval/results.json").read_text())
    for row in results["speed"].values():
        (drawn,) = (each for each in row["prompts"] if each["up_to_tokens"] == 2048)
        assert row["load_seconds"] > 0 and drawn["prompts"] == 4 and drawn["tokens_per_second"] > 0
    for efforts in manifest["metrics"]["health"].values():
        assert list(efforts) == ["low", "medium", "high"]
        for row in efforts.values():  # untrained: never ends
            assert (row["answers"], row["ended"], row["tokens"]["most"]) == (1, 0, 40)
    outputs = {Path(file["path"]).name for file in manifest["outputs"]}
    assert {"results.json", "report.md", "evaluation.png", "base.json"} <= outputs
    page = (run_dir / "report.html").read_text(encoding="utf-8")
    assert "Perplexity on held-out conversations" in page and "what the model chose" in page


def test_an_equal_model_is_equal_and_a_damaged_one_is_not(run_dir):
    metrics = read_metrics(run_dir)
    rows, perplexity = metrics["tasks"]["demo_hellaswag"], metrics["perplexity"]
    assert rows["compressed"] == rows["base"]
    assert perplexity["compressed"] == perplexity["base"]
    assert abs(perplexity["finetuned"] / perplexity["base"] - 1) > 1e-4
    divergence = metrics["divergence"]
    assert (divergence["compressed"]["kl"], divergence["compressed"]["agreement"]) == (0.0, 1.0)
    assert divergence["finetuned"]["kl"] > 1e-6
    assert not (run_dir / "04_eval/states").exists()


def test_finished_results_are_kept_and_changed_models_measured_again(run_dir, arguments, tmp_path):
    """As if killed before the report: no manifest, two of three results, 03 rebuilt. The others are
    measured with their experts in host memory, with the same figures."""
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    folder = copy / "04_eval"
    (folder / "manifest.json").unlink()
    started = json.loads((folder / "started.json").read_text())
    del started["made_from"]  # as in an older run
    (folder / "started.json").write_text(json.dumps(started))
    (folder / "base.json").unlink()
    for name in ("compressed", "finetuned"):  # a marker that only a kept file can contain
        kept = json.loads((folder / f"{name}.json").read_text())
        kept["perplexity"]["supervised"]["perplexity"] = 12345.0
        (folder / f"{name}.json").write_text(json.dumps(kept))
    write_manifest(copy, "03_finetune", arguments, label="rebuilt")
    placed = [*arguments, "experts.placement=host"]
    assert eval_script.main([*placed, "--run-dir", str(copy)]) == 0
    before, after = read_metrics(run_dir)["perplexity"], read_metrics(copy)["perplexity"]
    assert after == {**before, "compressed": 12345.0}
    layer = 8 * (256 + 128) * 4 * 17
    for name, experts in read_metrics(copy)["experts"].items():
        on_host = name != "compressed"
        assert experts["placement"] == ("host" if on_host else "gpu")
        if on_host:
            assert experts["host_bytes"] == [4 * layer] and experts["copied_bytes"][0] >= 4 * layer


def test_models_that_cannot_fit_are_not_loaded(run_dir, arguments, tmp_path, monkeypatch, capsys):
    from sparselong.evaluate import stage

    def refuse(_: object) -> None:
        raise StageError("evaluating it does not fit in memory", "e", "f", "x")

    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    shutil.rmtree(copy / "04_eval")
    monkeypatch.setattr(stage, "decide_evaluation_sharing", refuse)
    assert eval_script.main([*arguments, "--run-dir", str(copy)]) == 1
    assert "evaluating it does not fit in memory" in capsys.readouterr().err
    assert "loaded" not in (copy / "04_eval/log.txt").read_text()


def rank_ids(folder: Path) -> dict[str, int]:
    """Process id by rank."""
    listed = subprocess.run(
        ["pgrep", "-f", f"evaluate.rank {folder}"], capture_output=True, text=True
    )
    found = {}
    for process in listed.stdout.split():
        environment = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
        (rank,) = (each[5:].decode() for each in environment if each.startswith(b"RANK="))
        found[rank] = int(process)
    return found


@pytest.mark.timeout(400)
def test_two_processes_that_share_a_model_have_the_same_figures(
    run_dir, arguments, tmp_path, monkeypatch, forked_python
):
    """Also after one of them was killed, which is named; models measured before it are kept."""
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    shutil.rmtree(copy / "04_eval")
    command = [forked_python, str(ROOT / "04_eval.py"), *arguments, "--run-dir", str(copy)]
    command.append("expert_parallel_degree=2")
    scores = copy / "04_eval/base.scores.json"
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not scores.exists():
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.02)
        os.kill(rank_ids(copy / "04_eval")["1"], signal.SIGKILL)
        _, told = process.communicate()
    assert process.returncode == 1
    assert "2 processes: 2 share experts and vocabulary" in told
    assert "error:    rank 1 of 04_eval ended with signal SIGKILL" in told

    monkeypatch.setattr(sys, "executable", forked_python)
    again = [*arguments, "--run-dir", str(copy), "expert_parallel_degree=2"]
    assert eval_script.main([*again, "experts.placement=host"]) == 0
    log = (copy / "04_eval/log.txt").read_text()
    assert "only experts 4 to 7 of 8" in (copy / "04_eval/log.rank1.txt").read_text()
    assert log.count("base: loaded") == 1
    wanted, found = read_metrics(run_dir), read_metrics(copy)
    assert found["tasks"] == wanted["tasks"]
    for name in ("base", "compressed", "finetuned"):
        mine, theirs = (
            json.loads((each / f"04_eval/{name}.json").read_text())["tasks"]["ruler_vt_2048"]
            for each in (copy, run_dir)
        )
        assert mine["answers"] == theirs["answers"] and any(mine["answers"])
    assert found["health"] == wanted["health"]
    for name, divergence in wanted["divergence"].items():
        assert found["divergence"][name] == pytest.approx(divergence, rel=1e-4, abs=1e-7)
    for name, perplexity in wanted["perplexity"].items():
        assert found["perplexity"][name] == pytest.approx(perplexity, rel=1e-6)
    placed = [one["placement"] for one in found["experts"].values()]
    assert placed == ["gpu", "host", "host"]
    left = {path.name for path in (copy / "04_eval").iterdir()}
    assert not [name for name in left if "scores" in name or name == "work.json"]


@pytest.mark.parametrize("missing", ["02_compress", "03_finetune"])
def test_missing_stage_is_refused(tmp_path, arguments, capsys, missing):
    for stage in {"02_compress", "03_finetune"} - {missing}:
        write_manifest(tmp_path, stage, arguments)
    assert eval_script.main([*arguments, "--run-dir", str(tmp_path)]) == 1
    shown = capsys.readouterr().err
    assert f"04_eval needs {missing}" in shown and f"python {missing}.py" in shown


def test_stage_of_another_config_is_refused(tmp_path, arguments, capsys):
    write_manifest(tmp_path, "02_compress", [*arguments, "shared_dense.weight_bits=8"])
    assert eval_script.main([*arguments, "--run-dir", str(tmp_path)]) == 1
    assert "02_compress" in capsys.readouterr().err


def test_dry_run_touches_nothing(tmp_path, arguments, capsys):
    run_dir = tmp_path / "run"
    assert eval_script.main([*arguments, "--run-dir", str(run_dir), "--dry-run"]) == 0
    assert "04_eval" in capsys.readouterr().out and not run_dir.exists()


def test_other_models_are_measured_beside_those_that_were(run_dir, arguments, tmp_path, capsys):
    """A run by its fine-tuned model, and a checkpoint; what was measured before is kept."""
    copy, other = tmp_path / "run", tmp_path / "r=8,seed=2"  # as a sweep names its runs
    shutil.copytree(run_dir, copy)
    checkpoint = shutil.copytree(run_dir / "02_compress/model", tmp_path / "checkpoint")
    shutil.copytree(run_dir / "03_finetune", other / "03_finetune")
    command = [*arguments, "--run-dir", str(copy)]
    paths = [str(other), str(checkpoint)]
    assert eval_script.main([*command, "--compare", *paths]) == 0
    log = (copy / "04_eval/log.txt").read_text().rpartition("base: already measured")[2]
    assert log.count("already measured") == 2 and log.count(": loaded from") == 2 + 1
    metrics = read_metrics(copy)
    for mine, theirs in zip(paths, ("finetuned", "compressed"), strict=True):
        for key in ("perplexity", "divergence"):
            assert metrics[key][mine] == metrics[key][theirs]
        assert all(rows[mine] == rows[theirs] for rows in metrics["tasks"].values())
    report = (copy / "04_eval/report.md").read_text()
    assert f"| tokens measured | base | compressed | finetuned | {paths[0]} |" in report
    before = (copy / "04_eval/manifest.json").read_bytes()
    assert eval_script.main([*command, "--compare", paths[0]]) == 0  # up to date
    assert eval_script.main(command) == 0
    assert (copy / "04_eval/manifest.json").read_bytes() == before
    assert "up to date" in capsys.readouterr().err
    (kept,) = read_metrics(copy)["compared"][paths[1]]["files"][:1]
    assert kept["sha256"] == hash_file(checkpoint / Path(kept["path"]).name)

    silence_attention(checkpoint)
    assert eval_script.main([*command, "--compare", *paths]) == 0
    changed = read_metrics(copy)
    assert changed["divergence"][paths[1]]["kl"] > 0.0
    assert changed["divergence"][paths[0]] == metrics["divergence"][paths[0]]
    assert changed["compared"] != metrics["compared"]
    shard = next((other / "03_finetune/model").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\1")
    before = (copy / "04_eval/manifest.json").read_bytes()
    assert eval_script.main([*command, "--compare", paths[0]]) == 1
    assert f"03_finetune.py --run-dir {other} --force" in capsys.readouterr().err
    assert (copy / "04_eval/manifest.json").read_bytes() == before


def test_models_that_cannot_be_compared_are_refused_by_name(run_dir, arguments, tmp_path, capsys):
    command = [*arguments, "--run-dir", str(run_dir), "--compare"]
    wider = tmp_path / "wider"
    shutil.copytree(run_dir / "02_compress/model", wider)
    config = json.loads((wider / "config.json").read_text())
    (wider / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": 2}))
    before = (run_dir / "04_eval/manifest.json").read_bytes()
    for path, word in ((tmp_path, "is no model"), (wider, "num_experts_per_tok 2")):
        copy = tmp_path / f"run for {path.name}"
        shutil.copytree(run_dir, copy)
        assert eval_script.main([*arguments, "--run-dir", str(copy), "--compare", str(path)]) == 2
        told = capsys.readouterr().err
        assert word in told and "leave it out of --compare" in told
    assert eval_script.main([*command, "seed=3"]) == 2
    assert "--compare: expected at least one" in capsys.readouterr().err
    twice = str(run_dir / "02_compress/model")
    assert eval_script.main([*command, twice, f"{twice}/"]) == 2
    assert "names a model twice" in capsys.readouterr().err
    assert (run_dir / "04_eval/manifest.json").read_bytes() == before
