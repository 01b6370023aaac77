"""Divergence from the base, against the definition over all logits in double precision."""

import copy

import pytest
import torch

from sparselong.config import load
from sparselong.evaluate import divergence
from sparselong.evaluate.perplexity import Sample
from sparselong.evaluate.spread import Spread
from sparselong.memory import make_plan, plan_stage
from sparselong.parallel.vocabulary import combine_divergence, shard_divergence
from tests.conftest import ROOT

BATCH = 3


@pytest.fixture(scope="module")
def samples():
    generator = torch.Generator().manual_seed(0)
    lengths = (40, 3, 90, 17, 2)
    texts = [torch.randint(2048, (n,), generator=generator).tolist() for n in lengths]
    return [Sample(text, [i % 3 == 0 for i in range(len(text))]) for text in texts]


@pytest.fixture(scope="module")
def other(model):
    """The model with its last layer's attention switched off."""
    changed = copy.deepcopy(model)
    projection = changed.model.layers[-1].self_attn.o_proj
    with torch.no_grad():
        projection.weight.zero_()
        projection.bias.zero_()
    return changed


def by_definition(base, other, samples):
    """(divergence in nats, agreement, position, supervised) of every predicted token."""
    rows = []
    for sample in samples:
        ids = torch.tensor([sample.input_ids])
        with torch.no_grad():
            p, q = (m(ids, use_cache=False).logits[0, :-1].double() for m in (base, other))
        nats = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)
        for i, value in enumerate(nats.tolist()):
            agrees = bool(p[i].argmax() == q[i].argmax())
            rows.append((value, agrees, i + 1, sample.supervised[i + 1]))
    return rows


def mean(rows):
    return (
        pytest.approx(sum(row[0] for row in rows) / len(rows), rel=1e-3, abs=1e-7),
        pytest.approx(sum(row[1] for row in rows) / len(rows)),
        len(rows),
    )


def figures(found):
    return found["kl"], found["agreement"], found["tokens"]


def test_a_model_s_figures_are_those_of_the_definition(model, other, samples, tmp_path):
    divergence.save_states(model, samples, BATCH, Spread(), tmp_path)
    assert divergence.is_saved(tmp_path)
    found = divergence.measure(other, samples, BATCH, Spread(), tmp_path)
    rows = by_definition(model, other, samples)
    assert 0 < sum(row[1] for row in rows) < len(rows), "agreement is tested by both cases"
    assert figures(found["all"]) == mean(rows)
    assert figures(found["supervised"]) == mean([row for row in rows if row[3]])
    assert sum(point["tokens"] for point in found["by_position"]) == len(rows)
    for point in found["by_position"]:
        own = [row for row in rows if point["first"] <= row[2] <= point["last"]]
        assert figures(point) == mean(own)
    assert found["conversations"] == len(samples)


def test_the_base_does_not_diverge_from_itself(model, samples, tmp_path):
    divergence.save_states(model, samples, BATCH, Spread(), tmp_path)
    found = divergence.measure(model, samples, BATCH, Spread(), tmp_path)
    assert (found["all"]["kl"], found["all"]["agreement"]) == (
        pytest.approx(0.0, abs=1e-7),
        1.0,
    )  # two passes may round differently


@pytest.mark.parametrize("shares", [[2048], [1024, 1024], [700, 700, 648, 0]])
def test_shards_of_the_vocabulary_add_up(shares):
    generator = torch.Generator().manual_seed(1)
    p, q = (torch.randn(33, 2048, generator=generator) * 6 for _ in range(2))
    q[:9] = p[:9]
    q[3:9, 5] += 50  # the most likely token moves
    p[11, 3] = p[11, 1900] = q[11, 3] = 99.0  # of equal logits the first counts
    parts, first = [], 0
    for count in shares:
        held = slice(first, first + count)
        parts.append(shard_divergence(p[:, held], q[:, held], first))
        first += count
    found = combine_divergence(*map(torch.stack, zip(*parts, strict=True)))
    p, q = p.double(), q.double()
    nats = (p.softmax(1) * (p.log_softmax(1) - q.log_softmax(1))).sum(1)
    assert found.nats.double().tolist() == pytest.approx(nats.tolist(), rel=1e-5, abs=3e-6)
    assert found.nats[:3].tolist() == [0.0] * 3
    assert found.agrees.tolist() == (p.argmax(1) == q.argmax(1)).tolist()


def test_only_checkpoints_with_the_base_s_head_are_compared(untrained_base, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(untrained_base, tmp_path / "other")
    assert divergence.has_same_head(untrained_base, folder)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if "lm_head.weight" in tensors:
            tensors["lm_head.weight"][7, 3] += 1
            save_file(tensors, path, {"format": "pt"})
    assert not divergence.has_same_head(untrained_base, folder)


def test_the_plan_has_room_for_the_base_s_states(model, tmp_path):
    """Its figure is exact if all conversations have `sequence_len` tokens."""
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(2048, (40,), generator=generator).tolist() for _ in range(5)]
    samples = [Sample(text, [True] * 40) for text in texts]
    divergence.save_states(model, samples[:4], BATCH, Spread(), tmp_path)
    written = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    sizes = "evaluation.divergence_samples=4", "evaluation.perplexity_samples=5"
    plan = make_plan(load(ROOT / "configs/tiny.yaml", [*sizes, "sequence_len=40"]), "cpu")
    header = 200  # of each file
    assert 0 <= written - plan.disk["evaluate_work"] <= 2 * header
    (row,) = [
        row
        for row in plan_stage(load(ROOT / "configs/tiny.yaml", []), tmp_path, "04_eval")["writes"]
        if row["path"].endswith("/states")
    ]
    assert row["bytes"] == 32 * 255 * model.config.hidden_size * 4
