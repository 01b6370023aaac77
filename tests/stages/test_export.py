"""05_export: the forms open elsewhere and are the model; interrupted, refused, redone."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparselong.checkpoint import pack_two_four_experts, unpack_two_four_experts
from sparselong.errors import StageError
from sparselong.export import shards
from sparselong.export.source import Source, decode_exactly
from sparselong.model import load_model
from sparselong.packing import mxfp4
from tests.conftest import load_script, replace_values
from tests.stages.trained import CPU, TOKENS, Trained

export_script = load_script("05_export")
MODELS = ("mxfp4", "hf-bf16")
OPEN_ALONE = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
tokens = load_file(sys.argv[1])["tokens"]
found = {}
for folder in sys.argv[3:]:
    name = folder.rpartition("/")[2]
    assert len(AutoTokenizer.from_pretrained(folder)) > 1000
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    assert model.dtype == torch.bfloat16, model.dtype
    with torch.no_grad():
        found[f"{name} bf16"] = model(input_ids=tokens).logits.float()
        found[f"{name} fp32"] = model.float()(input_ids=tokens).logits
assert not [name for name in sys.modules if name.startswith("sparselong")]
save_file(found, sys.argv[2])
"""


def export(trained: Trained, *more: str, run_dir: Path | None = None) -> int:
    where = ["--run-dir", str(run_dir or trained.run_dir)]
    return export_script.main(replace_values([*trained.arguments, *where, *more]))


def manifest_of(run_dir: Path, name: str) -> dict:
    return json.loads((run_dir / "05_export" / name / "manifest.json").read_text())


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def hashes_of(folder: Path) -> dict[str, str]:
    found = tensors_of(folder).items()
    return {k: hashlib.sha256(v.view(torch.uint8).numpy()).hexdigest() for k, v in found}


@pytest.fixture(scope="module")
def exported(trained_run) -> Trained:
    assert export(trained_run, "--to", *MODELS) == 0
    return trained_run


@pytest.fixture
def copied(trained_run, tmp_path) -> Path:
    """A copy of the run without any export."""
    ignored = shutil.ignore_patterns("05_export")
    return shutil.copytree(trained_run.run_dir, tmp_path / "run", symlinks=True, ignore=ignored)


@pytest.fixture
def small_shards(monkeypatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 400_000)


