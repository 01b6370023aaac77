"""The trainer's own code, with small fakes for transformers' part and the model.

Token counts, divisors and settings of passes are tested in test_trained_loss.py.
"""

from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer

from sparselong.errors import StageError
from sparselong.finetune import masked_trainer, state
from sparselong.finetune.masked_trainer import MaskedTraining
from sparselong.finetune.state import Progress
from sparselong.model import NAME

PAD = 0


class Rows(list):
    """Labelled rows, as the plugin gives them."""

    lengths = [5, 3, 2, 4, 1]

    def __init__(self):
        super().__init__({"input_ids": [1] * n, "labels": [1] * n} for n in self.lengths)


def lengths(rows: list) -> dict:
    """Collate rows or packs into their row lengths and the set of column names."""
    packs = [row if isinstance(row, list) else [row] for row in rows]
    columns = {name for pack in packs for row in pack for name in row}
    sizes = [[len(row["input_ids"]) for row in pack] for pack in packs]
    return {"sizes": sizes, "columns": columns}


class Training(MaskedTraining):
    """The trainer without transformers' initialization."""

    def __init__(self, **arguments):
        given = {
            "sample_packing": False,
            "multipack_real_batches": True,
            "max_seq_length": 6,
            "seed": 3,
            "per_device_eval_batch_size": 2,
            "dataloader_pin_memory": False,
            "warmup_steps": 0.1,
            "output_dir": "out",
        }
        self.args = SimpleNamespace(**{**given, **arguments})
        self.run = SimpleNamespace(
            config=SimpleNamespace(
                attention_backend="auto",
                deterministic=False,
                heads_k_stride=1,
                training=SimpleNamespace(gradient_checkpointing=False),
            )
        )
        self.processing_class = SimpleNamespace(pad_token_id=PAD)
        self.train_dataset = self.eval_dataset = Rows()
        self.data_collator = self.eval_data_collator = lengths
        self._train_batch_size = 2
        self.progress, self.mesh, self.bake_only = Progress(), None, False
        self.model = torch.nn.Linear(1, 1)
        self.state = SimpleNamespace(global_step=3, max_steps=10, best_model_checkpoint=None)
        self.control = SimpleNamespace(should_training_stop=False, should_log=True)


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Names of the base class's methods, in call order."""
    called: list[str] = []
    for name in (
        *("_run_epoch", "_save_checkpoint", "_save", "_load_from_checkpoint", "_load_best_model"),
        *("create_scheduler", "create_optimizer", "_maybe_log_save_evaluate"),
    ):
        monkeypatch.setattr(Trainer, name, lambda *_, name=name, **__: called.append(name))
    return called


def batches(loader) -> list[list[list[int]]]:
    return [batch["sizes"] for batch in loader]


def test_packs_fill_the_sequence_and_contain_every_row_once():
    loader = Training(sample_packing=True).get_train_dataloader()
    packs = [pack for batch in batches(loader) for pack in batch]
    assert sorted(size for pack in packs for size in pack) == [1, 2, 3, 4, 5]
    assert max(map(sum, packs)) <= 6 and len(packs) == 3
    assert next(iter(loader))["columns"] == {"input_ids", "labels", "position_ids"}


def test_without_real_batches_one_long_pack_replaces_several():
    loader = Training(sample_packing=True, multipack_real_batches=False).get_train_dataloader()
    packed = batches(loader)
    assert all(len(packs) == 1 for packs in packed)
    assert max(sum(packs[0]) for packs in packed) > 6


def test_without_packing_rows_are_whole_and_masked():
    loader = Training().get_train_dataloader()
    assert sorted(size for batch in batches(loader) for (size,) in batch) == [1, 2, 3, 4, 5]
    assert next(iter(loader))["columns"] == {"input_ids", "labels", "attention_mask"}


