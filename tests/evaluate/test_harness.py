"""lm-eval's figures against likelihoods computed here from the model's logits.

lm-eval is imported once for all these tests, which takes most of their time.
"""

import json

import pytest
import torch

from sparselong.config import schema as config_module
from sparselong.errors import ConfigError, StageError

ITEMS = 5


def load_config(*overrides):
    return config_module.load("configs/tiny.yaml", [f"evaluation.limit={ITEMS}", *overrides])


@pytest.fixture(scope="module")
def harness():
    from sparselong.evaluate import harness

    return harness


@pytest.fixture(scope="module")
def tokenizer(untrained_base):
    from sparselong.model.tokenizer import load_tokenizer

    return load_tokenizer(untrained_base)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder whose name nothing may read as a pattern, a URL, a variable or a home directory."""
    return tmp_path_factory.mktemp("tasks") / "r*n [1] a::b $HOME ~c {d}"


@pytest.fixture(scope="module")
def suite(harness, tokenizer, folder):
    return harness.load_suite(load_config(), folder, tokenizer)


def read_items(folder):
    return [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def model(untrained_base):
    from sparselong.model.loading import load_model

    return load_model(untrained_base)


def ending_log_likelihoods(model, tokenizer, context, endings):
    """Log-likelihoods of endings with equally many tokens, which form an unpadded batch."""
    before = len(tokenizer(context, add_special_tokens=False)["input_ids"])
    texts = [f"{context} {ending}" for ending in endings]
    ids = torch.tensor(tokenizer(texts, add_special_tokens=False)["input_ids"])
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
    picked = logits.double().log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    return picked[:, before - 1 :].sum(dim=1).tolist()


def test_answers_follow_the_models_likelihoods(harness, suite, model, tokenizer, folder):
    result = harness.measure(model, suite)["demo_hellaswag"]
    rows = read_items(folder)[:ITEMS]
    right, right_norm = [], []
    for row, kept in zip(rows, result["log_likelihoods"], strict=True):
        context = f"{row['activity_label']}: {row['ctx_a']}"
        scores = ending_log_likelihoods(model, tokenizer, context, row["endings"])
        assert kept == pytest.approx(scores, rel=1e-5)
        right.append(int(max(range(4), key=scores.__getitem__) == row["label"]))
        per_byte = [s / len(e.encode()) for s, e in zip(scores, row["endings"], strict=True)]
        right_norm.append(int(max(range(4), key=per_byte.__getitem__) == row["label"]))
    assert result["right"] == right and result["right_norm"] == right_norm
    assert result["acc"] == pytest.approx(sum(right) / ITEMS)
    share = sum(right) / ITEMS
    assert result["acc_stderr"] == pytest.approx((share * (1 - share) / (ITEMS - 1)) ** 0.5)
    assert (result["items"], result["chance"]) == (ITEMS, 0.25)


def test_second_model_gets_the_same_requests_with_examples_too(harness, model, tokenizer, tmp_path):
    config = load_config("evaluation.num_fewshot=1", "evaluation.limit=2")
    suite = harness.load_suite(config, tmp_path, tokenizer)
    first, second = (harness.measure(model, suite)["demo_hellaswag"] for _ in range(2))
    assert first == second


def test_answers_of_other_processes_give_the_same_figures(harness, model, tokenizer, tmp_path):
    """lm-eval asks for tokens, which ranks answer, and makes the figures of a whole model."""
    from sparselong.evaluate import scoring
    from sparselong.evaluate.spread import Spread

    config = load_config("evaluation.num_fewshot=1", "evaluation.limit=4")
    suite = harness.load_suite(config, tmp_path, tokenizer)
    positions = model.config.max_position_embeddings
    requests = harness.list_requests(suite, positions)
    assert len(requests) == 4 * 4 and harness.list_requests(suite, positions) == requests
    answers = scoring.score(model, requests, 3, Spread())
    ((_, ours),) = harness.grade(suite, positions, answers).items()
    ((_, theirs),) = harness.measure(model, suite).items()
    pairs = zip(ours.pop("log_likelihoods"), theirs.pop("log_likelihoods"), strict=True)
    assert all(item == pytest.approx(other, rel=1e-6) for item, other in pairs)
    assert ours == theirs
    worst = [(-score, is_greedy) for score, is_greedy in answers]
    ((_, reversed_),) = harness.grade(suite, positions, worst).items()
    assert reversed_["right"] != theirs["right"]


def test_several_processes_score_lm_eval_s_batches(harness, model, tokenizer, tmp_path):
    """Rounding depends on a pass's shape, so that only equal passes give equal figures."""
    from sparselong.evaluate.scoring import score
    from sparselong.evaluate.spread import Spread

    suite = harness.load_suite(load_config("evaluation.batch_size=3"), tmp_path, tokenizer)
    lines = []  # each pass's padded texts
    hook = model.model.register_forward_pre_hook(
        lambda _, args, kwargs: lines.append((args[0] if args else kwargs["input_ids"]).tolist()),
        with_kwargs=True,
    )
    with hook:
        harness.measure(model, suite)
        in_lm_eval, lines[:] = lines[:], []
        requests = harness.list_requests(suite, model.config.max_position_embeddings)
        score(model, requests[::-1], 3, Spread())
    assert len(in_lm_eval) > 4 and lines == in_lm_eval


def test_a_text_longer_than_the_model_supports_loses_its_beginning(harness, suite):
    whole, cut = (harness.list_requests(suite, positions) for positions in (4096, 20))
    assert [request.tokens[-21:] for request in whole] == [request.tokens for request in cut]


def test_items_carry_their_right_answer(harness, suite, folder):
    (texts,) = harness.list_items(suite).values()
    row = read_items(folder)[0]
    assert len(texts) == ITEMS
    assert texts[0].endswith(f"{row['ctx_a'][-20:]} {row['endings'][row['label']]}")


def test_unknown_task_is_refused_with_a_suggestion(harness, tokenizer, tmp_path):
    config = load_config("evaluation.tasks=[hellaswagg]")
    with pytest.raises(ConfigError, match=r"(?s)names hellaswagg.*did you mean hellaswag"):
        harness.load_suite(config, tmp_path, tokenizer)


def test_unreachable_hub_is_explained(harness, tokenizer, tmp_path, monkeypatch):
    def fail(*arguments, **keywords):
        raise ConnectionError("Couldn't reach 'Rowan/hellaswag' on the Hub")

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(StageError, match=r"(?s)Couldn't reach.*evaluation.tasks=\[demo_hellaswag"):
        harness.load_suite(load_config("evaluation.tasks=[hellaswag]"), tmp_path, tokenizer)


def test_single_item_is_refused(harness, tokenizer, tmp_path):
    config = load_config()
    single = config.evaluation.model_copy(update={"limit": 1})  # stands for a task with one item
    with pytest.raises(StageError, match="at least 2 items"):
        harness.load_suite(config.model_copy(update={"evaluation": single}), tmp_path, tokenizer)
