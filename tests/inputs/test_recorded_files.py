"""Later stages read only what earlier ones recorded.

Files are compared by size and time, and by content where those differ.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from sparselong import provenance
from sparselong.adapters import Masters
from sparselong.checkpoint import check_recorded, take_inventory
from sparselong.compress import stream
from sparselong.compress.layers import LayerStream
from sparselong.config import load
from sparselong.errors import StageError
from sparselong.evaluate import evaluate
from sparselong.evaluate.inputs import check_models
from sparselong.finetune import check_compressed, finetune
from sparselong.run import Stage, read_manifest
from sparselong.run.directory import finish, prepare
from tests.conftest import load_script
from tests.inputs.conftest import QUICK

SHARD = "model-00001-of-00004.safetensors"


@pytest.fixture(scope="module")
def finished(untrained_base, small_arguments, tmp_path_factory) -> Path:
    """A base and a finished stage 02 on it, with a stand-in for stage 03."""
    folder = tmp_path_factory.mktemp("recorded")
    shutil.copytree(untrained_base, folder / "base")
    arguments = [*small_arguments, *QUICK, f"model.base={folder / 'base'}"]
    assert load_script("02_compress").main([*arguments, "--run-dir", str(folder / "run")]) == 0
    trained = open_stage(folder, "03_finetune", arguments)
    assert not prepare(trained, redo=False)
    shutil.copytree(folder / "run/02_compress/model", trained.dir / "model")
    trained.outputs = [trained.dir / "model"]
    finish(trained, 1.0)
    return folder


def open_stage(folder: Path, name: str, arguments: list[str]) -> Stage:
    return Stage(name, load(arguments[1], arguments[2:]), folder / "run")


@pytest.fixture
def here(finished, tmp_path) -> Path:
    """A copy of base and run directory that the test may change; hard links become copies."""
    folder = tmp_path / "here"
    shutil.copytree(finished, folder, symlinks=True)  # copies times too
    return folder


@pytest.fixture
def stages(here, small_arguments) -> tuple[Stage, Stage]:
    """Stages 03 and 04 of the copy, about to begin."""
    arguments = [*small_arguments, *QUICK, f"model.base={here / 'base'}"]
    found = []
    for name in ("03_finetune", "04_eval"):
        stage = open_stage(here, name, arguments)
        reads = ("02_compress", "03_finetune")[: len(found) + 1]
        stage.manifests = {r: read_manifest(stage.run_dir, r) or {} for r in reads}
        found.append(stage)
    return found[0], found[1]


def flip(path: Path) -> None:
    """Change a byte at a file's end, and its time."""
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


CHANGES: dict[str, tuple[str, Callable[[Path], object], tuple[str, ...]]] = {
    "shard": (f"model/{SHARD}", flip, ("has changed since", "sha256")),
    "packed layer": ("model/dense-00002.safetensors", flip, ("has changed since",)),
    "config": (
        "model/config.json",
        lambda p: p.write_text(p.read_text() + " "),
        ("has changed since", "bytes"),
    ),
    "tokenizer": ("model/tokenizer.json", Path.unlink, ("has changed since", "No such file")),
    "new template": (
        "model/additional_chat_templates",
        lambda p: (p.mkdir(), (p / "default.jinja").write_text("{{ 1 }}")),
        ("default.jinja is new",),
    ),
    "new token map": (
        "model/added_tokens.json",
        lambda p: p.write_text("{}"),
        ("added_tokens.json is new",),
    ),
    "adapter": (
        "model/adapter_config.json",
        lambda p: p.write_text("{}"),
        ("contains an adapter",),
    ),
    "single file": (
        "model/model.safetensors",
        lambda p: p.write_text("{}"),
        ("two sets of weights",),
    ),
}
MASTERS = {
    "master": ("masters/layer-00001.safetensors", flip, ("has changed since",)),
    "lost master": ("masters/layer-00003.safetensors", Path.unlink, ("No such file",)),
}


@pytest.mark.parametrize("case", [*CHANGES, *MASTERS])
def test_a_change_of_stage_02s_result_is_refused_by_the_later_stages(here, stages, case):
    name, change, words = (CHANGES | MASTERS)[case]
    change(here / "run/02_compress" / name)
    for check, stage in zip((check_compressed, check_models), stages, strict=True):
        if case in MASTERS and check is check_models:
            continue  # stage 04 does not read masters
        with pytest.raises(StageError) as caught:
            check(stage)
        for word in words:
            assert word in str(caught.value), caught.value
        if "has changed" in str(caught.value):
            assert "02_compress recorded" in str(caught.value)
            assert "python 02_compress.py --force" in caught.value.fix


