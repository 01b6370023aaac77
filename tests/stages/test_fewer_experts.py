"""experts.keep end to end: what stage 02 writes, training, exports, interruption, refusals."""

import json
import shutil
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from sparselong.adapters.attach import tuned_layers
from sparselong.checkpoint import Checkpoint, pack_two_four_experts
from sparselong.checkpoint.kept_experts import read_kept
from sparselong.compress import report
from sparselong.compress.calibration import HiddenStates
from sparselong.config import load
from sparselong.errors import StageError
from sparselong.export.hub import card
from sparselong.export.mxfp4 import Mxfp4Format
from sparselong.memory import compressed_groups, make_plan
from sparselong.memory.shape import drop_experts, tiny_shape
from sparselong.model import load_model
from sparselong.run import Stage, read_manifest
from tests.conftest import replace_values
from tests.stages import test_export_gguf
from tests.stages.conftest import ADAPTED, run
from tests.stages.test_compress_interrupted import assert_same_result, edit_tensors
from tests.stages.test_export import export, manifest_of
from tests.stages.trained import CPU, TOKENS, Trained, finish_training, open_training

KEEP = 5
PLAIN = ["shared_dense.weight_bits=16", "shared_dense.sparsity=none"]
"""Attention as it is, so that a run takes a second."""
ROW_PARTS = ("router.weight", "router.bias", "_blocks", "_scales", "_proj_bias")


@pytest.fixture(scope="module")
def arguments(small_arguments) -> list[str]:
    return [*small_arguments, f"experts.keep={KEEP}"]


@pytest.fixture(scope="module")
def kept_run(tmp_path_factory, arguments) -> tuple[Path, torch.Tensor]:
    """A finished stage 02, and the hidden states that it computed last."""
    run_dir, states = tmp_path_factory.mktemp("kept") / "run", []
    with pytest.MonkeyPatch.context() as patch:
        save = HiddenStates.save

        def note(self, seconds):
            states[:] = [self.states]
            save(self, seconds)

        patch.setattr(HiddenStates, "save", note)
        assert run(run_dir, arguments) == 0
    return run_dir, states[0]


