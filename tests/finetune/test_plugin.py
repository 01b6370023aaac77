"""The plugin's hooks, with stand-ins for Axolotl, the model and the trainer."""

import dataclasses
import datetime
import importlib
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pyarrow
import pytest
from transformers import Trainer, TrainerState

from sparselong.adapters import ExtraAdapters
from sparselong.config import dump, load
from sparselong.data.encoding import Encoded, EncodedFiles
from sparselong.errors import StageError
from sparselong.finetune.keeping import Keeping
from sparselong.finetune.masked_trainer import MaskedTraining
from sparselong.finetune.state import Progress
from sparselong.finetune.training_run import RUN_KEY, TrainingRun
from sparselong.provenance import refuse_changes
from sparselong.run.manifests import FORMAT_VERSION
from sparselong.runtime import HostInputs, current, using
from tests.conftest import ROOT

MODULE = "sparselong.finetune.axolotl_plugin"
OVERRIDES = [
    *("heads_k_stride=2", "lora.r=3", "lora.router=true", "seed=7", "data.train_on=all"),
    *("training.loss_target=1.5", "training.keep_experts=never"),
    *("training.early_stopping_patience=3", "training.early_stopping_threshold=0.25"),
    "finetuning_modifiers.MagnitudePruningModifier.criterion=magnitude",
    "finetuning_modifiers.MagnitudePruningModifier.update_frequency=0.5",
]


class AxolotlTrainer(Trainer):
    """Stands in for Axolotl's trainer."""


class TrainDatasetMeta(NamedTuple):
    """Stands in for Axolotl's class."""

    train_dataset: Any
    eval_dataset: Any
    total_num_steps: int | None = None


@pytest.fixture
def plugins(monkeypatch):
    """The plugin's module with stand-ins for its Axolotl imports."""
    names = {
        "axolotl.common.datasets": {"TrainDatasetMeta": TrainDatasetMeta},
        "axolotl.core.trainers.base": {"AxolotlTrainer": AxolotlTrainer},
        "axolotl.integrations.base": {"AdapterCapabilities": dict, "BasePlugin": object},
    }
    for name, values in names.items():
        made = ModuleType(name)
        vars(made).update(values)
        monkeypatch.setitem(sys.modules, name, made)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    yield importlib.import_module(MODULE)
    sys.modules.pop(MODULE, None)


@pytest.fixture
def run(tmp_path) -> TrainingRun:
    config = load(ROOT / "configs/tiny.yaml", OVERRIDES)
    (tmp_path / "03_finetune").mkdir()
    (tmp_path / "config.yaml").write_text(dump(config))
    compressed = tmp_path / "02_compress"
    compressed.mkdir()
    manifest = {
        **{"format_version": FORMAT_VERSION, "stage": "02_compress", "status": "done"},
        **{"config_hash": "0", "seconds": 1.0, "inputs": [], "outputs": []},
        "metrics": {"name": "tiny-w4a16"},
    }
    (compressed / "manifest.json").write_text(json.dumps(manifest))
    return TrainingRun(tmp_path, config)


