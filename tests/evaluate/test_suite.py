"""Tasks and their figures, against lm-eval's own model and likelihoods computed from the logits.

lm-eval is imported once for all these tests, which takes most of their time.
"""

import json

import datasets
import pytest
import torch

from sparselong.config import schema as config_module
from sparselong.errors import ConfigError, StageError

ITEMS = 5
POSITIONS = 131_072


def load_config(*overrides):
    return config_module.load("configs/tiny.yaml", [f"evaluation.limit={ITEMS}", *overrides])


@pytest.fixture(scope="module")
def tasks():
    from sparselong.evaluate import tasks

    return tasks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder whose name nothing may read as a pattern, a URL, a variable or a home directory."""
    return tmp_path_factory.mktemp("tasks") / "r*n [1] a::b $HOME ~c {d}"


@pytest.fixture(scope="module")
def suite(tasks, tokenizer, folder):
    return tasks.load_suite(load_config(), folder, tokenizer, POSITIONS)


def read_items(folder):
    return [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]


def ending_log_likelihoods(model, tokenizer, context, endings):
    """Log-likelihoods of endings with equally many tokens, which form an unpadded batch."""
    before = len(tokenizer(context, add_special_tokens=False)["input_ids"])
    texts = [f"{context} {ending}" for ending in endings]
    ids = torch.tensor(tokenizer(texts, add_special_tokens=False)["input_ids"])
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
    picked = logits.double().log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    return picked[:, before - 1 :].sum(dim=1).tolist()


def test_answers_follow_the_models_likelihoods(suite, measure, model, tokenizer, folder):
    result = measure(suite)["demo_hellaswag"]
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
    assert (result["items"], result["chance"], result["scores"]) == (ITEMS, 0.25, {})


def test_figures_are_lm_eval_s_own_with_the_same_passes(
    tasks, measure, run_lm_eval, model, tokenizer, tmp_path
):
    """Rounding depends on a pass's shape, so that only equal passes give equal figures."""
    config = load_config(
        "evaluation.num_fewshot=1", "evaluation.limit=4", "evaluation.batch_size=3"
    )
    suite = tasks.load_suite(config, tmp_path, tokenizer, POSITIONS)
    lines = []  # each pass's padded texts
    hook = model.model.register_forward_pre_hook(
        lambda _, args, kwargs: lines.append((args[0] if args else kwargs["input_ids"]).tolist()),
        with_kwargs=True,
    )
    with hook:
        theirs = run_lm_eval(suite)["results"]["demo_hellaswag"]
        in_lm_eval, lines[:] = lines[:], []
        ours = measure(suite)["demo_hellaswag"]
    assert len(in_lm_eval) > 4 and lines == in_lm_eval
    for key in ("acc", "acc_norm", "acc_stderr", "acc_norm_stderr"):
        assert ours[key] == theirs[f"{key},none"]
    assert measure(suite)["demo_hellaswag"] == ours


def test_answers_decide_the_figures(tasks, suite):
    """The unlikely endings are the answers of a model that prefers them."""
    questions = tasks.list_questions(suite)
    assert len(questions.requests) == 4 * ITEMS and not any(questions[1:])
    assert tasks.list_questions(suite) == questions
    from sparselong.evaluate.work import Answers

    scores = [-float(i % 7) for i in range(4 * ITEMS)]
    one, other = (
        tasks.grade(suite, Answers([(sign * score, False) for score in scores], []))
        for sign in (1, -1)
    )
    assert one["demo_hellaswag"]["right"] != other["demo_hellaswag"]["right"]


def test_a_text_longer_than_the_model_supports_loses_its_beginning(
    tasks, suite, tokenizer, tmp_path
):
    small = tasks.load_suite(load_config(), tmp_path, tokenizer, 20)
    whole, cut = (tasks.list_questions(each).requests for each in (suite, small))
    assert [request.tokens[-21:] for request in whole] == [request.tokens for request in cut]


def test_items_carry_their_right_answer(tasks, suite, folder):
    (texts,) = tasks.list_items(suite).values()
    row = read_items(folder)[0]
    assert len(texts) == ITEMS
    assert texts[0].endswith(f"{row['ctx_a'][-20:]} {row['endings'][row['label']]}")


HUB = {
    "openai/gsm8k": {"question": "How many are {} and 1?", "answer": "Add them. #### {}"},
    "EleutherAI/wikitext_document_level": {"page": " = {} = \n It is number {} . \n"},
    "EleutherAI/lambada_openai": {"text": "After {} comes another {}"},
    "cais/mmlu": {"question": "What is {}?", "subject": "anatomy", "answer": 1,
                  "choices": ["a", "b", "c", "d"]},
}  # fmt: skip
"""Rows in which `{}` stands for a number, instead of the datasets that lm-eval downloads."""


