"""Health of what a model generates in a chat: does it end, does it loop, is it in harmony?

Accuracies do not show a model that never ends its answer, repeats itself or gets its channels
wrong, since likelihoods of given texts are measured there. A few fixed questions are answered with
each reasoning effort, with the most likely tokens. The figures are reported and not judged: the
base's are beside them.

An answer loops if a piece of at most `LOOP_PERIOD` tokens stands at least four times in succession
and the repetitions take at least `LOOP_TOKENS` tokens. It is malformed if harmony's parser had to
repair it (data/harmony.py lists the kinds). What is cut off at `evaluation.health_tokens` has not
ended.
"""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Sequence
from statistics import median
from typing import Any

from sparselong.data import EFFORTS, Parser, read_marks, render_prompt
from sparselong.evaluate.answering import Continuation
from sparselong.evaluate.work import Prompt

LOOP_PERIOD, LOOP_TOKENS = 64, 32
QUESTIONS = (
    "What is the capital of Australia?",
    "A train leaves at 9:40 and arrives at 13:05. How long does the journey take?",
    "Write a short story about a lighthouse keeper who finds a letter.",
    "Write a Python function that returns the longest palindrome in a string.",
    "List the planets of the solar system with one remarkable fact about each.",
    'Reply with a JSON object that has the keys "name" and "year" of any film, and nothing else.',
    "Erkläre in drei Sätzen, warum der Himmel blau ist.",
    "Is every even number above two the sum of two primes? Explain what is known.",
)


def list_chats(
    tokenizer: Any, today: datetime.date, count: int, new_tokens: int, positions: int
) -> list[Prompt]:
    """Return the first questions, each with every reasoning effort.

    Args:
        tokenizer: the base's, with its chat template.
        today: the date that the template writes.
        count: number of questions.
        new_tokens: most tokens of an answer.
        positions: the model's max_position_embeddings.

    Raises:
        StageError: the chat template is not harmony's.
    """
    chats = []
    for question in QUESTIONS[:count]:
        for effort in EFFORTS:
            messages = [{"role": "user", "content": question}]
            ids = render_prompt(tokenizer, messages, today=today, reasoning_effort=effort)
            chats.append(Prompt(ids, min(len(ids), positions - new_tokens), new_tokens, []))
    return chats


def describe(answers: Sequence[Continuation], tokenizer: Any) -> dict[str, dict[str, Any]]:
    """Return the health of answers to `list_chats`, in its order, by reasoning effort.

    Returns:
        For each effort the number of `answers`, and of those that `ended`, `looped`, were
        `malformed` and had `no_final` text; `repairs` by kind; `tokens`: {mean, median, most};
        `said`: the `question` and the answer's `messages` as [channel, text], for each.
    """
    return {
        effort: _describe(answers[number :: len(EFFORTS)], tokenizer)
        for number, effort in enumerate(EFFORTS)
        if answers
    }


def _describe(answers: Sequence[Continuation], tokenizer: Any) -> dict[str, Any]:
    marks, repairs, said = read_marks(tokenizer), Counter(), []
    malformed = no_final = 0
    for question, answer in zip(QUESTIONS, answers, strict=False):
        parser = Parser(tokenizer, marks)
        for token in answer.tokens:
            if token != tokenizer.pad_token_id:  # some models end with it; it is no text
                parser.feed(token)
        parser.close()
        repairs.update(parser.repairs)
        malformed += bool(parser.repairs)
        no_final += not any(each.channel == "final" and each.text for each in parser.messages)
        messages = [[each.channel, each.text] for each in parser.messages]
        said.append({"question": question, "messages": messages})
    lengths = [len(answer.tokens) for answer in answers]
    return {
        "answers": len(answers),
        "ended": sum(answer.ended for answer in answers),
        "looped": sum(is_loop(answer.tokens) for answer in answers),
        "malformed": malformed,
        "no_final": no_final,
        "repairs": dict(repairs.most_common()),
        "tokens": {
            "mean": sum(lengths) / len(lengths),
            "median": median(lengths),
            "most": max(lengths),
        },
        "said": said,
    }


def is_loop(tokens: Sequence[int]) -> bool:
    """Return whether a piece is repeated as this module's text says."""
    for period in range(1, LOOP_PERIOD + 1):
        repeated = 0  # tokens in succession that equal the one a period before
        for place in range(period, len(tokens)):
            repeated = repeated + 1 if tokens[place] == tokens[place - period] else 0
            if repeated >= max(3 * period, LOOP_TOKENS - period):
                return True
    return False