@pytest.fixture(scope="module")
def trained(kept_run, arguments, tmp_path_factory) -> Trained:
    """The run with a stage 03 that has adapters on attention, experts and routers."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    shutil.copytree(kept_run[0], run_dir, symlinks=True)
    return finish_training(run_dir, [*arguments, *ADAPTED])


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        assert not found.keys() & tensors.keys(), "a tensor is in two files"
        found |= tensors
    return found


def metrics_of(run_dir: Path) -> dict:
    return json.loads((run_dir / "02_compress/manifest.json").read_text())["metrics"]


def test_kept_experts_have_the_bases_bytes(kept_run, untrained_base):
    model, base = Checkpoint(kept_run[0] / "02_compress/model"), read_all(untrained_base)
    stored, kept = read_all(model.directory), read_kept(model, Checkpoint(untrained_base))
    assert model.config["num_local_experts"] == KEEP and kept is not None
    assert len(kept) == 4 and len({tuple(layer) for layer in kept}) > 1
    for name in (name for name in base if name.endswith(ROW_PARTS)):
        rows = kept[int(name.split(".")[2])]
        assert rows == sorted(set(rows)) and len(rows) == KEEP
        assert torch.equal(stored[name], base[name][rows]), name
    unchanged = {name for name in base if not name.endswith((*ROW_PARTS, "_proj.weight"))}
    assert unchanged and all(torch.equal(stored[name], base[name]) for name in unchanged)


def test_what_the_manifest_says(kept_run, untrained_base):
    metrics = metrics_of(kept_run[0])
    found = metrics["kept_experts"]
    assert (found["experts"], found["base"], len(found["layers"])) == (KEEP, 8, 4)
    assert 0 < found["lost_weight"] < 0.5
    model = Checkpoint(kept_run[0] / "02_compress/model")
    kept = read_kept(model, Checkpoint(untrained_base))
    assert kept is not None
    for layer, experts in zip(found["layers"], kept, strict=True):
        scores = [float(score) for score in layer["scores"].split()]
        assert min(scores[e] for e in experts) >= max(
            scores[e] for e in range(8) if e not in experts
        )
    assert metrics["experts_bit_exact"] is metrics["masters_match"] is True
    assert metrics["name"] == "base-w4a16-experts-4bit-keep5-2of4"
    log = (kept_run[0] / "02_compress/log.txt").read_text()
    assert "warning: experts.keep is experimental" in log
    assert log.count("5 of 8 experts kept, the others had") == 4 and "bits per weight" in log
    assert "Experts by layer" in (kept_run[0] / "report.html").read_text()


def test_an_altered_expert_is_not_called_bit_exact(kept_run, untrained_base, tmp_path):
    model = Checkpoint(shutil.copytree(kept_run[0] / "02_compress/model", tmp_path / "model"))
    base = Checkpoint(untrained_base)
    assert report.experts_bit_exact(base, model)
    record = model.tensors["model.layers.2.mlp.experts.down_proj_scales"]
    with (model.directory / record.file).open("r+b") as file:
        file.seek(record.end - 1)
        last = file.read(1)[0]
        file.seek(record.end - 1)
        file.write(bytes([last ^ 1]))
    assert not report.experts_bit_exact(base, model)


def test_the_plan_has_the_bytes_that_were_written(kept_run, arguments):
    config = load(arguments[1], arguments[2:])
    groups = compressed_groups(drop_experts(tiny_shape(4), config), config)
    written = metrics_of(kept_run[0])["bytes_on_disk"]
    assert sum(groups.values()) == written
    plan = make_plan(config)
    assert plan.disk["compressed_model"] == plan.disk["finetuned_model"] == written
    assert plan.disk["base"] == metrics_of(kept_run[0])["base_bytes_on_disk"]
    assert plan.linkable["compressed_model"] == 0


def test_later_layers_were_calibrated_on_the_model_that_is_left(kept_run, arguments):
    from sparselong.compress.calibration import calibration_tokens
    from sparselong.data import encode_files
    from sparselong.model import load_tokenizer

    run_dir, states = kept_run
    model = load_model(run_dir / "02_compress/model", device=CPU)
    config = load(arguments[1], arguments[2:])
    encoded = encode_files(config, run_dir, load_tokenizer(Path(model.name_or_path)))
    with torch.no_grad():
        out = model.model(calibration_tokens(config, encoded.train)).last_hidden_state
        assert torch.equal(out, model.model.norm(states))


def test_two_four_experts_are_those_without_dropping(arguments, tmp_path, untrained_base):
    assert run(tmp_path / "run", [*arguments, *PLAIN, "experts.sparsity=2:4"]) == 0
    folder, base = tmp_path / "run/02_compress/model", read_all(untrained_base)
    stored, kept = read_all(folder), read_kept(Checkpoint(folder), Checkpoint(untrained_base))
    assert kept is not None
    for name in (name for name in base if name.endswith("_blocks")):
        stem, rows = name.removesuffix("_blocks"), kept[int(name.split(".")[2])]
        for key, whole in zip(("kept", "patterns"), pack_two_four_experts(base[name]), strict=True):
            assert torch.equal(stored[f"{stem}_{key}"], whole[rows])
        assert name not in stored
        assert torch.equal(stored[f"{stem}_scales"], base[f"{stem}_scales"][rows])
    assert torch.isfinite(load_model(folder)(TOKENS).logits).all()
    assert metrics_of(tmp_path / "run")["bits_per_weight"]["experts"] < 3.15


def test_stage_03s_model_trains_on_the_experts_that_are_left(kept_run, arguments):
    tuned = open_training(kept_run[0], load(arguments[1], [*arguments[2:], *ADAPTED]))
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=2e-3)
    losses = []
    for _ in range(6):
        loss = tuned(input_ids=TOKENS, labels=TOKENS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1, losses
    experts = [one for name, one in tuned_layers(tuned).items() if name.endswith("experts")]
    shapes = {tuple(one.adapters()["gate_up_proj"].a.shape) for one in experts}
    assert shapes == {(KEEP, 2, 128)}


def test_exports_are_the_model_in_plain_transformers_and_in_gguf(trained):
    assert export(trained, "--to", "mxfp4", "hf-bf16", "gguf") == 0
    for name in ("mxfp4", "hf-bf16"):
        folder = trained.run_dir / "05_export" / name
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        assert type(model.model.layers[0].mlp.experts) is GptOssExperts
        assert model.config.num_local_experts == KEEP
        with torch.no_grad():
            logits = model.float().eval()(input_ids=TOKENS).logits
        assert (logits - trained.logits).norm() < 1e-5 * trained.logits.norm(), name
    metrics = manifest_of(trained.run_dir, "mxfp4")["metrics"]
    assert metrics["untouched_tensors"] > 0
    assert "model.layers.0.mlp.router.bias" not in metrics["differing_from_base"]
    fields = gguf.GGUFReader(test_export_gguf.file_of(trained)).fields
    assert fields["gpt-oss.expert_count"].contents() == KEEP
    test_export_gguf.test_the_packages_reader_decodes_every_tensor_to_the_sources_values(trained)


def test_an_export_with_other_rows_than_the_bases_is_refused(
    kept_run, arguments, tmp_path, untrained_base
):
    run_dir = shutil.copytree(kept_run[0], tmp_path / "run", symlinks=True)
    compressed = Trained(run_dir, arguments, TOKENS)
    assert export(compressed, "--to", "mxfp4", "--from", "compressed") == 0
    metrics = manifest_of(run_dir, "mxfp4")["metrics"]
    projections = {name for name in read_all(untrained_base) if name.endswith("_proj.weight")}
    assert set(metrics["differing_from_base"]) == projections
    options = {"from": "compressed"}
    config = load(arguments[1], arguments[2:])
    stage = Stage("05_export", config, run_dir, part="mxfp4", options=options)
    stage.manifests = {"02_compress": read_manifest(run_dir, "02_compress") or {}}
    path = stage.dir / "config.json"
    document = json.loads(path.read_text())
    kept = document["sparselong_experts"]["kept"]
    kept[2] = "0-4" if kept[2] != "0-4" else "1-5"
    path.write_text(json.dumps(document))
    with pytest.raises(StageError, match="no stage should have changed") as caught:
        Mxfp4Format().verify(stage)
    assert "model.layers.2.mlp" in str(caught.value)


def test_an_interrupted_run_gives_the_same_bytes(kept_run, arguments, tmp_path, monkeypatch):
    """Interrupted after the second layer's files were written, before its states were."""
    commit, calls = HiddenStates.commit, []

    def stop(self):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        commit(self)

    with monkeypatch.context() as patch:
        patch.setattr(HiddenStates, "commit", stop)
        assert run(tmp_path / "run", arguments) == 1
    assert run(tmp_path / "run", arguments) == 0
    assert_same_result(tmp_path / "run", kept_run[0])
    assert metrics_of(tmp_path / "run")["kept_experts"] == metrics_of(kept_run[0])["kept_experts"]


