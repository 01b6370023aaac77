"""RULER's items: their sizes, and what the published definitions say of them.

Scores of known answers are in tests/evaluate/test_answering.py.
"""

import json
import re
from collections import Counter
from statistics import mean

import pytest

from sparselong.config import RULER_TASKS, load
from sparselong.data.ruler import items
from sparselong.data.ruler.items import answer_tokens, check_ruler, make_items, score_answer
from sparselong.errors import StageError
from tests.conftest import ROOT

LENGTH = 4096


@pytest.fixture(scope="module")
def tokenizer(untrained_base):
    from sparselong.model.tokenizer import load_tokenizer

    return load_tokenizer(untrained_base)


@pytest.fixture(scope="module")
def made(tokenizer):
    return {task: make_items(task, LENGTH, 3, 42, tokenizer) for task in RULER_TASKS}


def test_the_tasks_of_the_config_are_those_that_are_made():
    assert sorted(items._TASKS) == sorted(RULER_TASKS) and not set(RULER_TASKS) & set(
        items.LEFT_OUT
    )


@pytest.mark.parametrize("task", RULER_TASKS)
def test_items_fill_the_context_and_leave_room_for_the_answer(made, tokenizer, task):
    for item in made[task]:
        tokens = len(tokenizer(item["prompt"], add_special_tokens=False)["input_ids"])
        assert item["tokens"] == tokens
        assert 0.93 * LENGTH < tokens + answer_tokens(task) <= LENGTH
        answer = tokenizer(" ".join(item["answers"]), add_special_tokens=False)["input_ids"]
        assert len(answer) <= answer_tokens(task)
        assert score_answer(" ".join(item["answers"]), item["answers"]) == 1
    assert len({item["prompt"] for item in made[task]}) == 3


def test_items_depend_on_seed_task_and_length_but_not_on_their_number(made, tokenizer):
    assert make_items("niah_single_1", LENGTH, 1, 42, tokenizer) == made["niah_single_1"][:1]
    (other,) = make_items("niah_single_1", LENGTH, 1, 43, tokenizer)
    assert other["answers"] != made["niah_single_1"][0]["answers"]


@pytest.mark.parametrize("task", ["niah_single_1", "niah_multikey_2", "niah_multikey_3"])
def test_one_needle_has_the_key(made, task):
    for item in made[task]:
        key = re.search(r"for (\S[^\n]*?) mentioned in the provided text\?", item["prompt"])[1]
        found = re.findall(rf"magic \w+ for {re.escape(key)} is: (\S+)\.", item["prompt"])
        assert found == item["answers"]
        needles = re.findall(r"is: (\S+)\.\n", item["prompt"])
        kind = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}" if task[-1] == "3" else r"\d{7}"
        assert all(re.fullmatch(kind, value) for value in needles)
        assert (len(needles) == 1) == (task == "niah_single_1")


def test_chains_are_assigned_in_order_and_the_example_is_solved(made):
    for item in made["ruler_vt"]:
        example, _, question = item["prompt"].partition("\n\nMemorize")[2].partition("\n\nMemorize")
        assert not question
        example, question = item["prompt"].split("\n\nMemorize and track")[0], example
        for text, names in ((example, example.split()[-5:]), (question, item["answers"])):
            chain = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", text)
            assert [name for name, _ in chain] == names
            value = re.search(r"assigned the value (\d{5}) in", text)[1]
            assert [what for _, what in chain] == [value, *names[:-1]]
        assert {len(name) for name in example.split()[-5:]} == {3}
        assert {len(name) for name in item["answers"]} == {5}


def test_common_words_are_more_frequent_than_all_others(made):
    for item in made["ruler_cwe"]:
        example, question = item["prompt"].split("\nBelow is a numbered")
        for text, times, rare in ((example, 10, 3), (question, 30, 3)):
            listed = text.partition("most often.\n")[2].partition("\nQuestion")[0]
            words = re.split(r" ?\d+\. ", listed)[1:]
            counts = Counter(words)
            assert sorted(set(counts.values())) == [rare, times]
            if text is question:
                assert {w for w, n in counts.items() if n == times} == set(item["answers"])
        assert re.findall(r"10\. (.*)$", example.rpartition("list are:")[2])[0] in example[:-40]


