"""Stage 03 end to end: trained, killed, resumed, split over two processes that share experts and
vocabulary, in slices of rows, resumed in one, baked again by two, and opened with transformers."""

import datetime
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, load_script

# Axolotl runs seven times. Only runs that are to be killed are started by Python itself.
pytestmark = pytest.mark.timeout(900)

TRAINING = [
    "sequence_len=128",
    "micro_batch_size=2",
    "data.validation_fraction=0.175",  # three steps per epoch; evaluation ends in a partial batch
    "training.max_steps=6",
    "training.eval_steps=2",
    "training.save_steps=2",
    "training.save_total_limit=2",
    "training.gradient_accumulation_steps=2",
    "training.gradient_checkpointing=true",
    "finetuning_modifiers.MagnitudePruningModifier.update_frequency=0.2",
    "training.loss_target=0.001",  # not reached
    "training.early_stopping_patience=9",
    "training.use_tensorboard=true",
    "lora.expert_targets=[gate_up_proj, down_proj]",
    "lora.expert_r=2",
    "lora.router=true",
]


HOST = "experts.placement=host"
SLICED = ["training.slice_rows=96"]
HOST_INPUTS = ["training.offload_checkpoints=true"]
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
SHARED = ["sequence_parallel_degree=2", "expert_parallel_degree=2"]
PERSONS = ("checkpoint-keep-2", "checkpoint-2.bak", "checkpoint-1 (copy)", "best.old")
"""Folders beside the checkpoints that are not training's."""


def command(arguments: list[str], run_dir: Path, python: str = sys.executable) -> list[str]:
    script = str(ROOT / "03_finetune.py")
    return [python, script, *arguments, "--run-dir", str(run_dir), "--json"]


def rows_of(run_dir: Path) -> list[dict]:
    path = run_dir / "03_finetune/metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def curve(rows: list[dict]) -> list[tuple]:
    keys = ("step", "tokens", "loss", "grad_norm", "eval_loss", "mask_flipped_fraction")
    return [tuple(row.get(key) for key in keys) for row in rows]


def wait_for_step(process: subprocess.Popen, run_dir: Path, step: int, seconds=200) -> None:
    deadline = time.monotonic() + seconds
    while not any(row["step"] >= step for row in rows_of(run_dir)):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def trainers_of(run_dir: Path) -> list[int]:
    pattern = f"(train|finetune.rank) {re.escape(str(run_dir))}"
    found = subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True)
    return [int(number) for number in found.stdout.split()]


METRIC = """
import os
from pathlib import Path

def figures(predictions, labels):
    with Path(__file__).with_name("calls").open("a") as file:
        file.write(f"{os.getpid()} {len(labels)}\\n")
    return {"accuracy": (predictions == labels).mean(), "tokens": len(labels)}
"""


@pytest.fixture(scope="module")
def compressed(small_arguments, tmp_path_factory) -> tuple[Path, list[str]]:
    """A run directory with stage 02 done, and its arguments."""
    file = tmp_path_factory.mktemp("own") / "my_metrics.py"
    file.write_text(METRIC)
    # Nothing may read the run directory's name as a pattern, a URL, a variable or a home directory.
    run_dir = tmp_path_factory.mktemp("finetune") / "r*n [1] a::b $HOME ~c {d}"
    arguments = [*small_arguments, *TRAINING, f"training.metrics={file}:figures"]
    assert load_script("02_compress").main([*arguments, "--run-dir", str(run_dir)]) == 0
    return run_dir, arguments


