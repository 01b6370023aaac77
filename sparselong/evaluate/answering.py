"""A model's answers to what tasks ask: likelihoods of texts, and continuations of prompts.

Continuations are the most likely tokens, generated one prompt at a time with `sparselong.generate`,
whose memory does not grow with the prompt as a batch's would. A token that ends a turn ends them,
and so does a text of the prompt's `stops`.

Several processes that each hold the model take turns at the prompts. Processes that share a model
all continue the same prompt: each computes its share of every token, and all get the same logits
and therefore the same tokens, so that nothing else has to be exchanged. Every prompt is read whole,
even if it begins like an earlier one, so that answers do not depend on which process answered what.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from sparselong.data import read_marks
from sparselong.evaluate import scoring
from sparselong.evaluate.spread import Spread
from sparselong.evaluate.work import Answers, Prompt, Questions
from sparselong.generation import Decoder, generate

_COUNTED = "answer token"
"""What is counted; an answer that ends early counts as one of the most tokens."""
_TOLD_TOKENS = 16


class Continuation(NamedTuple):
    """What a model generated after a prompt.

    Attributes:
        tokens: the generated ones.
        ended: whether a token that ends a turn, which is the last one, or a stop ended them.
        text: their text up to that.
        prompt_tokens: tokens that were read.
        first_seconds: from the prompt to the first token.
        seconds: from the prompt to the last token.
    """

    tokens: list[int]
    ended: bool
    text: str
    prompt_tokens: int
    first_seconds: float
    seconds: float


def answer(
    model: Any, questions: Questions, tokenizer: Any, batch_size: int, spread: Spread
) -> tuple[Answers, list[Continuation]]:
    """Return a model's answers to tasks' questions, and how all prompts were continued.

    The continuations of `questions.prompts` come first, and then those of its chats.

    Args:
        model: a GptOssForCausalLM in eval mode.
        questions: what tasks ask.
        tokenizer: the base's.
        batch_size: maximum number of texts per pass; prompts are continued one at a time.
        spread: the processes among which the questions are spread; all get all answers.
    """
    likelihoods = scoring.score(model, questions.requests, batch_size, spread)
    prompts = [*questions.prompts, *questions.chats]
    continued = continue_prompts(model, prompts, tokenizer, spread)
    texts = [each.text for each in continued[: len(questions.prompts)]]
    return Answers(likelihoods, texts), continued


def continue_prompts(
    model: Any, prompts: Sequence[Prompt], tokenizer: Any, spread: Spread
) -> list[Continuation]:
    """Return the continuation of each prompt, in order; arguments as for `answer`.

    Raises:
        StageError: a logit is not finite.
    """
    if not prompts:
        return []
    ends = find_ends(tokenizer)
    # The longest first, so that memory that does not suffice is missed at once.
    order = sorted(range(len(prompts)), key=lambda i: (-prompts[i].tokens, i))
    found: dict[int, Continuation] = {}
    with spread.same_rows():
        decoder = _open_decoder(model, prompts, spread)
        own = order[spread.group :: spread.groups]
        done, total = 0, sum(prompts[i].new_tokens for i in own)
        spread.tell(_COUNTED, 0, total)
        for i in own:
            decoder.forget()
            told = partial(_tell, spread, done, total)
            found[i] = _continue(decoder, prompts[i], tokenizer, ends, told)
            done += prompts[i].new_tokens
            spread.tell(_COUNTED, done, total)
    merged = {i: each for part in spread.collect(found) for i, each in part.items()}
    return [merged[i] for i in range(len(prompts))]


def _tell(spread: Spread, before: int, total: int, tokens: int) -> None:
    """Report tokens of an answer now and then; `before` are those of earlier answers."""
    if tokens % _TOLD_TOKENS == 0:
        spread.tell(_COUNTED, before + tokens, total)


def measure_speed(continued: Sequence[Continuation]) -> list[dict[str, Any]]:
    """Return how fast prompts were read and continued, by their length.

    Returns:
        For each doubling of the length {up_to_tokens, prompts, first_token_seconds (mean),
        prompt_tokens_per_second, tokens_per_second (after the first; None if none followed)}.
    """
    by_length: dict[int, list[Continuation]] = {}
    for each in continued:
        by_length.setdefault(1 << (each.prompt_tokens - 1).bit_length(), []).append(each)
    rows = []
    for up_to, group in sorted(by_length.items()):
        first = sum(each.first_seconds for each in group)
        later = sum(each.seconds - each.first_seconds for each in group)
        count = sum(len(each.tokens) - 1 for each in group)
        rows.append(
            {
                "up_to_tokens": up_to,
                "prompts": len(group),
                "first_token_seconds": first / len(group),
                "prompt_tokens_per_second": sum(each.prompt_tokens for each in group) / first,
                "tokens_per_second": count / later if count and later > 0 else None,
            }
        )
    return rows


def find_ends(tokenizer: Any) -> tuple[int, ...]:
    """Return the tokens that end an answer: `<|return|>`, `<|call|>`, and the end of a text."""
    marks = read_marks(tokenizer)
    others = (tokenizer.eos_token_id, tokenizer.pad_token_id)
    return (marks.return_, marks.call, *(token for token in others if token is not None))


def _open_decoder(model: Any, prompts: Sequence[Prompt], spread: Spread) -> Decoder:
    room = max(prompt.tokens + prompt.new_tokens for prompt in prompts)
    # A capture fails if another thread uses the GPU, as those that watch the other processes may.
    return Decoder(model, room, use_graph=spread.mesh is None)


def _continue(
    decoder: Decoder,
    prompt: Prompt,
    tokenizer: Any,
    ends: tuple[int, ...],
    told: Callable[[int], None],
) -> Continuation:
    ids = prompt.content
    if isinstance(ids, str):
        ids = tokenizer(ids, add_special_tokens=False)["input_ids"]
    ids = ids[-prompt.tokens :]
    tokens: list[int] = []
    begun = time.monotonic()
    first = seconds = 0.0
    ended = False
    for token in generate(
        decoder.model, torch.tensor([ids]), prompt.new_tokens, stop=ends, decoder=decoder
    ):
        tokens.append(token)
        told(len(tokens))
        seconds = time.monotonic() - begun
        first = first or seconds
        if token in ends:
            ended = True
        elif _stops(tokens, prompt.stops, tokenizer):
            ended = True
            break
    text = tokenizer.decode([t for t in tokens if t not in ends], skip_special_tokens=True)
    return Continuation(tokens, ended, _cut(text, prompt.stops), len(ids), first, seconds)


def _stops(tokens: list[int], stops: list[str], tokenizer: Any) -> bool:
    """Return whether the last token completes one of the stops."""
    if not stops:
        return False
    most = max(len(stop.encode()) for stop in stops)  # a token has at least one byte
    tail = tokenizer.decode(tokens[-most:])
    return any(stop in tail for stop in stops)


def _cut(text: str, stops: list[str]) -> str:
    """Return the text before the first of the stops."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]