def open_hub(path, *_, **__):
    rows = [
        {
            key: value.replace("{}", str(n)) if isinstance(value, str) else value
            for key, value in HUB[path].items()
        }
        for n in range(8)
    ]
    splits = ("train", "validation", "test", "dev")
    return datasets.DatasetDict(dict.fromkeys(splits, datasets.Dataset.from_list(rows)))


@pytest.fixture(scope="module")
def index(tasks):
    """lm-eval's index of its own tasks, which takes seconds to make."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


@pytest.fixture
def indexed(tasks, index, monkeypatch):
    """Use that index where no task of ours is added to it."""

    def find(include_path, include_defaults):
        assert include_path is None and include_defaults
        return index

    monkeypatch.setattr(f"{tasks.__name__}.suite.TaskManager", find)


@pytest.mark.usefixtures("indexed")
def test_every_kind_of_task_has_lm_eval_s_own_figures(
    tasks, measure, run_lm_eval, tokenizer, tmp_path, monkeypatch
):
    """Generated answers with several filters, text scored as a whole, and words; also greedy ones.

    The four choices of a question that differ in their last token are one row of a pass, as there.
    """
    monkeypatch.setattr("datasets.load_dataset", open_hub)
    names = "gsm8k, wikitext, lambada_openai, mmlu_anatomy"
    overrides = (f"evaluation.tasks=[{names}]", "evaluation.limit=3", "evaluation.num_fewshot=2")
    suite = tasks.load_suite(load_config(*overrides), tmp_path, tokenizer, POSITIONS)
    for task in suite.tasks.values():
        if task.OUTPUT_TYPE == "generate_until":
            task.config.generation_kwargs |= {"max_gen_toks": 12, "until": ["q", " the", "\n"]}
    ours, theirs = measure(suite), run_lm_eval(suite)
    answers = ours["gsm8k"]["answers"]
    assert answers == [sample["resps"][0][0] for sample in theirs["samples"]["gsm8k"][:3]]
    assert all(answers) and len(set(answers)) > 1
    assert set(ours["gsm8k"]["scores"]) == {
        "exact_match (strict-match)", "exact_match (flexible-extract)"
    }  # fmt: skip
    assert set(ours["wikitext"]["scores"]) == {
        "word_perplexity",
        "byte_perplexity",
        "bits_per_byte",
    }
    for task, figures in ours.items():
        result = theirs["results"][task]
        for label, score in figures["scores"].items():
            metric, _, name = label.partition(" (")
            key = f"{metric},{name.removesuffix(')') or 'none'}"
            assert score["value"] == pytest.approx(result[key], rel=1e-5)
    assert ours["mmlu_anatomy"]["acc"] == theirs["results"]["mmlu_anatomy"]["acc,none"]
    by_item = {label: s["by_item"] for label, s in ours["lambada_openai"]["scores"].items()}
    assert by_item["acc"] == [0.0] * 3 and by_item["perplexity"] is None


@pytest.mark.usefixtures("indexed")
def test_unknown_task_is_refused_with_a_suggestion(tasks, tokenizer, tmp_path):
    config = load_config("evaluation.tasks=[hellaswagg]")
    with pytest.raises(ConfigError, match=r"(?s)names hellaswagg.*did you mean hellaswag"):
        tasks.load_suite(config, tmp_path, tokenizer, POSITIONS)


@pytest.mark.usefixtures("indexed")
def test_unreachable_hub_is_explained(tasks, tokenizer, tmp_path, monkeypatch):
    def fail(*arguments, **keywords):
        raise ConnectionError("Couldn't reach 'Rowan/hellaswag' on the Hub")

    monkeypatch.setattr("datasets.load_dataset", fail)
    config = load_config("evaluation.tasks=[hellaswag]")
    with pytest.raises(StageError, match=r"(?s)Couldn't reach.*evaluation.tasks=\[demo_hellaswag"):
        tasks.load_suite(config, tmp_path, tokenizer, POSITIONS)


def test_single_item_is_refused(tasks, tokenizer, tmp_path):
    config = load_config()
    single = config.evaluation.model_copy(update={"limit": 1})  # stands for a task with one item
    changed = config.model_copy(update={"evaluation": single})
    with pytest.raises(StageError, match="at least 2 items"):
        tasks.load_suite(changed, tmp_path, tokenizer, POSITIONS)