@pytest.fixture
def plugin(plugins, run, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # restores what `register` changes
    made = plugins.SparseLongPlugin()
    made.register({RUN_KEY: str(run.directory)})
    return made


def test_the_plugin_is_given_only_the_run_directory(plugins, plugin, run):
    assert plugin.run.directory == run.directory
    assert plugin.run.config == plugin.sharing.layers.settle(run.config)
    args = plugins.SparseLongArgs
    assert plugin.get_input_args() == f"{MODULE}.{args.__name__}"
    assert list(args.model_fields) == [RUN_KEY]


def test_failures_are_written_to_the_stages_directory(plugin, run, capsys):
    sys.excepthook(StageError, StageError("it broke", "e", "f", "x", consequence=True), None)
    document = json.loads((run.work / "failure.json").read_text())
    assert document["what"] == "it broke" and document["consequence"] is True


def test_independent_processes_are_refused(plugins, run, monkeypatch):
    monkeypatch.setattr(plugins, "joined_rank", lambda: 1)
    with pytest.raises(StageError, match="independently of each other"):
        plugins.SparseLongPlugin().register({RUN_KEY: str(run.directory)})


def test_the_trainer_finds_its_config(plugins, plugin, run):
    made = plugin.get_trainer_cls(None)
    assert made.__name__ == "MaskedTrainer"
    assert issubclass(made, MaskedTraining) and issubclass(made, AxolotlTrainer)
    assert made.run.config.heads_k_stride == 2


@pytest.mark.parametrize(("resume", "starts"), [(None, True), ("checkpoint-4", False)])
def test_training_arguments(plugin, run, resume, starts):
    cfg = SimpleNamespace(resume_from_checkpoint=resume, max_steps=None, warmup_ratio=0.25)
    made = plugin.get_training_args(cfg)
    assert made["eval_on_start"] is starts
    assert (made["max_steps"], made["warmup_steps"]) == (-1, 0.25)
    assert made["logging_nan_inf_filter"] is False


def test_resized_embeddings_are_refused(plugin, run):
    """Axolotl appends random rows for tokens that it adds; they would never be stored."""
    (run.compressed).mkdir(exist_ok=True)
    (run.compressed / "config.json").write_text('{"vocab_size": 2048}')

    def model(rows: int) -> SimpleNamespace:
        return SimpleNamespace(get_input_embeddings=lambda: SimpleNamespace(num_embeddings=rows))

    plugin.pre_lora_load(None, model(2048))
    with pytest.raises(StageError, match="resized") as caught:
        plugin.pre_lora_load(None, model(2049))
    assert "2048 rows" in caught.value.expected and caught.value.found == "2049 rows"


@pytest.fixture
def files(plugins, tmp_path, monkeypatch) -> EncodedFiles:
    """Three training conversations and one for validation, of two tokens each."""
    row = {"input_ids": [0, 1], "supervised": [False, True], "dropped_thinking": 0}
    train, validation = (
        Encoded(tmp_path / name, pyarrow.Table.from_pylist([row] * count))
        for name, count in (("train.jsonl", 3), ("validation.jsonl", 1))
    )
    made = EncodedFiles(train, validation, datetime.date(2026, 1, 31))
    monkeypatch.setattr(plugins, "load_tokenizer", lambda path: f"tokenizer of {path.name}")
    monkeypatch.setattr(plugins, "encode_files", lambda *given: made)
    monkeypatch.setattr(plugins, "preview", lambda rows, tokenizer: f"{len(rows)} {tokenizer}\n")
    monkeypatch.setattr(plugins, "tell", lambda text: None)
    return made


def test_axolotl_gets_our_rows_and_our_attention(plugins, plugin, run, files):
    cfg = SimpleNamespace(attn_implementation="flex_attention")
    meta = plugin.load_datasets(cfg)
    assert cfg.attn_implementation == "eager"
    assert (len(meta.train_dataset), len(meta.eval_dataset)) == (3, 1)
    assert meta.eval_dataset[0] == {"input_ids": [0, 1], "labels": [-100, 1]}
    assert (run.work / "supervision.txt").read_text() == "3 tokenizer of model\n"
    assert plugin.supervised_token_fraction == 0.5


def test_a_split_sequence_uses_our_attention(plugins, plugin, run, files):
    plugin.run = TrainingRun(
        run.directory, run.config.model_copy(update={"sequence_parallel_degree": 4})
    )
    cfg = SimpleNamespace(attn_implementation="eager")
    plugin.load_datasets(cfg)
    assert cfg.attn_implementation == "sparselong"


def test_adapters_match_the_config(plugins, plugin, run, monkeypatch):
    given = {}
    monkeypatch.setattr(plugins, "tell", lambda text: None)
    monkeypatch.setattr(plugins, "describe_weights", lambda model: "")
    monkeypatch.setattr(plugins, "find_host_experts", lambda model: None)
    monkeypatch.setattr(plugins, "chunk_loss", lambda model: given.update(chunked=model))
    monkeypatch.setattr(plugins, "parameter_table", lambda tuned: "")
    monkeypatch.setattr(plugins, "Masters", lambda path: SimpleNamespace(read=path))

    def add(model, **more):
        given.update(more)
        return f"tuned {model}", "config"

    monkeypatch.setattr(plugins, "add_masked_lora", add)
    assert plugin.load_adapter("model", None) == ("tuned model", "config")
    assert given["chunked"] == "model"
    assert (given["r"], given["alpha"], given["seed"]) == (3, run.config.lora.alpha, 7)
    assert given["targets"] == list(run.config.lora.target_modules)
    assert given["master_of"] == run.directory / "02_compress/masters"
    assert given["extra"] == ExtraAdapters((), None, True)


@pytest.mark.parametrize("placement", ["gpu", "host"])
def test_the_model_is_opened_with_its_experts_in_their_place(
    plugins, plugin, monkeypatch, placement
):
    """And only the model: what follows runs with the settings of before."""
    host = SimpleNamespace(hash_tensors=lambda: {"0.scales": "aa"})
    for name in ("tell", "describe_weights", "chunk_loss", "parameter_table", "Masters"):
        monkeypatch.setattr(plugins, name, lambda *_: SimpleNamespace(read=None))
    monkeypatch.setattr(plugins, "add_masked_lora", lambda model, **_: (model, None))
    found = host if placement == "host" else None
    monkeypatch.setattr(plugins, "find_host_experts", lambda model: found)
    plugin.sharing = dataclasses.replace(plugin.sharing, placement=placement)
    plugin.pre_model_load(None)
    assert current().expert_placement == placement
    plugin.load_adapter("model", None)
    assert current().expert_placement == "gpu"
    assert plugin.frozen == ({"0.scales": "aa"} if found else {})


def test_callbacks_match_the_config(plugins, plugin, run, monkeypatch):
    monkeypatch.setattr(plugins, "tell", lambda text: None)
    monkeypatch.setattr(plugins, "RouterWatch", lambda model: ("watch", model))

    def decide(config, device, held):
        """Keep attention and the experts of three layers, whatever this machine's memory."""
        assert (config, held) == (plugin.run.config, plugin.sharing.held)
        counts = {"keep_attention": 2, "keep_experts": 3}
        return {key: Keeping("auto", count, 4, 9, 9, None) for key, count in counts.items()}

    monkeypatch.setattr(plugins, "decide_keeping", decide)
    trainer = SimpleNamespace(layers={}, progress=Progress(), model="model", predictions=None)
    made = plugin.add_callbacks_post_trainer(None, trainer)
    upkeep, passes, watch, metrics, stopping, clock = made
    assert (upkeep.update_frequency, upkeep.criterion) == (0.5, "magnitude")
    assert (passes.keep_attention, passes.keep_experts, passes.rows) == (True, 3, None)
    assert watch == ("watch", "model")
    assert metrics.path == run.work / "metrics.jsonl" and metrics.next_update == upkeep.next_step
    assert metrics.predictions is trainer.predictions is None
    asked = (stopping.loss_target, stopping.patience, stopping.threshold)
    assert asked == (1.5, 3, 0.25)
    assert metrics.progress is stopping.progress is trainer.progress
    assert clock.folder == run.work


@pytest.mark.parametrize(
    ("key", "rows"), [("slice_rows=16", 16), ("offload_checkpoints=true", 256)]
)
def test_layers_compute_as_was_decided(plugins, run, monkeypatch, key, rows):
    """In slices, or all of the longest sequence at once; evaluations too."""
    keys = [*OVERRIDES, "training.gradient_checkpointing=true", f"training.{key}"]
    keys += ["sequence_len=256", "micro_batch_size=1"]
    (run.directory / "config.yaml").write_text(dump(load(ROOT / "configs/tiny.yaml", keys)))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    plugin = plugins.SparseLongPlugin()
    plugin.register({RUN_KEY: str(run.directory)})
    monkeypatch.setattr(plugins, "RouterWatch", lambda model: None)
    monkeypatch.setattr(plugins, "tuned_layers", lambda model: {})
    monkeypatch.setattr(plugins, "count_trainable", lambda model: 0)
    trainer = SimpleNamespace(layers={}, progress=Progress(), model="model", predictions=None)
    _, passes, *_ = plugin.add_callbacks_post_trainer(None, trainer)
    assert passes.rows == rows
    assert isinstance(passes.inputs, HostInputs) == key.startswith("offload")
    plugin.post_trainer_create(None, fake_trainer())
    receipt = json.loads((run.work / "receipt.json").read_text())
    (asked,) = (name for name, value in receipt["layers"]["asked"].items() if value != "auto")
    assert receipt["layers"]["chosen"][asked] == receipt["layers"]["asked"][asked]
    assert "layers" not in receipt["expert_parallel_degree"]
    made = plugin.get_trainer_cls(None)
    with made.settings(SimpleNamespace(run=made.run)):
        assert current().inference_tokens == (16 if rows == 16 else 16_384)


def fake_trainer(**state) -> SimpleNamespace:
    """A finished trainer with one layer."""
    inner = SimpleNamespace(config=SimpleNamespace(_attn_implementation="eager"))
    model = SimpleNamespace(
        get_base_model=lambda: inner,
        modules=list,
        save_pretrained=lambda path, state_dict: Path(path).mkdir(),
    )
    return SimpleNamespace(
        model=model,
        callback_handler=SimpleNamespace(callbacks=[Progress()]),
        args=SimpleNamespace(max_steps=6),
        state=SimpleNamespace(global_step=6, best_metric=0.5, **state),
        progress=Progress(stopped={"step": 6, "reason": "a target"}),
        predictions=None,
        layers={},
        mesh=None,
        sharded={},
        newest="checkpoint-6",
        settings=lambda: using(attention_backend="triton", deterministic=True),
    )


def test_the_receipt_says_what_was_built(plugins, plugin, run, monkeypatch):
    monkeypatch.setattr(plugins, "tuned_layers", lambda model: {"b.q_proj": 0, "a.q_proj": 0})
    monkeypatch.setattr(plugins, "count_trainable", lambda model: 123)
    plugin.keeping = {"keep_experts": Keeping("never", 0, 4, 9, None, "no GPU")}
    plugin.post_trainer_create(None, fake_trainer())
    receipt = json.loads((run.work / "receipt.json").read_text())
    assert receipt["modules_replaced"] == ["a.q_proj", "b.q_proj"]
    assert (receipt["trainable_parameters"], receipt["total_steps"]) == (123, 6)
    assert (receipt["callbacks"], receipt["processes"]) == (["Progress"], 1)
    assert receipt["keep_experts"]["nothing_to_keep"] == "no GPU"


def test_the_best_checkpoint_is_baked_once(plugins, plugin, run, monkeypatch):
    baked, named = [], []
    monkeypatch.setattr(plugins, "tuned_layers", lambda model: {})
    monkeypatch.setattr(plugins, "tell", lambda text: None)
    monkeypatch.setattr(plugins, "two_four_conforming", lambda model: 1.0)
    monkeypatch.setattr(plugins, "name_adapter", lambda *given: named.append(given))
    monkeypatch.setattr(plugins, "bake_checkpoint", lambda *g: baked.append(g) or ("model", {}))
    (run.work / "model").mkdir()
    (run.work / "model/config.json").write_text("{}")
    plugin.trainer = fake_trainer(best_model_checkpoint="/elsewhere/checkpoint-4")
    assert not run.is_trained()
    plugin.post_train(None, None)
    plugin.post_train(None, None)  # Axolotl calls it twice
    assert baked == [(run.compressed, {}, run.work / "model")]
    assert named == [(run.work / "adapter", "tiny-w4a16")]
    document = json.loads((run.work / "baked.json").read_text())
    assert (document["best_checkpoint"], document["best_step"]) == ("checkpoint-4", 4)
    assert document["stopped"] == {"step": 6, "reason": "a target"}
    files = {row["path"] for row in document["files"]}
    assert {"03_finetune/model/config.json", "03_finetune/adapter/masks.safetensors"} <= files
    refuse_changes(document["files"], run.directory, "03_finetune")
    assert run.is_trained()  # from now on, a resumed run only bakes
    run.forget_end(Path("checkpoint-6"))
    assert run.is_trained()
    run.forget_end(Path("checkpoint-4"))
    assert not run.is_trained(), "its last checkpoint is damaged: the last steps are trained again"


def test_without_a_best_checkpoint_there_is_no_result(plugin, run):
    plugin.trainer = fake_trainer(best_model_checkpoint=None)
    with pytest.raises(StageError, match="there is no best checkpoint"):
        plugin.post_train(None, None)
    assert not run.is_trained()


def test_a_resumed_checkpoint_uses_the_configs_intervals(monkeypatch):
    """The checkpoint's own intervals come from the config it was written with."""

    def restore(self, max_steps, *rest):
        self.state = TrainerState(logging_steps=1, eval_steps=2, save_steps=2)
        return 1, 2

    class Training(MaskedTraining):
        def __init__(self):
            self.args = SimpleNamespace(logging_steps=4, eval_steps=2, save_steps=8)

    monkeypatch.setattr(Trainer, "_init_training_state", restore)
    training = Training()
    assert training._init_training_state(20, 5, 4, "checkpoint-4", None) == (1, 2)
    assert (training.state.logging_steps, training.state.save_steps) == (4, 8)


def test_a_moved_run_directory_is_opened_where_it_is(run, tmp_path):
    shutil.copytree(run.directory, tmp_path / "moved")
    assert TrainingRun.open(tmp_path / "moved").config == run.config
