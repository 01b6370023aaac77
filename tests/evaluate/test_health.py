"""Whether answers end, loop and keep to harmony, from answers that are known to."""

import datetime

import pytest

from sparselong.evaluate import health
from sparselong.evaluate.answering import Continuation

TODAY = datetime.date(2026, 1, 31)
GOOD = "<|channel|>analysis<|message|>Sure.<|end|><|start|>assistant<|channel|>final<|message|>Yes."


def answer_with(tokenizer, text, ended=True):
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    return Continuation(tokens, ended, text, 10, 0.1, 0.2)


def test_each_question_is_asked_with_each_effort(tokenizer):
    chats = health.list_chats(tokenizer, TODAY, 2, 64, 131_072)
    texts = [tokenizer.decode(chat.content) for chat in chats]
    assert [("Reasoning: " + effort) in text for effort, text in zip(
        ("low", "medium", "high") * 2, texts, strict=True)] == [True] * 6  # fmt: skip
    for number, text in enumerate(texts):
        assert health.QUESTIONS[number // 3] in text and text.endswith("<|start|>assistant")
    assert all(chat.tokens == len(chat.content) and chat.new_tokens == 64 for chat in chats)
    assert health.list_chats(tokenizer, TODAY, 0, 64, 131_072) == []
    assert len(health.QUESTIONS) == 8


def test_what_is_wrong_with_answers_is_counted_by_effort(tokenizer):
    good = answer_with(tokenizer, f"{GOOD}<|return|>")
    cut = answer_with(tokenizer, GOOD, ended=False)
    unknown = answer_with(tokenizer, "<|channel|>thoughts<|message|>So.<|end|><|return|>")
    looping = answer_with(tokenizer, GOOD + " and so on" * 40, ended=False)
    silent = answer_with(tokenizer, "<|channel|>analysis<|message|>Hm.<|end|><|return|>")
    answers = [good, cut, unknown, good, looping, silent]  # low, medium, high, low, …
    found = health.describe(answers, tokenizer)
    counts = {
        effort: [row[key] for key in ("answers", "ended", "looped", "malformed", "no_final")]
        for effort, row in found.items()
    }
    assert counts["low"] == [2, 2, 0, 0, 0]
    assert counts["medium"] == [2, 0, 1, 0, 0]
    assert counts["high"][:4] == [2, 2, 0, 2] and counts["high"][4] == 1
    assert found["high"]["repairs"]["unknown channel"] == 1 and found["low"]["repairs"] == {}
    lengths = sorted(len(each.tokens) for each in (cut, looping))
    assert found["medium"]["tokens"] == {
        "mean": sum(lengths) / 2, "median": sum(lengths) / 2, "most": lengths[1]
    }  # fmt: skip
    (first, second) = found["low"]["said"]
    assert [first["question"], second["question"]] == [*health.QUESTIONS[:2]]
    assert first["messages"] == [["analysis", "Sure."], ["final", "Yes."]]
    assert health.describe([], tokenizer) == {}


@pytest.mark.parametrize(
    ("tokens", "loops"),
    [
        ([7] * 32, True),
        ([7] * 31, False),
        ([*range(100), *[1, 2, 3] * 11], True),
        ([1, 2, 3] * 10, False),  # 30 tokens
        ([*range(64)] * 4, True),
        ([*range(64)] * 3, False),
        ([*range(65)] * 9, False),  # too long a piece
        ([1, 2] * 15 + [*range(50)] + [1, 2] * 15, False),  # not in succession
        ([], False),
    ],
)
def test_a_loop_is_four_repetitions_in_at_least_32_tokens(tokens, loops):
    assert health.is_loop(tokens) == loops