def open_alone(python: str, folders: list[Path], tmp_path: Path) -> dict[str, torch.Tensor]:
    """Return logits from a process that never imports this project."""
    save_file({"tokens": TOKENS}, tmp_path / "tokens")
    command = [python, "-c", OPEN_ALONE, tmp_path / "tokens", tmp_path / "logits"]
    done = subprocess.run([*command, *folders], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return load_file(tmp_path / "logits")


def test_plain_transformers_gives_the_logits_of_the_model_in_memory(
    exported, tmp_path, forked_python
):
    """In fp32 to 1e-5; in bf16 with at most twice the rounding of the packed model in bf16."""
    folders = [exported.run_dir / "05_export" / name for name in MODELS]
    found, wanted = open_alone(forked_python, folders, tmp_path), exported.logits
    packed = load_model(exported.run_dir / "03_finetune/model", device=CPU).bfloat16()
    with torch.no_grad():
        rounding = (packed(input_ids=TOKENS).logits.float() - wanted).norm()
    for name in MODELS:
        error = (found[f"{name} fp32"] - wanted).norm() / wanted.norm()
        assert error < 1e-5, (name, error)
        assert (found[f"{name} bf16"] - wanted).norm() < 2 * rounding
    assert torch.equal(found["mxfp4 bf16"], found["hf-bf16 bf16"])


def test_tensors_that_no_stage_changed_have_the_bases_hashes(exported, untrained_base):
    base, mine = (
        hashes_of(folder) for folder in (untrained_base, exported.run_dir / "05_export/mxfp4")
    )
    same = {name for name in base if mine[name] == base[name]}
    tuned = ("_proj.weight", "router.weight", "_blocks", "_scales")
    assert base.keys() == mine.keys()
    assert same >= {name for name in base if not name.endswith(tuned)}
    assert not {name for name in same if name.endswith(tuned[:3])}
    dense = {name for name in base if not name.endswith(tuned[2:])}
    for name, names in (("mxfp4", base.keys()), ("hf-bf16", dense)):
        metrics = manifest_of(exported.run_dir, name)["metrics"]
        assert metrics["untouched_tensors"] == len([n for n in base if not n.endswith(tuned)])
        assert metrics["identical_to_base"] == len(same & names)
        assert metrics["differing_from_base"] == sorted(names - same)


def test_a_tensor_that_no_stage_may_change_is_found(exported, copied, monkeypatch, capsys):
    """As if a stage had changed a norm and recorded it."""
    real = Source.parts

    def parts(self, name, step=None):
        for part in real(self, name, step):
            yield part + 1 if name == "model.norm.weight" else part

    monkeypatch.setattr(Source, "parts", parts)
    for name in MODELS:
        assert export(exported, "--to", name, run_dir=copied) == 1
        told = capsys.readouterr().err
        assert "that no stage should have changed" in told and "model.norm.weight" in told


def test_manifests_have_the_documented_metrics(exported):
    for name in MODELS:
        manifest = manifest_of(exported.run_dir, name)
        metrics = manifest["metrics"]
        assert metrics["reloaded"] is metrics["tensors_identical"] is True
        assert metrics["tensors"] > 70
        assert metrics["bytes"] == sum(row["bytes"] for row in manifest["outputs"])
        assert set(metrics["expert_merge_error"]["model.layers.3.mlp.experts"]) == {
            *("gate_up_proj", "down_proj")
        }
        assert (manifest["part"], manifest["options"]) == (name, {"from": "finetuned"})
        folder = exported.run_dir / "05_export" / name
        outputs = {Path(row["path"]).name: row["sha256"] for row in manifest["outputs"]}
        assert {"config.json", "tokenizer.json", "chat_template.jinja"} <= outputs.keys()
        assert "written.json" not in outputs
        for path in folder.glob("*.safetensors"):
            assert hashlib.sha256(path.read_bytes()).hexdigest() == outputs[path.name]
    config = json.loads((exported.run_dir / "05_export/hf-bf16/config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    config = json.loads((exported.run_dir / "05_export/mxfp4/config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "mxfp4"


def test_a_finished_export_is_up_to_date_and_one_is_redone_alone(exported, capsys):
    stamps = {name: manifest_of(exported.run_dir, name)["seconds"] for name in MODELS}
    assert export(exported, "--to", *MODELS) == 0
    assert capsys.readouterr().err.count("is up to date") == 2
    assert export(exported, "--to", "mxfp4", "--force") == 0
    assert manifest_of(exported.run_dir, "hf-bf16")["seconds"] == stamps["hf-bf16"]
    left = {path.name for path in (exported.run_dir / "05_export").iterdir()}
    assert left == set(MODELS)


def test_the_plan_has_the_bytes_of_the_tensors_and_touches_nothing(exported, copied, capsys):
    assert export(exported, "--to", *MODELS, "--dry-run", "--json", run_dir=copied) == 0
    plan = json.loads(capsys.readouterr().out)
    assert not (copied / "05_export").exists()
    for row, name in zip(plan["writes"], MODELS, strict=True):
        stored = tensors_of(exported.run_dir / "05_export" / name).values()
        assert row["bytes"] == sum(tensor.nbytes for tensor in stored)
    assert plan["bytes_on_disk"] == sum(row["bytes"] for row in plan["writes"])
    assert plan["estimated_seconds"] > 0


def test_the_compressed_model_can_be_exported_before_training(
    compressed_run, small_arguments, tmp_path
):
    run_dir = shutil.copytree(compressed_run, tmp_path / "run", symlinks=True)
    # Words after --to may be overrides.
    more = ["--run-dir", str(run_dir), "--from", "compressed", "--to", "mxfp4", "lora.r=4"]
    assert export_script.main([*small_arguments, *more]) == 0
    packed, plain = (
        load_model(run_dir / name) for name in ("02_compress/model", "05_export/mxfp4")
    )
    with torch.no_grad():
        logits = [model(input_ids=TOKENS).logits for model in (packed, plain)]
    assert torch.equal(*logits)


@pytest.mark.parametrize("name", MODELS)
def test_a_full_disk_leaves_nothing_half_named_and_whole_files_are_kept(
    exported, copied, small_shards, monkeypatch, capsys, name
):
    real, written = os.fsync, []

    def fsync(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(".safetensors.partial"):
            written.append(descriptor)
            if len(written) == 3:
                raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    folder = copied / "05_export" / name
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        assert export(exported, "--to", name, run_dir=copied) == 1
    told = capsys.readouterr().err
    assert "free disk space" in told and "files that are complete are kept" in told
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("model-*")}
    assert len(before) == 2 and not list(folder.glob("*.partial"))
    assert not (folder / "config.json").exists() and not (folder / "manifest.json").exists()
    (folder / "model-00003-of-00009.safetensors.partial").write_text("left by a kill")
    theirs = {folder / name for name in (".env", "README.md")}
    assert all(path.write_text("a person's") for path in theirs)
    assert export(exported, "--to", name, run_dir=copied) == 0
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("model-*.safetensors")}
    assert before.items() < after.items() and len(after) > 4
    assert hashes_of(folder) == hashes_of(exported.run_dir / "05_export" / name)
    recorded = {copied / row["path"] for row in manifest_of(copied, name)["outputs"]}
    assert not recorded & theirs and {path.read_text() for path in theirs} == {"a person's"}


def test_too_little_space_is_told_before_anything_is_written(exported, copied, monkeypatch, capsys):
    usage = shutil.disk_usage(copied)._replace(free=2_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert export(exported, "--to", "mxfp4", run_dir=copied) == 1
    assert "too little space" in capsys.readouterr().err
    assert not list((copied / "05_export/mxfp4").glob("model-*"))


def test_what_the_disk_returns_is_compared_with_the_source(exported, copied, monkeypatch, capsys):
    real = shards._stream

    def flip(path, *more):
        digest = real(path, *more)
        with path.open("r+b") as file:
            file.seek(-1000, os.SEEK_END)
            byte = file.read(1)[0]
            file.seek(-1000, os.SEEK_END)
            file.write(bytes([byte ^ 1]))
        return digest

    monkeypatch.setattr(shards, "_stream", flip)
    assert export(exported, "--to", "mxfp4", run_dir=copied) == 1
    assert "does not read as it was written" in capsys.readouterr().err
    assert not list((copied / "05_export/mxfp4").glob("model-*"))


def test_a_finished_file_that_was_edited_is_not_taken_over(
    exported, copied, small_shards, monkeypatch, capsys
):
    real, calls = shards._write_shard, []

    def stop(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "_write_shard", stop)
        assert export(exported, "--to", "mxfp4", run_dir=copied) == 1
    path = next((copied / "05_export/mxfp4").glob("model-00001-*"))
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert export(exported, "--to", "mxfp4", run_dir=copied) == 1
    assert "has changed since 05_export recorded it" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["02_compress", "03_finetune"])
def test_a_model_that_was_edited_by_hand_is_refused(exported, copied, capsys, name):
    path = next((copied / name / "model").glob("dense-*" if "02" in name else "tuned-*"))
    content = path.read_bytes()
    path.unlink()  # it may be a hard link
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert export(exported, "--to", "mxfp4", run_dir=copied) == 1
    assert f"has changed since {name} recorded it" in capsys.readouterr().err
    assert not list((copied / "05_export").glob("*/model-*"))


def test_no_run_and_half_a_run_are_refused(exported, copied, capsys):
    assert export(exported, "--to", "mxfp4", run_dir=copied.parent / "new") == 1
    assert "05_export needs 02_compress, which is not done" in capsys.readouterr().err
    (copied / "03_finetune/manifest.json").unlink()
    assert export(exported, "--to", "mxfp4", run_dir=copied) == 1
    assert "05_export needs 03_finetune, which is not done" in capsys.readouterr().err


def test_a_directory_of_another_export_or_of_a_person_is_not_overwritten(exported, copied, capsys):
    assert export(exported, "--to", "mxfp4", run_dir=copied) == 0
    other = ["--to", "mxfp4", "--from", "compressed"]
    assert export(exported, *other, run_dir=copied) == 1
    told = capsys.readouterr().err
    assert "holds a result that was made with other options" in told
    assert "expected: --to mxfp4 --from compressed\nfound:    --to mxfp4 --from finetuned" in told
    (copied / "05_export/mxfp4/notes.txt").write_text("a person's")
    assert export(exported, *other, "--force", run_dir=copied) == 0
    assert manifest_of(copied, "mxfp4")["options"] == {"from": "compressed"}
    assert (copied / "05_export/mxfp4.kept-1/notes.txt").read_text() == "a person's"
    theirs = copied / "05_export/hf-bf16"
    theirs.mkdir()
    (theirs / "weights.bin").write_text("a person's")
    assert export(exported, "--to", "hf-bf16", "--force", run_dir=copied) == 1
    assert "was not written by a stage" in capsys.readouterr().err
    assert [path.name for path in theirs.iterdir()] == ["weights.bin"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--to", "adapter"], "round(mask * (M + s*B*A)), which is no low-rank change"),
        (["--to", "mxfp4", "adapter"], "shared_dense.weight_bits=16"),
        (["--to", "adapter", "--from", "compressed"], "the compressed model has no adapter"),
        (["--to", "mxpf4"], "did you mean --to mxfp4?"),
        ([], "--to is missing"),
        (["--to", "mxfp4", "--from", "base"], "invalid choice: 'base'"),
    ],
)
def test_what_the_run_cannot_give_is_refused_before_anything_is_made(
    exported, copied, capsys, more, words
):
    assert export(exported, *more, run_dir=copied) == 2
    assert words in capsys.readouterr().err
    assert not (copied / "05_export").exists()


def test_pruned_experts_refuse_an_adapter(exported, copied, capsys):
    dense = ["shared_dense.weight_bits=16", "shared_dense.sparsity=none"]
    pruned = [*dense, "experts.sparsity=2:4", "lora.expert_targets=[]", "lora.expert_r=null"]
    assert export(exported, *pruned, "--to", "adapter", run_dir=copied) == 2
    assert "experts that stage 02 pruned" in capsys.readouterr().err


def test_pruned_experts_are_expanded_to_published_blocks(compressed_run, tmp_path):
    folder = shutil.copytree(compressed_run / "02_compress/model", tmp_path / "model")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = {name: load_file(folder / file)[name] for name, file in index.items()}
    expected = {}
    for name in [name for name in tensors if name.endswith("_blocks")]:
        kept, patterns = pack_two_four_experts(tensors.pop(name))
        stem = name.removesuffix("_blocks")
        tensors |= {f"{stem}_kept": kept, f"{stem}_patterns": patterns}
        expected[name] = unpack_two_four_experts(kept, patterns)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["expert_sparsity"] = "2:4"
    (folder / "config.json").write_text(json.dumps(config))
    source = Source(folder, CPU)
    for name, blocks in expected.items():
        assert torch.equal(torch.cat([*source.parts(name)]), blocks)
        assert source.shapes[name][1] == tuple(blocks.shape)
        scales = tensors[f"{name.removesuffix('_blocks')}_scales"]
        decoded = torch.cat([*source.decoded_experts(name.removesuffix("_blocks"))])
        assert torch.equal(decoded.float(), mxfp4.decode(blocks, scales).float().transpose(1, 2))


def test_every_code_under_every_scale_is_decoded_exactly():
    scales = torch.arange(253, dtype=torch.uint8)[:, None]  # the next one makes 6 infinite
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).repeat(253, 1, 1)
    scales = scales.repeat(1, 16)
    wanted = mxfp4.decode(blocks, scales, torch.float32)
    found = decode_exactly(blocks, scales)
    assert torch.equal(found.float(), wanted) and torch.isfinite(found).all()
    assert torch.equal(torch.signbit(found), torch.signbit(wanted))