@pytest.fixture(scope="module")
def runs(compressed, tmp_path_factory, forked_python) -> tuple[Path, Path, dict, str]:
    """An uninterrupted run, and one that is killed with its experts on the device and resumed with
    them in host memory: (run, run, the first one's manifest, the second one's stderr)."""
    straight, arguments = compressed
    broken = tmp_path_factory.mktemp("killed") / "run"
    shutil.copytree(straight, broken, symlinks=True)
    whole = command(arguments, straight, forked_python)
    done = subprocess.run(whole, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    process = subprocess.Popen(command(arguments, broken), stderr=subprocess.DEVNULL)
    wait_for_step(process, broken, 5)  # in the second epoch, like the checkpoint before it
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while trainers_of(broken):
        assert time.monotonic() < deadline, "the trainer outlived the stage"
        time.sleep(0.1)
    # A truncated checkpoint must not be taken for a whole one, nor a person's folder for ours.
    checkpoints = broken / "03_finetune/checkpoints"
    shutil.rmtree(checkpoints / "checkpoint-6", ignore_errors=True)
    shutil.copytree(checkpoints / "checkpoint-4", checkpoints / "checkpoint-6")
    (checkpoints / "checkpoint-6/trainer_state.json").write_text('{"global_step": 6, "epo')
    for name in PERSONS:
        shutil.copytree(checkpoints / "checkpoint-4", checkpoints / name)
    resumed = command([*arguments, HOST], broken, forked_python)
    again = subprocess.run(resumed, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    return straight, broken, json.loads(done.stdout), again.stderr


def test_killed_run_resumes_with_the_same_curve(runs):
    straight, broken, _, told = runs
    assert "passing over checkpoint-6, which stays as it is: trainer_state.json" in told
    assert "resuming from checkpoint-4" in told
    left = {path.name for path in (broken / "03_finetune/checkpoints").iterdir()}
    assert left == {"checkpoint-4", "checkpoint-6", "checkpoint-6.set-aside", *PERSONS}
    epochs = {row["step"]: row["epoch"] for row in rows_of(straight)}
    assert 1 < epochs[4] < epochs[5] < 2
    assert curve(rows_of(broken)) == curve(rows_of(straight))


def test_killed_run_bakes_the_same_model(runs):
    straight, broken, _, _ = runs
    files = sorted((straight / "03_finetune/model").glob("*.safetensors"))
    assert len(files) == 8
    for path in files:
        assert path.read_bytes() == (broken / "03_finetune/model" / path.name).read_bytes()


def test_a_run_with_experts_in_host_memory_has_a_receipt(runs):
    """Of every layer's four tensors before and after training, and of what was copied."""
    straight, broken, _, told = runs
    assert "experts.placement host: in host memory" in told
    assert "packed, in host memory" in told
    layer = 8 * (256 + 128) * 4 * 17
    experts = metrics_of(broken)["experts"]
    assert experts["placement"] == "host" and experts["host_bytes"] == [4 * layer]
    (frozen,) = experts["frozen"]
    assert frozen["tensors"] == 16 and frozen["before"] == frozen["after"]
    # Two steps of two passes forward and backward, and evaluations, of 4 layers each.
    (copied,) = experts["copied_bytes"]
    assert copied % layer == 0 and copied >= layer * 4 * (2 * 4 - 4)
    assert metrics_of(straight)["experts"] == {"placement": "gpu"}


def metrics_of(run_dir: Path) -> dict:
    return json.loads((run_dir / "03_finetune/manifest.json").read_text())["metrics"]


@pytest.fixture(scope="module")
def split(runs, compressed, tmp_path_factory, forked_python) -> tuple[Path, str, str]:
    """A run in two processes that share experts and vocabulary and compute in slices, one of them
    killed, resumed in one process, without slices and with layers' inputs in host memory: (run,
    stderr of the killed run, stderr of the resumed run)."""
    (straight, *_), (_, arguments) = runs, compressed
    run_dir = tmp_path_factory.mktemp("split") / "run"
    shutil.copytree(straight, run_dir, symlinks=True, ignore=shutil.ignore_patterns("03_finetune"))
    shared = command([*arguments, *SHARED, *SLICED], run_dir)
    process = subprocess.Popen(shared, stderr=subprocess.PIPE, text=True)
    wait_for_step(process, run_dir, 5)
    victim = [p for p in trainers_of(run_dir) if b"RANK=1" in environment_of(p)]
    os.kill(victim[0], signal.SIGKILL)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and not trainers_of(run_dir)
    one = command([*arguments, *HOST_INPUTS], run_dir, forked_python)
    again = subprocess.run(one, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    return run_dir, told, again.stderr


def environment_of(process: int) -> list[bytes]:
    return Path(f"/proc/{process}/environ").read_bytes().split(b"\0")


def test_processes_that_share_sequences_train_like_one(runs, split):
    """Rows up to the checkpoint come from two processes, later ones from one that read the adapters
    and optimizer states that the two wrote, each with half of the experts.

    Another summation order changes the last bits. Once that flips a weight's code, which depends
    on the processor, a loss differs in its fourth digit. (Without codes, tests/distributed holds
    every step to 1e-5.)
    """
    assert "checkpointed layers: 96 tokens at a time, inputs on the device" in split[1]
    assert_same_curve(rows_of(split[0]), rows_of(runs[0]))


def test_layers_in_slices_train_like_whole_ones(runs, compressed, tmp_path, forked_python):
    """In one process, with inputs in host memory: the first two steps to 1e-5."""
    (straight, *_), (_, arguments) = runs, compressed
    run_dir = tmp_path / "run"
    shutil.copytree(straight, run_dir, symlinks=True, ignore=shutil.ignore_patterns("03_finetune"))
    sliced = command([*arguments, *SLICED, *HOST_INPUTS], run_dir, forked_python)
    done = subprocess.run(sliced, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "checkpointed layers: 96 tokens at a time, inputs in host memory" in done.stderr
    layers = metrics_of(run_dir)["layers"]
    assert layers["chosen"]["training.slice_rows"] == layers["asked"]["training.slice_rows"] == 96
    assert layers["chosen"]["training.offload_checkpoints"] is True
    (copied,) = layers["copied_bytes"]  # all layers' inputs there, all but the last layer's back
    assert copied > 0 and copied % ((4 + 3) * 128 * 4) == 0
    whole = metrics_of(straight)["layers"]
    assert whole["copied_bytes"] == [0]
    assert whole["asked"]["training.slice_rows"] == "auto"
    assert whole["chosen"]["training.slice_rows"] == "never"
    assert_same_curve(rows_of(run_dir), rows_of(straight))


def assert_same_curve(rows: list[dict], straight: list[dict]) -> None:
    """Assert that rows agree as far as the order of sums allows."""
    for mine, alone in zip(rows, straight, strict=True):
        expected = numbers_of(alone)
        strict = mine["step"] <= 2
        norm = expected.pop("grad_norm", None)
        mine = {key: value for key, value in mine.items() if key != "metrics"}  # near ties differ
        assert mine == pytest.approx({**mine, **expected}, rel=1e-5 if strict else 5e-4)
        if norm is not None:
            assert mine["grad_norm"] == pytest.approx(norm, rel=1e-5 if strict else 5e-3)


def numbers_of(row: dict) -> dict:
    """Values that must not depend on the number of processes that share a sequence."""
    keys = ("step", "epoch", "tokens", "loss", "grad_norm", "learning_rate", "eval_loss")
    return {key: row[key] for key in (*keys, "mask_flipped_fraction") if key in row}


def test_a_dead_rank_is_named_and_another_number_of_ranks_resumes(split):
    run_dir, told, again = split
    assert "error:    rank 1 of 03_finetune ended with signal SIGKILL" in told
    assert "resuming from checkpoint-4" in again
    receipt = json.loads((run_dir / "03_finetune/receipt.json").read_text())
    assert (receipt["processes"], receipt["attention"]) == (1, "eager")
    left = sorted(path.name for path in (run_dir / "03_finetune/checkpoints").glob("checkpoint-*"))
    assert left == ["checkpoint-4", "checkpoint-6"]


def test_processes_that_share_experts_bake_the_same_as_one(
    split, compressed, tmp_path, forked_python
):
    """Each rounds and writes its own half, which it holds in host memory."""
    (run_dir, _, _), (_, arguments) = split, compressed
    again = tmp_path / "run"
    shutil.copytree(run_dir, again, symlinks=True)
    stage = again / "03_finetune"
    for path in (stage / "model", stage / "adapter"):
        shutil.rmtree(path)
    for name in ("baked.json", "manifest.json"):
        (stage / name).unlink()
    shared = command([*arguments, *SHARED, HOST], again, forked_python)
    done = subprocess.run(shared, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    receipt = json.loads((stage / "receipt.json").read_text())
    sharing = receipt["expert_parallel_degree"]
    assert (receipt["processes"], receipt["attention"]) == (2, "sparselong")
    assert (sharing["asked"], sharing["chosen"]) == (2, 2)
    assert (sharing["asked_placement"], sharing["placement"]) == ("host", "host")
    assert metrics_of(again)["experts"]["host_bytes"] == 2 * [2 * 8 * (256 + 128) * 4 * 17]
    assert "resuming from checkpoint-6" in done.stderr and "step 6/6" not in done.stderr
    files = [*(stage / "model").glob("*.safetensors"), *(stage / "adapter").glob("*.safetensors")]
    assert len(files) == 8 + 2
    for path in files:
        assert path.read_bytes() == (run_dir / path.relative_to(again)).read_bytes(), path.name
    ours, theirs = (
        json.loads((folder / "03_finetune/baked.json").read_text()) for folder in (run_dir, again)
    )
    assert ours["baked_eval_loss"] == pytest.approx(theirs["baked_eval_loss"], rel=1e-5)
    name = "model.layers.0.mlp.experts"
    for weight, one in theirs["expert_rounding"][name].items():
        assert ours["expert_rounding"][name][weight] == pytest.approx(one, rel=1e-9)
    assert not (stage / "axolotl/adapter_model.safetensors").exists()


def test_every_evaluation_has_the_figures_of_the_users_function(runs, split):
    """In two processes, killed and resumed, as in one."""
    (straight, _, manifest, _), (run_dir, *_) = runs, split
    figures = manifest["metrics"]["metrics"]
    assert list(figures) == ["0", "2", "4", "6"] and len(manifest["metrics"]["baked_metrics"]) == 2
    assert {each["tokens"] for each in figures.values()} == {figures["0"]["tokens"]}
    assert all(0.0 <= each["accuracy"] <= 1.0 for each in figures.values())
    evaluated = [row for row in rows_of(straight) if "eval_loss" in row]
    assert [row["metrics"] for row in evaluated] == list(figures.values())
    others = [row["metrics"] for row in rows_of(run_dir) if "eval_loss" in row]
    assert [each["tokens"] for each in others] == [figures["0"]["tokens"]] * 4
    assert others[0] == figures["0"]


def test_tensorboard_has_the_rows_of_a_resumed_run_once(runs):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, broken, _, _ = runs
    found = EventAccumulator(str(broken / "03_finetune/tensorboard")).Reload()
    losses = [(event.step, event.value) for event in found.Scalars("loss")]
    rows = [(row["step"], row["loss"]) for row in rows_of(broken) if "loss" in row]
    assert losses == [(step, pytest.approx(loss)) for step, loss in rows]
    assert {"metrics/accuracy", "tokens_per_second", "peak_bytes_host"} <= set(
        found.Tags()["scalars"]
    )


def test_manifest_records_the_run(runs):
    _, _, manifest, _ = runs
    metrics = manifest["metrics"]
    assert metrics["steps"] == 6
    assert metrics["stopped"] == {"step": 6, "reason": "all steps are done"}
    assert list(metrics["eval_perplexity"]) == ["0", "2", "4", "6"]
    assert metrics["best_step"] in (2, 4, 6)
    assert metrics["best_eval_perplexity"] < metrics["eval_perplexity"]["0"]
    assert metrics["two_four_conforming"] == 1.0
    assert [update["step"] for update in metrics["mask_updates"]] == [1, 2, 3, 4, 5]
    assert 0.0 < metrics["supervised_token_fraction"] < 1.0
    experts, router = 8 * 2 * (128 + 2 * 128 + 128 + 128), 16 * (128 + 8)
    assert metrics["trainable_parameters"] == 81920 + 4 * (experts + router)
    assert len(metrics["expert_rounding"]) == 4
    told = metrics["expert_rounding"]["model.layers.0.mlp.experts"]
    assert set(told) == {"gate_up_proj", "down_proj"}
    assert all(one["relative_change"] > 0 and one["lost"] > 0 for one in told.values())
    paths = [row["path"] for row in manifest["inputs"]]
    assert paths and all(path.startswith(("02_compress/", "data/")) for path in paths)
    for key in ("train_loss", "tokens_per_second", "peak_device_bytes"):
        assert key in metrics
    assert metrics["expert_parallel_degree"]["asked"] == "auto"
    assert metrics["expert_parallel_degree"]["chosen"] == 1
    for key in ("keep_attention", "keep_experts"):
        assert (metrics[key]["asked"], metrics[key]["kept"]) == ("auto", 0)
        assert "no GPU" in metrics[key]["nothing_to_keep"]


def test_a_trained_model_is_exported_with_the_tensors_that_it_computes_with(runs, compressed):
    """The stand-in of the exports' own tests is not needed here: Axolotl trained this one."""
    from safetensors.torch import load_file

    from sparselong.model.loading import load_model
    from sparselong.model.packed_linear import PackedLinear

    (straight, _, manifest, _), (_, arguments) = runs, compressed
    where = ["--run-dir", str(straight), "--to", "mxfp4"]
    assert load_script("05_export").main([*arguments, *where]) == 0
    folder = straight / "05_export/mxfp4"
    metrics = json.loads((folder / "manifest.json").read_text())["metrics"]
    assert metrics["expert_merge_error"] == manifest["metrics"]["expert_rounding"]
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    model = load_model(straight / "03_finetune/model")
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            assert tensors[f"{name}.weight"].equal(module.dequantize()), name


def test_run_directory_has_the_documented_files(runs):
    straight, _, manifest, _ = runs
    stage = straight / "03_finetune"
    best = manifest["metrics"]["best_step"]
    assert (stage / "best").resolve().name == f"checkpoint-{best}"
    name = json.loads((straight / "02_compress/manifest.json").read_text())["metrics"]["name"]
    text = (stage / "adapter/README.md").read_text()
    assert text.startswith(f"# Adapter of {name}\n") and "different model" in text
    adapter = json.loads((stage / "adapter/adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == name
    assert (stage / "loss.png").stat().st_size > 10_000
    log = (stage / "log.txt").read_text()
    assert " of them supervised (" in log and " tokens " in log and not CONTROL.search(log)
    shown = (stage / "supervision.txt").read_text()
    assert "⟦<|channel|>final<|message|>" in shown and "\x1b" not in shown
    names = {path.name for path in (stage / "best").iterdir()}
    assert {"masks.safetensors", "adapter_model.safetensors", "optimizer.pt"} <= names
    assert not {name for name in names if name.startswith("model")}
    receipt = json.loads((stage / "receipt.json").read_text())
    assert len(receipt["modules_replaced"]) == 16 + 4 + 4
    assert {"MaskUpkeep", "Recomputation", "Metrics", "Stopping"} <= set(receipt["callbacks"])
    assert "EarlyStoppingCallback" not in receipt["callbacks"]
    models = straight.parent / "models"
    assert (models / "latest").resolve() == (stage / "model").resolve()


def test_baked_model_has_the_reported_loss(runs):
    """Opened separately and scored conversation by conversation: packing, padding and the token
    weighting of the trainer's evaluation change nothing, and the best checkpoint was baked.
    Its experts are rounded, so the loss is the one reported after baking."""
    import torch

    from sparselong.data.conversations import read, tokenize
    from sparselong.model import load_model, load_tokenizer

    straight, _, manifest, _ = runs
    model = load_model(straight / "03_finetune/model", device=torch.device("cpu"))
    tokenizer = load_tokenizer(straight / "03_finetune/model")
    total = count = 0
    for row in read(straight / "data/validation.jsonl"):
        tokens, supervised = tokenize(row, tokenizer, "assistant", datetime.date.today())
        if len(tokens) > 128:
            continue
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokens])).logits[0, :-1].double()
        learned = torch.tensor(supervised[1:])
        wanted = torch.tensor(tokens[1:])[learned]
        total += float(torch.nn.functional.cross_entropy(logits[learned], wanted, reduction="sum"))
        count += len(wanted)
    metrics = manifest["metrics"]
    assert math.exp(total / count) == pytest.approx(metrics["baked_eval_perplexity"], rel=1e-5)
    best = metrics["eval_perplexity"][str(metrics["best_step"])]
    assert best < metrics["baked_eval_perplexity"] < metrics["eval_perplexity"]["0"]
    best_adapter, adapter = (
        (straight / "03_finetune" / name / "adapter_model.safetensors").read_bytes()
        for name in ("best", "adapter")
    )
    assert adapter == best_adapter