@pytest.mark.parametrize("case", CHANGES)
def test_a_change_of_stage_03s_result_is_refused_by_stage_04(here, stages, case):
    name, change, words = CHANGES[case]
    change(here / "run/03_finetune" / name)
    with pytest.raises(StageError) as caught:
        check_models(stages[1])
    for word in words:
        assert word in str(caught.value), caught.value


@pytest.mark.parametrize("case", [c for c in CHANGES if c != "packed layer"])
def test_a_change_of_the_base_is_refused_by_stage_04(here, stages, case):
    name, change, words = CHANGES[case]
    change(here / "base" / name.removeprefix("model/"))
    with pytest.raises(StageError) as caught:
        check_models(stages[1])
    for word in words:
        assert word in str(caught.value), caught.value


def test_touched_and_restored_files_pass(here, stages):
    for path in here.rglob("*"):
        if path.is_file():
            touch(path)
    check_compressed(stages[0])
    check_models(stages[1])


def test_files_as_they_were_are_not_read_again(here, stages, monkeypatch):
    """The 120b has 65 GB."""
    monkeypatch.setattr(provenance, "hash_file", lambda path: pytest.fail(f"{path} is read"))
    check_compressed(stages[0])
    check_models(stages[1])
    rows = stages[0].manifests["02_compress"]["outputs"]
    run_dir = here / "run"
    os.link(run_dir / "02_compress/model" / SHARD, run_dir / "linked.safetensors")
    again = provenance.describe_files(
        [run_dir / "02_compress/model", run_dir / "linked.safetensors"], run_dir, rows
    )
    assert again[:-1] == [row for row in rows if "/model/" in row["path"]]
    assert again[-1]["sha256"] in {row["sha256"] for row in rows}


def test_a_base_that_moved_is_the_same_base(here, stages):
    """A hub cache may move; its folders are compared by their files' names."""
    (here / "base").rename(here / "elsewhere")
    rows = stages[1].manifests["02_compress"]["inputs"]
    check_recorded(take_inventory(here / "elsewhere"), rows, "02_compress")
    flip(here / "elsewhere" / SHARD)
    with pytest.raises(StageError, match="elsewhere/model-00001.*has changed"):
        check_recorded(take_inventory(here / "elsewhere"), rows, "02_compress")


def test_a_hub_cache_in_the_run_directory_is_recorded_by_its_files_names(base, tmp_path):
    """The snapshot's files are links to blobs that are named by hashes."""
    run_dir = tmp_path / "run"
    snapshot, blobs = run_dir / "cache/snapshots/1", run_dir / "cache/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(base.iterdir())):
        shutil.move(path, blobs / str(number))
        (snapshot / path.name).symlink_to(blobs / str(number))
    inventory = take_inventory(snapshot)
    rows = provenance.describe_files(inventory.paths, run_dir)
    assert [row["path"] for row in rows] == [f"cache/snapshots/1/{n}" for n in inventory.names]
    check_recorded(inventory, rows, "02_compress")
    flip((snapshot / "config.json").resolve())
    with pytest.raises(StageError, match="config.json has changed"):
        check_recorded(inventory, rows, "02_compress")


def test_scripts_refuse_before_anything_is_imported(finished, here, run_script):
    """Stage 03 names the file, and has not begun to train; so does stage 04."""
    flip(here / "run/02_compress/model" / SHARD)
    base = f"model.base={finished / 'base'}"
    for name in ("04_eval", "03_finetune"):
        outcome = run_script(name, base, run_dir=here / "run")
        outcome.assert_explained(SHARD, "02_compress recorded", "--force")
        if name == "04_eval":
            shutil.rmtree(here / "run/03_finetune")
    assert not (here / "run/03_finetune/axolotl.yaml").exists()


def test_copies_beside_the_masters_are_not_read(here):
    folder = here / "run/02_compress/masters"
    before = Masters(folder).files
    path = folder / "layer-00001.safetensors"
    doubled = {name: 2 * tensor for name, tensor in load_file(path).items()}
    for name in ("layer-00001 (copy).safetensors", "zzz.safetensors", "layer-1.bak.safetensors"):
        save_file(doubled, folder / name)
    assert Masters(folder).files == before
    save_file(doubled, folder / "layer-00010.safetensors")
    with pytest.raises(StageError, match="another file holds too"):
        Masters(folder)