@pytest.mark.parametrize("scale", [254, 252])
def test_a_value_that_bf16_cannot_hold_stops_the_export(compressed_run, tmp_path, scale):
    """A scale of 254 makes codes from 2 on infinite; 252 is the largest that no code overflows."""
    folder = shutil.copytree(compressed_run / "02_compress/model", tmp_path / "model")
    name = "model.layers.0.mlp.experts.down_proj"
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    path = folder / index[f"{name}_scales"]
    tensors = load_file(path)
    tensors[f"{name}_scales"][1, 2, 3] = scale
    path.unlink()
    save_file(tensors, path, {"format": "pt"})
    source = Source(folder, CPU)
    if scale == 252:
        assert len([*source.decoded_experts(name)]) == 8
        return
    with pytest.raises(StageError, match="cannot be stored in bf16"):
        list(source.decoded_experts(name))


def test_shards_hold_whole_tensors_in_order_up_to_the_limit():
    shapes = {name: ("U8", (size,)) for name, size in zip("abcde", (3, 4, 9, 1, 1), strict=True)}
    files = [[*each] for each in shards.plan_shards(shapes, limit_bytes=8).values()]
    assert files == [["a", "b"], ["c"], ["d", "e"]]
    assert [*shards.plan_shards(shapes, 100)] == ["model-00001-of-00001.safetensors"]