def test_coded_words_follow_their_rank(made):
    for item in made["ruler_fwe"]:
        text = item["prompt"].partition("coded words. ")[2].partition("\nQuestion")[0]
        counts = Counter(text.split()).most_common()
        assert counts[0][0] == "..." and {word for word, _ in counts[1:4]} == set(item["answers"])
        first, second, third = (n for _, n in counts[:3])
        assert first / second == pytest.approx(4, rel=0.05)
        assert first / third == pytest.approx(9, rel=0.1)


def test_a_context_that_is_too_short_is_refused_with_the_shortest(tokenizer):
    with pytest.raises(StageError, match=r"(?s)ruler_cwe cannot be made for .* 256 tokens") as told:
        make_items("ruler_cwe", 256, 2, 42, tokenizer)
    least = int(re.search(r"at least ([\d,]+)", told.value.expected)[1].replace(",", ""))
    longer = make_items("ruler_cwe", least + 60, 3, 42, tokenizer)
    assert all(item["tokens"] + answer_tokens("ruler_cwe") <= least + 60 for item in longer)


def test_every_task_and_length_is_checked_by_its_smallest_item(tokenizer):
    path = ROOT / "configs/tiny.yaml"
    tasks = "evaluation.tasks=[niah_single_1,ruler_cwe]"
    check_ruler(load(path, [tasks, "evaluation.ruler.lengths=[1500,4096]"]), tokenizer)
    with pytest.raises(StageError, match="ruler_cwe cannot be made for a context of 600 tokens"):
        check_ruler(load(path, [tasks, "evaluation.ruler.lengths=[1500,600]"]), tokenizer)
    check_ruler(load(path, ["evaluation.ruler.lengths=[2]"]), tokenizer)  # no task of RULER's


def test_missing_words_are_explained(monkeypatch, tokenizer):
    from sparselong.data.ruler import words

    monkeypatch.setattr(words, "find_spec", lambda name: None)
    words.load_words.cache_clear()
    with pytest.raises(StageError, match=r"(?s)RULER's words are missing.*install\.sh"):
        make_items("ruler_cwe", LENGTH, 2, 42, tokenizer)


def test_only_what_is_wanted_scores():
    assert score_answer("the VALUES are Abc, def", ["abc", "xyz"]) == 0.5
    assert score_answer("", ["abc"]) == 0.0


def test_lm_eval_s_answers_are_scored_alike():
    """By lm-eval's own function, whose module needs no more than transformers."""
    from importlib.util import module_from_spec, spec_from_file_location
    from pathlib import Path

    import lm_eval

    path = Path(lm_eval.__file__).parent / "tasks/ruler/common_utils.py"
    spec = spec_from_file_location("ruler_common_utils", path)
    assert spec and spec.loader
    theirs = module_from_spec(spec)
    spec.loader.exec_module(theirs)
    for answer, wanted in (("1 a, B", ["A", "b", "c"]), ("x", ["x"]), ("", ["y"])):
        assert score_answer(answer, wanted) == theirs.string_match_all([answer], [wanted])


def test_the_proxy_s_scores_are_far_above_chance_and_lower_at_4096_tokens(tokenizer):
    """The proxy was trained on these generators at 1,024 tokens (benchmarks/proxy).

    Chance is what somebody gets who answers with as many different words of the prompt as are
    wanted; the tests' tokenizer takes about two tokens for the proxy's one. On the mean of the
    tasks: common words alone are less than five times as good as that.
    """
    kept = json.loads((ROOT / "benchmarks/results/proxy-h200-20261129.json").read_text())
    scores = [row for row in kept["rows"] if row["metric"] == "score"]
    found = {(row["case"]["task"], row["case"]["tokens"]): row["value"] for row in scores}
    chance = {}
    for task in RULER_TASKS:
        (item,) = make_items(task, 2 * 1024, 1, 42, tokenizer)
        prompt_words = set(re.findall(r"[\w-]+", item["prompt"]))
        chance[task] = len(item["answers"]) / len(prompt_words)
    assert mean(found[task, 1024] for task in RULER_TASKS) >= 5 * mean(chance.values())
    assert all(found[task, 1024] >= 5 * chance[task] for task in RULER_TASKS if "cwe" not in task)
    assert all(found[task, 4096] <= found[task, 1024] for task in RULER_TASKS)
    assert sum(found[task, 4096] < found[task, 1024] for task in RULER_TASKS) >= 5