def test_experts_that_calibration_never_reaches(arguments, tmp_path, untrained_base):
    """Three routers' biases let only five experts be chosen; one of the others must be kept."""
    base = shutil.copytree(untrained_base, tmp_path / "base")

    def refuse(bias: torch.Tensor) -> torch.Tensor:
        bias[[1, 4, 6]] = -1e4
        return bias

    edit_tensors(base, "model.layers.1.mlp.router.bias", refuse)
    changed = replace_values([*arguments, *PLAIN, f"model.base={base}", "experts.keep=6"])
    assert run(tmp_path / "run", changed) == 0
    layers = metrics_of(tmp_path / "run")["kept_experts"]["layers"]
    assert [layer["unreached"] for layer in layers] == [0, 3, 0, 0]
    assert layers[1]["kept"] == "0-3 5 7" and layers[1]["lost_weight"] == 0.0
    log = (tmp_path / "run/02_compress/log.txt").read_text()
    assert "layer 1: calibration reached only 5 experts, so 1 were kept without a score" in log


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["experts.keep=3"], ["experts.keep is too small", "from 4", "to 7"]),
        (["experts.keep=9"], ["experts.keep is more than the 8 experts", "experts.keep: 9"]),
        (["experts.keep=8"], ["experts.keep would remove nothing", "remove it"]),
        (
            ["experts.keep=6", "expert_parallel_degree=4"],
            ["expert_parallel_degree", "the 6 of experts.keep", "one of 1, 2\n"],
        ),
        (["experts.keep=6", "expert_parallel_degree=3"], ["expert_parallel_degree", "8 experts"]),
    ],
)
def test_what_cannot_be_kept_is_refused(small_arguments, tmp_path, capsys, overrides, words):
    assert run(tmp_path / "run", [*small_arguments, *overrides]) == 2
    shown = capsys.readouterr().err
    assert all(word in shown for word in words), shown
    assert not (tmp_path / "run").exists()


def test_a_finished_run_with_another_number_is_not_mixed(kept_run, small_arguments, capsys):
    assert run(kept_run[0], [*small_arguments, "experts.keep=6"]) == 1
    assert "experts.keep=6" in (shown := capsys.readouterr().err) and "experts.keep=5" in shown
    assert run(kept_run[0], small_arguments) == 1
    assert "experts.keep=null" in capsys.readouterr().err


def test_what_was_reduced_before(trained, small_arguments, tmp_path, capsys):
    """An export is a base like any other, but for choosing among its experts once more."""
    base = trained.run_dir / "05_export/mxfp4"
    if not (base / "config.json").exists():
        assert export(trained, "--to", "mxfp4") == 0
    again = [*small_arguments, *PLAIN, f"model.base={base}"]
    assert run(tmp_path / "run", [*again, "experts.keep=4"]) == 2
    shown = capsys.readouterr().err
    assert "have been removed before" in shown and "set model.base to the original" in shown
    assert run(tmp_path / "run", again) == 0
    metrics = metrics_of(tmp_path / "run")
    assert metrics["experts_bit_exact"] is True and "kept_experts" not in metrics
    packed = [*small_arguments, f"model.base={trained.run_dir / '02_compress/model'}"]
    assert run(tmp_path / "other", [*packed, "experts.keep=4"]) == 1
    assert "already compressed" in capsys.readouterr().err


def test_the_adapter_is_no_change_of_the_base(trained, capsys):
    plain = trained._replace(arguments=[*trained.arguments, *PLAIN])
    assert export(plain, "--to", "adapter") == 2
    shown = capsys.readouterr().err
    assert "does not fit the base" in shown and "experts.keep=5" in shown


def test_the_model_card_says_what_was_dropped(trained):
    config = load(trained.arguments[1], trained.arguments[2:])
    stage = Stage("05_export", config, trained.run_dir, part="hub", options={"from": "finetuned"})
    names = ("02_compress", "03_finetune")
    stage.manifests = {name: read_manifest(trained.run_dir, name) or {} for name in names}
    text = card._describe_method(stage, {})
    assert "Experimental: each layer has 5 of the base's 8 experts" in text
    assert "masters" not in text and "experts 4.3" in text