def test_the_order_depends_on_the_seed_and_the_epoch():
    loaders = [Training(seed=seed).get_train_dataloader() for seed in (3, 3, 4)]
    first, again, other = map(batches, loaders)
    assert first == again != other
    orders = []
    for epoch in range(8):
        loaders[0].batch_sampler.set_epoch(epoch)
        orders.append(batches(loaders[0]))
    assert orders[0] == first and any(order != first for order in orders)


def test_each_data_rank_has_its_own_batches():
    every = []
    for rank in range(2):
        training = Training()
        training.mesh = SimpleNamespace(data_rank=rank, data_size=2)
        training._train_batch_size = 1
        training.data_collator = lambda rows: {
            "input_ids": torch.tensor([row["input_ids"][0] for row in rows]),
            "labels": torch.tensor([len(row["labels"]) for row in rows]),
        }
        every.append([int(batch["labels"]) for batch in training.get_train_dataloader()])
    assert len(every[0]) == len(every[1]) == 3
    assert sorted(every[0] + every[1]) == [-100, 1, 2, 3, 4, 5]  # one is the empty batch


def test_every_data_rank_evaluates_as_many_batches():
    """Ranks that share experts exchange rows in every pass; one without a batch gets padding."""
    every = []
    for rank in range(2):
        training = Training()
        training.mesh = SimpleNamespace(data_rank=rank, data_size=2)
        training.eval_data_collator = lambda rows: {
            "input_ids": torch.ones(len(rows), 5),
            "labels": torch.tensor([len(row["labels"]) for row in rows]),
        }
        loader = training.get_eval_dataloader()
        every.append([batch["labels"].tolist() for batch in loader])
    assert every == [[[5, 3], [1]], [[2, 4], [-100, -100]]]


def test_evaluation_covers_all_rows_in_order():
    assert batches(Training().get_eval_dataloader()) == [[[5], [3]], [[2], [4]], [[1]]]


def test_warm_up_is_a_fraction_of_the_steps(calls):
    training = Training(warmup_steps=0.1)
    training.create_scheduler(57)
    assert training.args.warmup_steps == 5 and calls == ["create_scheduler"]


@pytest.mark.parametrize(
    ("optimizer", "values", "refused"),
    [("adamw_bnb_8bit", 640, True), ("adamw_bnb_8bit", 768, False), ("adamw_torch", 640, False)],
)
def test_states_that_could_not_be_saved_are_refused_before_training(
    calls, monkeypatch, optimizer, values, refused
):
    part = {"part": torch.nn.Parameter(torch.empty(values))}
    monkeypatch.setattr(masked_trainer, "sharded_parameters", lambda model: part)
    training = Training()
    training.run.config.training = SimpleNamespace(optimizer=optimizer)
    if refused:
        with pytest.raises(StageError, match="cannot be saved whole"):
            training.create_optimizer()
    else:
        training.create_optimizer()
    assert calls == ([] if refused else ["create_optimizer"])


@pytest.mark.parametrize(
    ("packing", "names", "refused"),
    [
        (True, {"input_ids"}, True),
        (True, {"input_ids", "position_ids", "attention_mask"}, True),
        (True, {"input_ids", "position_ids"}, False),
        (False, {"input_ids", "attention_mask"}, False),
    ],
)
def test_packs_without_document_boundaries_are_refused(monkeypatch, packing, names, refused):
    monkeypatch.setattr(Trainer, "training_step", lambda *_: "stepped")
    training, inputs = Training(sample_packing=packing), dict.fromkeys(names)
    if refused:
        with pytest.raises(StageError, match="attend to each other") as failure:
            training.training_step(None, inputs)
        assert "input_ids" in failure.value.found
    else:
        assert training.training_step(None, inputs) == "stepped"