def scale_a_layer(base: Path) -> None:
    """Double a weight of the third layer, as another fine-tune would."""
    for path in base.glob("*.safetensors"):
        tensors = load_file(path)
        for name in tensors:
            if name == "model.layers.2.self_attn.q_proj.weight":
                tensors[name] = tensors[name] * 2
                path.unlink()
                save_file(tensors, path, {"format": "pt"})
                return
    raise AssertionError("no such weight")


def test_a_base_that_changes_while_stage_02_is_interrupted_is_refused(
    base, run_script, monkeypatch, tmp_path
):
    """Half the layers would be of one base, half of another."""
    name, original, done = f"model.base={base}", LayerStream.compress, []

    def stop(*arguments):
        original(*arguments)
        done.append(1)
        if len(done) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LayerStream, "compress", stop)
        assert run_script("02_compress", name).code == 1
    kept = shutil.copytree(base, tmp_path / "kept")
    scale_a_layer(base)
    run_script("02_compress", name).assert_explained("has changed", "02_compress", "--force")
    shutil.rmtree(base)
    shutil.copytree(kept, base, copy_function=shutil.copyfile)  # other times, same content
    outcome = run_script("02_compress", name)
    assert outcome.code == 0 and "1 of 4 layers already done" in outcome.err, outcome.err
    manifest = json.loads((tmp_path / "run/02_compress/manifest.json").read_text())
    recorded = {Path(row["path"]).name for row in manifest["inputs"]}
    assert set(take_inventory(base).names) <= recorded


def test_a_base_that_changes_during_stage_02_is_refused(base, run_script, monkeypatch):
    original = stream._complete

    def change_first(*arguments):
        original(*arguments)
        scale_a_layer(base)

    monkeypatch.setattr(stream, "_complete", change_first)
    run_script("02_compress", f"model.base={base}").assert_explained("has changed")


def test_results_do_not_depend_on_files_times(here, stages):
    """Stage 02 redone with the same bytes leaves stage 03's work valid."""
    from sparselong.run.directory import _made_from

    before = _made_from(stages[0])
    path = here / "run/02_compress/manifest.json"
    manifest = json.loads(path.read_text())
    for row in manifest["outputs"]:
        row["mtime_ns"] += 1
    path.write_text(json.dumps(manifest))
    assert _made_from(stages[0]) == before
    manifest["outputs"][0]["sha256"] = "0"
    path.write_text(json.dumps(manifest))
    assert _made_from(stages[0]) != before


def test_a_manifest_of_an_earlier_version_is_compared_by_content(here, stages):
    """It has no times, and of the base only weights, config.json and tokenizer.json."""
    manifest = stages[1].manifests["02_compress"]
    for rows in (manifest["inputs"], manifest["outputs"]):
        for row in rows:
            del row["mtime_ns"]
    names = ("config.json", "tokenizer.json")
    manifest["inputs"] = [
        row for row in manifest["inputs"] if row["path"].endswith((".safetensors", *names))
    ]
    check_models(stages[1])
    flip(here / "base" / SHARD)
    with pytest.raises(StageError, match="has changed"):
        check_models(stages[1])


def test_torch_is_not_needed_to_refuse():
    """Refusals take less than two seconds."""
    import subprocess
    import sys

    code = (
        "import sys; from sparselong.finetune import check_compressed\n"
        "from sparselong.evaluate import check_models\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["train.jsonl", "validation.jsonl"])
def test_rows_that_were_made_again_from_a_changed_source_are_refused(stages, name):
    """Otherwise a model would be measured on conversations that it was trained on."""
    data = stages[0].run_dir / "data"
    files = [data / "train.jsonl", data / "validation.jsonl"]
    touch(data / name)
    stages[1].check_rows(files)
    with (data / name).open("a") as file:
        file.write("\n")
    record = json.loads((data / "source.json").read_text())
    record["files"] = provenance.describe_files(files, data)
    (data / "source.json").write_text(json.dumps(record))
    for stage, execute in zip(stages, (finetune, evaluate), strict=True):
        with pytest.raises(StageError, match="since 02_compress recorded it") as refusal:
            execute(stage)
        assert name in refusal.value.what and "02_compress.py --force" in refusal.value.fix
