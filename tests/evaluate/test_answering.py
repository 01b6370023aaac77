"""Continuations of prompts, and RULER's scores of models whose answers are known."""

import random
import re

import pytest
import torch

from sparselong.config import RULER_TASKS
from sparselong.config import schema as config_module
from sparselong.errors import ConfigError
from sparselong.evaluate import answering
from sparselong.evaluate.spread import Spread
from sparselong.evaluate.work import Prompt

ITEMS, LENGTH = 3, 2048


@pytest.fixture(scope="module")
def suite(tokenizer, tmp_path_factory):
    from sparselong.evaluate.tasks.suite import load_suite

    return load_suite(ruler_config(), tmp_path_factory.mktemp("tasks"), tokenizer, LENGTH)


def ruler_config(*overrides):
    return config_module.load(
        "configs/tiny.yaml",
        [
            f"evaluation.tasks=[{', '.join(RULER_TASKS)}]",
            f"evaluation.ruler.items={ITEMS}",
            f"evaluation.ruler.lengths=[{LENGTH}]",
            "evaluation.num_fewshot=3",
            *overrides,
        ],
    )


class Script:
    """A model that answers as a function of the prompt's text says, token by token."""

    def __init__(self, tokenizer, write):
        self.tokenizer, self.write, self.read = tokenizer, write, []

    def generate(self, model, input_ids, max_new_tokens, *, stop, decoder):
        self.read.append(input_ids.shape[1])
        text = self.write(self.tokenizer.decode(input_ids[0]))
        tokens = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        yield from [*tokens, stop[0]][:max_new_tokens]


class NoDecoder:
    model = None

    def forget(self):
        pass


def measure_script(monkeypatch, suite, write):
    from sparselong.evaluate.tasks.asking import grade, list_questions

    script = Script(suite.tokenizer, write)
    monkeypatch.setattr(answering, "generate", script.generate)
    monkeypatch.setattr(answering, "_open_decoder", lambda *_: NoDecoder())
    model = type("Model", (), {"lm_head": None})
    answers, _ = answering.answer(model, list_questions(suite), suite.tokenizer, 8, Spread())
    assert len(script.read) == len(RULER_TASKS) * ITEMS
    assert all(LENGTH * 0.85 < tokens < LENGTH for tokens in script.read)
    return grade(suite, answers)


def copy_answer(prompt):
    """Return the answer that stands in the prompt, in other letters and among other words."""
    question = prompt.rpartition("\n")[2]
    if found := re.search(r"special magic (number|uuid) for (\S.*?) mentioned", question):
        kind, key = found.groups()
        needle = rf"One of the special magic {kind}s for {re.escape(key)} is: (\S+)\."
        (value,) = re.findall(needle, prompt)
        return f" {value.upper()}."
    if "VAR" in prompt:
        value = re.search(r"assigned the value (\d+)", question)[1]
        found = [value]
        for name, what in re.findall(
            r"VAR ([A-Z]+) = (?:VAR )?(\w+)", prompt.replace("VAR VAR", "")
        ):
            found += [name] * (what in found)
        return " " + " ".join(found[1:]).lower()
    listed = prompt.rpartition("Below is" if "numbered list" in prompt else "Read the")[2]
    words = (
        re.findall(r"\d+\. (.*?)(?= \d+\. |\n)", listed) or listed.partition("words. ")[2].split()
    )
    counts = {word: words.count(word) for word in set(words) - {"..."}}
    return " " + ", ".join(sorted(counts, key=lambda word: -counts[word])[:10])


def test_a_model_that_copies_is_always_right(monkeypatch, suite):
    for name, figures in measure_script(monkeypatch, suite, copy_answer).items():
        score = figures["scores"]["score"]
        assert (score["value"], score["by_item"]) == (1.0, [1.0] * ITEMS), name
        assert figures["items"] == ITEMS and score["stderr"] == 0


def test_a_model_that_answers_at_random_is_never_right(monkeypatch, suite):
    source = random.Random(0)

    def write(_):
        return " ".join(str(source.randrange(10**7)) for _ in range(6))

    for name, figures in measure_script(monkeypatch, suite, write).items():
        assert figures["scores"]["score"]["value"] == 0.0, name


