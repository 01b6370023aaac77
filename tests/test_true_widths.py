"""The checkpoint that benchmarks/true_widths.py writes, and its comparison of two evaluations."""

import copy

import pytest
import torch

from benchmarks import true_widths
from benchmarks.base_checkpoint import WIDTHS, write_base


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("widths") / "base"
    write_base(folder, "tiny", 3, "cpu", lambda line: None)
    return folder


def test_the_written_checkpoint_passes_the_checks_of_stage_02(base):
    from sparselong.checkpoint import Checkpoint, open_upstream, take_inventory
    from sparselong.memory import read_base_config
    from sparselong.model import check_tokenizer_files, load_tokenizer

    assert len(take_inventory(base).files) == 3  # embeddings, two layers, one layer
    sizes = read_base_config(base / "config.json").sizes
    assert {key: sizes[key] for key in WIDTHS["tiny"]} == WIDTHS["tiny"]
    assert sizes["num_hidden_layers"] == 3 == open_upstream(Checkpoint(base)).num_hidden_layers
    check_tokenizer_files(base)
    assert load_tokenizer(base).chat_template


def test_the_written_checkpoint_opens_and_its_layers_matter(base):
    from sparselong.model import load_model

    model = load_model(base)
    tokens = torch.randint(0, 2000, (2, 80), generator=torch.Generator().manual_seed(0))
    states = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, __, output: states.append(output.float()))
    with torch.no_grad():
        logits = model(tokens).logits.float()
    assert torch.isfinite(logits).all() and 0.3 < float(logits.std()) < 3
    growth = [float(state.std()) for state in states]
    assert 0.5 < growth[0] < growth[-1] < 5, growth


def test_true_widths_are_those_of_the_120b():
    from sparselong.memory import PUBLISHED

    shape = PUBLISHED["openai/gpt-oss-120b"]
    true = WIDTHS["true"]
    assert (true["hidden_size"], true["num_local_experts"]) == (shape.hidden, shape.experts)
    assert true["vocab_size"] == shape.vocab


RESULT = {
    "perplexity": {
        "supervised": {"nll": 100.0, "tokens": 10, "perplexity": 22026.0},
        "conversations": [[60.0, 6], [40.0, 4]],
    },
    "tasks": {"demo": {"log_likelihoods": [[-10.0, -10.001], [-20.0, -30.0]]}},
}


def compare(change) -> dict:
    other = copy.deepcopy(RESULT)
    change(other)
    return true_widths.compare(RESULT, other, 1e-3)


def test_equal_evaluations_pass():
    found = compare(lambda other: None)
    assert found["failures"] == 0 and found["flips"] == 0 and found["smallest_margin"] < 1.1e-4


def test_results_that_are_no_numbers_fail():
    def spoil(other):
        other["perplexity"]["supervised"]["perplexity"] = float("nan")
        other["tasks"]["demo"]["log_likelihoods"][0] = [float("nan")] * 2

    assert compare(spoil)["failures"] >= 3


def test_a_flip_within_the_margin_passes():
    def swap(other):
        other["tasks"]["demo"]["log_likelihoods"][0] = [-10.001, -10.0]

    found = compare(swap)
    assert found["flips"] == 1 and found["failures"] == 0
    assert found["largest_flipped_margin"] == pytest.approx(1e-4, rel=1e-3)


@pytest.mark.parametrize("place, value", [
    (("tasks", "demo", "log_likelihoods", 1), [-30.0, -20.0]),
    (("tasks", "demo", "log_likelihoods", 1), [-20.0, -30.1]),
    (("perplexity", "supervised", "perplexity"), 22060.0),
    (("perplexity", "conversations", 0), [60.1, 6]),
])  # fmt: skip
def test_a_difference_fails(place, value):
    def change(other):
        for key in place[:-1]:
            other = other[key]
        other[place[-1]] = value

    assert compare(change)["failures"] > 0


def test_another_number_of_items_is_refused():
    def drop(other):
        del other["tasks"]["demo"]["log_likelihoods"][0]

    with pytest.raises(ValueError):
        compare(drop)
