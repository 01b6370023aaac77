"""The trainer's passes: settings, and token counts and divisors from shared functions."""

from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer

from sparselong.finetune import masked_trainer
from sparselong.finetune.batches import take_tokens
from sparselong.finetune.masked_trainer import MaskedTraining
from sparselong.finetune.state import Progress
from sparselong.parallel import apply, loss
from sparselong.parallel.loss import StepCounts
from sparselong.runtime import Settings, current

IGNORED = -100
PAD = 0


class Training(MaskedTraining):
    """The trainer without transformers' part; a token's loss is its label."""

    def __init__(self, mesh=None, **config):
        asked = {"attention_backend": "auto", "deterministic": False, "heads_k_stride": 2, **config}
        asked["training"] = SimpleNamespace(gradient_checkpointing=False)
        self.run = SimpleNamespace(config=SimpleNamespace(**asked))
        self.args = SimpleNamespace(sample_packing=False)
        self.accelerator = SimpleNamespace(sync_gradients=True)
        self.processing_class = SimpleNamespace(pad_token_id=PAD)
        self.model = torch.nn.Linear(1, 1)
        self.progress, self.predictions, self.mesh = Progress(), None, mesh
        self.seen: list[Settings] = []

    def _prepare_inputs(self, inputs):
        return inputs

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        assert not torch.is_grad_enabled() and not model.training
        self.seen.append(current())
        labels = inputs["labels"][:, 1:]
        return labels[labels != IGNORED].float().sum() / num_items_in_batch


def batch(*rows: list[int]) -> dict[str, torch.Tensor]:
    """Build rows whose labels equal their tokens; no token predicts the first of a row."""
    labels = torch.tensor(rows)
    return {"input_ids": labels.clamp(min=PAD), "labels": labels, "tokens": labels.numel()}


class Loader(list):
    """Batches of a dataset of seven rows."""

    dataset = SimpleNamespace(rows=range(7))


def step() -> list[dict]:
    """Two micro-batches; the last label is the padding token, which text may contain."""
    return [batch([1, IGNORED, 2, 3]), batch([4, IGNORED, IGNORED, 5], [6, 7, IGNORED, PAD])]


def test_a_step_is_divided_by_the_supervised_tokens_of_all_its_micro_batches():
    training = Training()
    batches, divisor = training.get_batch_samples(iter([*step(), batch([8, 8])]), 2, None)
    assert len(batches) == 2 and divisor == 2 + 1 + 2
    assert training.progress.tokens == 4 + 8
    _, divisor = training.get_batch_samples(iter([batch([8, IGNORED])]), 1, None)
    assert divisor == 1 and training.progress.tokens == 14


def test_evaluation_weights_every_supervised_token_equally():
    training = Training(attention_backend="torch", deterministic=True)
    result = training.evaluation_loop(Loader(step()), "")
    assert result.metrics == {"eval_loss": (2 + 3 + 5 + 7 + PAD) / 5}
    assert result.num_samples == 7
    assert training.seen == [Settings("torch", True)] * 2 and current() == Settings()
    nothing = training.evaluation_loop(Loader([batch([8, IGNORED])]), "", metric_key_prefix="test")
    assert str(nothing.metrics) == "{'test_loss': nan}"


def test_counts_and_sums_cover_all_ranks(monkeypatch):
    """Two data ranks with equal batches and one shard each."""
    tags = []

    def add(tensor, group, tag):
        tags.append((group, tag))
        return tensor * 2

    monkeypatch.setattr(loss, "sum_over_ranks", add)
    mesh = SimpleNamespace(
        context_size=1, data_size=2, expert_size=1, data_group="data", world_group="world"
    )
    training = Training(mesh)
    assert training.get_batch_samples(iter(step()), 2, None)[1] == 10
    assert training.progress.tokens == 24
    assert training.evaluation_loop(Loader(step()), "").metrics == {"eval_loss": 17 / 5}
    assert tags == [("data", "token count"), ("world", "evaluation")]


def test_the_trainer_uses_the_functions_of_the_parity_tests(monkeypatch):
    """tests/distributed verifies these; the trainer does no counting or dividing itself."""
    training = Training()
    monkeypatch.setattr(masked_trainer, "count_step", lambda *given: StepCounts(5, len(given[0])))
    assert training.get_batch_samples(iter(step()), 2, None)[1] == 2
    assert training.progress.tokens == 5
    monkeypatch.setattr(masked_trainer, "mean_loss", lambda parts, _: [float(p[0]) for p in parts])
    assert training.evaluation_loop(Loader(step()), "").metrics == {"eval_loss": [5.0, 12.0]}


@pytest.mark.parametrize("sharded", [False, True])
def test_a_training_step_runs_forward_and_backward_under_its_settings(monkeypatch, sharded):
    seen, reduced = [], []

    def go(self, model, inputs, num_items_in_batch=None):
        seen.append((current(), inputs, num_items_in_batch))

    monkeypatch.setattr(Trainer, "training_step", go)
    monkeypatch.setattr(masked_trainer, "reduce_gradients", lambda *given: reduced.append(given))
    monkeypatch.setattr(
        apply, "shard_batch", lambda given, _: {**given, "cu_seqlens": torch.tensor([0, 4])}
    )
    mesh = SimpleNamespace(context_size=2, data_size=1, expert_size=1) if sharded else None
    training = Training(mesh, deterministic=True)
    part = {"weight": training.model.weight}
    monkeypatch.setattr(masked_trainer, "sharded_parameters", lambda _: part)
    first = step()[0]
    take_tokens(first)
    training.training_step(training.model, first, 9)
    ((settings, inputs, count),) = seen
    assert settings.deterministic and count == 9 and current() == Settings()
    assert set(inputs) == {"input_ids", "labels"}
    if sharded:
        assert settings.sequence.mesh is mesh
        assert settings.sequence.layout.boundaries == (0, 4)
        assert settings.sequence.layout.heads_k_stride == 2
        parameters, where, apart = reduced[0]
        assert [*parameters] == [*training.model.parameters()] and where is mesh
        assert [*apart] == [training.model.weight]  # not summed over ranks with other experts
    else:
        assert settings.sequence is None and inputs is first and not reduced