def test_half_of_the_wanted_texts_are_half_the_score(monkeypatch, suite):
    figures = measure_script(monkeypatch, suite, lambda text: copy_answer(text)[:12])
    assert 0 < figures[f"ruler_vt_{LENGTH}"]["scores"]["score"]["value"] < 1


def test_context_beyond_the_model_s_is_refused(tokenizer, tmp_path):
    from sparselong.evaluate.tasks.suite import load_suite

    with pytest.raises(ConfigError, match=r"(?s)ruler.lengths has 2,048.*at most 2,047"):
        load_suite(ruler_config(), tmp_path, tokenizer, LENGTH - 1)


def continue_greedily(model, ids, count):
    """Return the most likely tokens, each from a pass over the whole text."""
    for _ in range(count):
        with torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        ids = [*ids, int(logits.argmax())]
    return ids[-count:]


def test_prompts_are_continued_with_the_most_likely_tokens(model, tokenizer):
    source = random.Random(1)
    ids = [[source.randrange(256, 2000) for _ in range(n)] for n in (5, 40, 12)]
    prompts = [Prompt(each, len(each), 6, []) for each in ids]
    found = answering.continue_prompts(model, prompts, tokenizer, Spread())
    for each, one in zip(ids, found, strict=True):
        assert one.tokens == continue_greedily(model, each, 6)
        assert not one.ended and one.prompt_tokens == len(each)
        assert one.text == tokenizer.decode(one.tokens)
        assert 0 < one.first_seconds <= one.seconds


def test_answers_say_how_far_they_are(model, tokenizer):
    """Within an answer too, since one may take minutes."""
    told = []
    spread = Spread(report=lambda *count: told.append(count))
    prompts = [Prompt([5, 6, 7], 3, n, []) for n in (40, 8)]
    found = answering.continue_prompts(model, prompts, tokenizer, spread)
    assert [len(each.tokens) for each in found] == [40, 8]
    assert told == [("answer token", done, 48) for done in (0, 16, 32, 40, 48)]


def test_a_long_prompt_loses_its_beginning(model, tokenizer):
    ids = tokenizer("one two three four five six", add_special_tokens=False)["input_ids"]
    (cut,) = answering.continue_prompts(
        model, [Prompt("one two three four five six", 3, 4, [])], tokenizer, Spread()
    )
    assert cut.tokens == continue_greedily(model, ids[-3:], 4) and cut.prompt_tokens == 3


def test_answers_end_before_a_stop_that_several_tokens_spell(model, tokenizer):
    whole = answering.continue_prompts(model, [Prompt("A text", 2, 30, [])], tokenizer, Spread())[0]
    stop = whole.text[5:9]  # across tokens
    assert stop not in tokenizer.decode(whole.tokens[:1])
    prompt = Prompt("A text", 2, 30, ["not there", stop])
    (found,) = answering.continue_prompts(model, [prompt], tokenizer, Spread())
    assert found.text == whole.text[: whole.text.index(stop)] and found.ended
    assert len(found.tokens) < len(whole.tokens)


def test_a_token_that_ends_a_turn_ends_the_answer(monkeypatch, tokenizer):
    script = Script(tokenizer, lambda _: "Yes.<|return|>No.")
    monkeypatch.setattr(answering, "generate", lambda *a, **k: until_end(script, *a, **k))
    monkeypatch.setattr(answering, "_open_decoder", lambda *_: NoDecoder())
    (found,) = answering.continue_prompts(None, [Prompt("Is it?", 3, 30, [])], tokenizer, Spread())
    assert (found.text, found.ended) == ("Yes.", True)


def until_end(script, *arguments, stop, **keywords):
    for token in script.generate(*arguments, stop=stop, **keywords):
        yield token
        if token in stop:
            return


def test_speed_is_measured_by_the_prompt_s_length():
    made = [
        answering.Continuation([1, 2, 3], False, "", 900, 2.0, 3.0),
        answering.Continuation([1, 2], False, "", 1024, 4.0, 4.5),
        answering.Continuation([1], True, "", 1025, 5.0, 5.0),
    ]
    short, long = answering.measure_speed(made)
    assert short == {
        "up_to_tokens": 1024,
        "prompts": 2,
        "first_token_seconds": 3.0,
        "prompt_tokens_per_second": 1924 / 6,
        "tokens_per_second": 3 / 1.5,
    }
    assert (long["up_to_tokens"], long["tokens_per_second"]) == (2048, None)