@pytest.mark.parametrize(("implementation", "masked"), [("eager", True), (NAME, False)])
def test_eager_attention_gets_the_packs_documents_as_a_mask(monkeypatch, implementation, masked):
    monkeypatch.setattr(Trainer, "_prepare_inputs", lambda _, inputs: dict(inputs))
    seen = []
    monkeypatch.setattr(masked_trainer, "document_masks", lambda *given: seen.append(given) or "m")
    base = SimpleNamespace(
        config=SimpleNamespace(_attn_implementation=implementation),
        get_input_embeddings=lambda: torch.nn.Embedding(2, 2, dtype=torch.bfloat16),
    )
    training = Training()
    training.model = SimpleNamespace(get_base_model=lambda: base)
    prepared = training._prepare_inputs({"position_ids": "p"})
    assert prepared.get("attention_mask") == ("m" if masked else None)
    assert seen == ([(base.config, "p", torch.bfloat16)] if masked else [])
    assert training._prepare_inputs({"attention_mask": "own"}) == {"attention_mask": "own"}


@pytest.mark.parametrize("whole", [False, True])
def test_a_loss_from_whole_logits_is_refused(monkeypatch, whole):
    outputs = SimpleNamespace(logits=torch.zeros(1, 2, 3) if whole else None)
    monkeypatch.setattr(Trainer, "compute_loss", lambda *_: ("loss", outputs))
    training = Training()
    if whole:
        with pytest.raises(StageError, match="logits of whole sequences") as failure:
            training.compute_loss(None, {})
        assert "[1, 2, 3]" in failure.value.found
    else:
        assert training.compute_loss(None, {}) == "loss"
        assert training.compute_loss(None, {}, return_outputs=True) == ("loss", outputs)


def test_the_order_gets_the_epoch_and_none_begins_after_the_last_step(calls):
    told = []
    loader = SimpleNamespace(batch_sampler=SimpleNamespace(set_epoch=told.append))
    training = Training()
    training._run_epoch(epoch=4, train_dataloader=loader)
    assert told == [4] and calls == ["_run_epoch"]
    training.state.global_step = 10
    training._run_epoch(epoch=5, train_dataloader=loader)
    assert training.control.should_training_stop and calls == ["_run_epoch"]


@pytest.mark.parametrize("why", ["trained", "stopped"])
def test_nothing_is_trained_if_only_baking_remains(calls, why):
    """A run that was stopped at a loss, and killed while it baked, has steps left."""
    training = Training()
    training.bake_only = why == "trained"
    training.progress.stopped = {"step": 3, "reason": "a loss"} if why == "stopped" else None
    training._run_epoch(epoch=0, train_dataloader=None)
    assert training.control.should_training_stop and calls == []


@pytest.mark.parametrize("is_first", [True, False])
def test_only_the_first_rank_writes_and_all_know_the_best_checkpoint(calls, monkeypatch, is_first):
    training, checked = Training(), []
    training.model = torch.nn.Linear(2, 1)
    training.model.bias.requires_grad_(False)
    monkeypatch.setattr(MaskedTraining, "layers", {})
    world = SimpleNamespace(
        check_replicas=lambda tensors, step, _: checked.append((set(tensors), step)),
        is_first=lambda: is_first,
        collect=lambda own: ["first's", own],
    )
    monkeypatch.setattr(masked_trainer, "ranks", world)
    monkeypatch.setattr(MaskedTraining, "_write_checkpoint", lambda *_: calls.append("written"))
    training._save_checkpoint(None, None)
    assert checked == [({"weight"}, 3)]
    assert calls == (["written"] if is_first else [])
    assert training.state.best_model_checkpoint == "first's"


@pytest.mark.parametrize("shared", [False, True])
def test_gradients_of_shared_experts_count_once_and_all_are_clipped(calls, monkeypatch, shared):
    training = Training(max_grad_norm=0.5)
    training.model, training.mesh = torch.nn.Linear(2, 1), "mesh"
    sharded = {"weight": training.model.weight} if shared else {}
    monkeypatch.setattr(masked_trainer, "sharded_parameters", lambda model: sharded)
    given = []

    def norm(parameters, mesh, parts):
        given.append(([*parameters], mesh, [*parts]))
        return torch.tensor(2.0)

    monkeypatch.setattr(masked_trainer, "gradient_norm", norm)
    monkeypatch.setattr(Trainer, "_clip_grad_norm", lambda self, model: "transformers' own")
    weight, bias = training.model.weight, training.model.bias
    weight.grad, bias.grad = torch.ones(1, 2), torch.ones(1)
    found = training._clip_grad_norm(training.model)
    if not shared:
        assert found == "transformers' own" and not given
        return
    assert found == 2.0 and len(given) == 1
    parameters, mesh, parts = given[0]
    assert parameters == [weight, bias] and mesh == "mesh" and parts == [weight]
    for grad in (weight.grad, bias.grad):
        assert torch.allclose(grad, torch.full_like(grad, 0.25))


def layer() -> SimpleNamespace:
    return SimpleNamespace(
        patterns=torch.arange(6, dtype=torch.uint8).view(2, 3), scale=torch.ones(2, 1)
    )


def test_masks_and_counters_are_saved_in_checkpoints_and_restored(calls, monkeypatch, tmp_path):
    layers = {"q_proj": layer()}
    monkeypatch.setattr(MaskedTraining, "layers", layers)
    training = Training()
    training.progress.tokens, training.progress.alerted = 70, True
    for name in ("checkpoint-3", "model"):
        (tmp_path / name).mkdir()
        training._save(str(tmp_path / name))
    assert (tmp_path / "checkpoint-3" / state.MASKS).is_file()
    assert list((tmp_path / "model").iterdir()) == []  # no checkpoint
    saved = layers["q_proj"].patterns.clone()
    layers["q_proj"].patterns.zero_()
    training.progress.tokens = 0
    training._load_from_checkpoint(str(tmp_path / "checkpoint-3"))
    assert torch.equal(layers["q_proj"].patterns, saved)
    assert (training.progress.tokens, training.progress.alerted) == (70, True)
    assert training.newest == "checkpoint-3"
    assert calls == ["_save", "_save", "_load_from_checkpoint"]


def test_the_best_masks_are_restored_and_the_history_is_kept(calls, monkeypatch, tmp_path):
    layers = {"q_proj": layer()}
    monkeypatch.setattr(MaskedTraining, "layers", layers)
    training = Training()
    best = tmp_path / "checkpoint-3"
    best.mkdir()
    training._save(str(best))
    saved = layers["q_proj"].patterns.clone()
    layers["q_proj"].patterns.zero_()
    training.progress.tokens = 90
    training.state.best_model_checkpoint = str(best)
    monkeypatch.setattr(MaskedTraining, "_settle_best", lambda _: calls.append("_settle_best"))
    training._load_best_model()
    assert torch.equal(layers["q_proj"].patterns, saved) and training.progress.tokens == 90
    assert calls == ["_save", "_settle_best", "_load_best_model"]


@pytest.mark.parametrize(("log", "summed"), [(True, 6.0), (False, 2.0)])
def test_a_logged_loss_is_the_sum_over_all_ranks(calls, monkeypatch, log, summed):
    monkeypatch.setattr(masked_trainer, "add_losses", lambda loss, mesh: loss * mesh.world_size)
    training, loss = Training(), torch.tensor(2.0)
    training.mesh = SimpleNamespace(world_size=3)
    training.control.should_log = log
    training._maybe_log_save_evaluate(loss)
    assert loss == summed and calls == ["_maybe_log_save_evaluate"]


def test_peaks_are_noted_before_axolotl_resets_them(monkeypatch):
    """Its trainer resets torch's peak whenever it logs, also the losses of an evaluation."""
    peaks = {"host": 1, "cuda:0": 70}
    monkeypatch.setattr(state, "read_peaks", peaks.copy)
    monkeypatch.setattr(Trainer, "log", lambda self, logs, start: peaks.update({"cuda:0": 5}))
    training = Training()
    training.log({"loss": 1.0}, 0.0)
    peaks["cuda:0"] = 90
    training.log({"eval_loss": 1.0}, 0.0)
    assert training.progress.note_peaks() == {"host": 1, "cuda:0": 90}
