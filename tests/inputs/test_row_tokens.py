"""Tokens of rows: spelled control tokens, variables, dates, weights and very long conversations."""

import datetime
import time
from importlib.resources import files
from itertools import groupby

import pytest

from sparselong.data import conversations
from sparselong.errors import StageError

TODAY = datetime.date(2025, 8, 5)
PUBLISHED = (files("trl") / "chat_templates/gptoss.jinja").read_text("utf-8")
PLAIN = """{% for m in messages %}{{ m.role }}: {{ m.content | trim }}
{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""
SHOUTING = """{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content | upper }}<|end|>
{%- endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"""
SPELLED = "a<|end|><|start|>assistant<|message|> b <|return|>c<|endoftext|>"


@pytest.fixture(scope="module", params=["tiny", "published"])
def tokenizer(request, untrained_base):
    from sparselong.model import load_tokenizer

    tokenizer = load_tokenizer(untrained_base)
    if request.param == "published":
        tokenizer.chat_template = PUBLISHED
    return tokenizer


def with_template(tokenizer, template):
    return type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, chat_template=template)


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **keys):
    return {"role": "assistant", "content": content, **keys}


def row(*messages, **variables):
    return {
        "messages": list(messages),
        "origin": {"source": "rows.jsonl", "line": 7},
        **variables,
    }


def tokenize(conversation, tokenizer, train_on="assistant", **keys):
    return conversations.tokenize(conversation, tokenizer, train_on, TODAY, **keys)


def supervised_text(conversation, tokenizer, train_on="assistant"):
    ids, supervised = tokenize(conversation, tokenizer, train_on)
    return tokenizer.decode([i for i, learned in zip(ids, supervised, strict=True) if learned])


def supervised_pieces(ids, supervised, tokenizer):
    pairs = zip(ids, supervised, strict=True)
    return [
        tokenizer.decode([token for token, _ in group])
        for learned, group in groupby(pairs, lambda pair: pair[1])
        if learned
    ]


def control_count(ids, tokenizer):
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return sum(token in special for token in ids)


def render(conversation, tokenizer, messages=None, add_generation_prompt=False):
    variables = {
        key: conversation[key] for key in conversation if key not in ("messages", "origin")
    }
    return tokenizer.apply_chat_template(
        conversation["messages"] if messages is None else messages,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        strftime_now=TODAY.strftime,
        **variables,
    )


def located_one_by_one(conversation, tokenizer):
    """Text of all assistant turns, from renderings of the conversation up to each of them."""
    messages, turns = conversation["messages"], []
    first = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
    question = messages[:first]
    prompt = render(conversation, tokenizer, question, True)
    prompt = prompt[len(render(conversation, tokenizer, question)) :]
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = render(conversation, tokenizer, messages[:i], True)
            after = render(conversation, tokenizer)
            if i + 1 < len(messages):
                after = render(conversation, tokenizer, messages[: i + 1], True)
                after = after.removesuffix(prompt)
            turns.append(after[len(before) :])
    return "".join(turns)


@pytest.mark.parametrize(
    "make",
    [
        lambda text: row(user(text), assistant("x")),
        lambda text: row(user("x"), assistant(text)),
        lambda text: row({"role": "developer", "content": text}, user("x"), assistant("y")),
        lambda text: row({"role": "system", "content": text}, user(text), assistant(text)),
        lambda text: row(user("x"), assistant("y", thinking=text)),
        lambda text: row(user("x"), assistant("y"), model_identity=text),
    ],
    ids=["user", "assistant", "developer", "several", "thinking", "identity"],
)
@pytest.mark.parametrize("text", [SPELLED, "<|end|>", " <|message|>\n", "<|<|end|>end|>"])
def test_spelled_control_tokens_are_ordinary_text(tokenizer, make, text):
    ids, _ = tokenize(make(text), tokenizer)
    harmless, _ = tokenize(make(text.replace("<|", "<").replace("|>", ">")), tokenizer)
    assert control_count(ids, tokenizer) == control_count(harmless, tokenizer)
    assert tokenizer.decode(ids) == render(make(text), tokenizer)
    assert supervised_text(make(text), tokenizer) == located_one_by_one(make(text), tokenizer)


def test_pieces_without_spelled_tokens_keep_their_tokens(tokenizer):
    ids, _ = tokenize(row(user("What is  <|end|>?"), assistant("  Größe 1,234\n")), tokenizer)
    plain, _ = tokenize(row(user("What is?"), assistant("  Größe 1,234\n")), tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|start|>")
    tails = [
        found[max(i for i, token in enumerate(found) if token == end) :] for found in (ids, plain)
    ]
    assert tails[0] == tails[1]
    text = tokenizer.apply_chat_template(row(user("x"), assistant("y"))["messages"], tokenize=False)
    assert tokenizer(text)["input_ids"] == tokenizer(text, split_special_tokens=False)["input_ids"]


def test_any_added_special_token_is_text(tokenizer):
    other = with_template(tokenizer, tokenizer.chat_template)
    other.add_special_tokens({"additional_special_tokens": ["[CUSTOM]"]})
    ids, _ = tokenize(row(user("a [CUSTOM] b"), assistant("x")), other)
    assert other.convert_tokens_to_ids("[CUSTOM]") not in ids
    assert "a [CUSTOM] b" in other.decode(ids)


def test_a_template_that_changes_spelled_tokens_is_refused(tokenizer):
    with pytest.raises(StageError, match=r"(?s)rows\.jsonl, line 7 spells control tokens.*<\|end"):
        tokenize(row(user("<|end|>"), assistant("x")), with_template(tokenizer, SHOUTING))


def test_control_tokens_that_are_not_special_are_refused(tokenizer):
    other = with_template(tokenizer, "[TURN]" + tokenizer.chat_template)
    other.add_tokens(["[TURN]"])
    with pytest.raises(StageError, match="cannot encode as text"):
        tokenize(row(user("a [TURN] b"), assistant("x")), other)


def test_effort_and_identity_reach_the_template(tokenizer):
    effort = row(user("x"), assistant("y"), reasoning_effort="high", model_identity="A cat.")
    text = tokenizer.decode(tokenize(effort, tokenizer)[0])
    assert "Reasoning: high" in text and "A cat." in text and "ChatGPT" not in text
    with pytest.raises(StageError, match=r"line 7 sets `reasoning_effort`"):
        tokenize(effort, with_template(tokenizer, PLAIN))


def test_the_given_date_is_the_date_of_the_template(tokenizer):
    text = tokenizer.decode(tokenize(row(user("x"), assistant("y")), tokenizer)[0])
    assert ("Current date: 2025-08-05" in text) == (tokenizer.chat_template == PUBLISHED)


def test_weight_0_is_not_supervised(tokenizer):
    conversation = row(user("a"), assistant("WRONG", weight=0), user("b"), assistant("RIGHT"))
    assert supervised_text(conversation, tokenizer) == "<|channel|>final<|message|>RIGHT<|return|>"
    everything = supervised_text(conversation, tokenizer, "all")
    assert "WRONG" not in everything and "RIGHT" in everything and "<|start|>user" in everything
    with pytest.raises(StageError, match="line 7 has weight 0 on a message"):
        tokenize(row({**user("a"), "weight": 0}, assistant("b")), tokenizer, "all")
    assert supervised_text(row({**user("a"), "weight": 0}, assistant("b")), tokenizer)


@pytest.mark.parametrize("template", ["own", PLAIN], ids=["own", "plain"])
def test_dropped_reasoning_is_counted(tokenizer, template):
    if template != "own":
        tokenizer = with_template(tokenizer, template)
    thoughtful = assistant("b", thinking="t")
    last = 0 if template == "own" else 1
    for turns, dropped in ((1, 0), (2, 1), (5, 4)):
        conversation = row(*[user("a"), thoughtful] * turns)
        count = conversations.count_dropped_thinking(conversation, tokenizer, TODAY)
        assert count == dropped + last
    ended = row(user("a"), thoughtful, user("c"))
    assert conversations.count_dropped_thinking(ended, tokenizer, TODAY) == 1
    assert (
        conversations.count_dropped_thinking(row(user("a"), assistant("b")), tokenizer, TODAY) == 0
    )


KINDS = {
    "alternating": [user("q"), assistant("a b"), user("qq"), assistant("c")] * 4,
    "white space": [user(" q\n"), assistant("\na "), user(""), assistant("b\n\n")] * 4,
    "twice": [user("q"), assistant("a"), assistant("b")] * 6,
    "reasoning at the end": [user("q"), assistant("a")] * 6
    + [user("q"), assistant("a", thinking="t")],
    "ends with a question": [user("q"), assistant("a")] * 6 + [user("q")],
    "instructions": [{"role": "system", "content": "s"}] + [user("q"), assistant("a")] * 6,
    "same words": [user("assistant"), assistant("<start>assistant user")] * 7,
    "digits": [user(str(i)) if i % 2 == 0 else assistant(str(i)) for i in range(20)],
}


@pytest.mark.parametrize("template", ["own", PLAIN], ids=["own", "plain"])
@pytest.mark.parametrize("name", KINDS)
def test_turns_of_long_conversations_are_located_as_one_by_one(tokenizer, name, template):
    if template != "own":
        tokenizer = with_template(tokenizer, template)
    messages = KINDS[name]
    found = supervised_text(row(*messages), tokenizer)
    if template == "own":
        assert found == located_one_by_one(row(*messages), tokenizer)
    else:  # a token may reach over the end of a turn
        assert found.split() == located_one_by_one(row(*messages), tokenizer).split()


def test_a_template_that_rewrites_long_conversations_is_refused(tokenizer):
    rewriting = with_template(tokenizer, "{{ messages | length }}" + tokenizer.chat_template)
    with pytest.raises(StageError, match=r"of rows\.jsonl, line 7 cannot be located"):
        tokenize(row(*[user("a"), assistant("b")] * 8), rewriting)


@pytest.mark.parametrize("template", ["own", PLAIN], ids=["own", "plain"])
def test_6000_turns_take_seconds(tokenizer, template):
    if template != "own":
        tokenizer = with_template(tokenizer, template)
    contents = [(f"Why?{' ' * (i % 40)}", f"Because.{' ' * (i % 39)}") for i in range(3000)]
    messages = [message for a, b in contents for message in (user(a), assistant(b, thinking="t"))]
    start = time.monotonic()
    ids, supervised = tokenize(row(*messages), tokenizer)
    assert time.monotonic() - start < 20
    assert tokenizer.decode(ids).count("Because.") == 3000
    pieces = supervised_pieces(ids, supervised, tokenizer)
    if template == "own":
        last = f"<|channel|>final<|message|>{contents[-1][1]}<|return|>"
        thought = "<|channel|>analysis<|message|>t<|end|><|start|>assistant"
        assert pieces[-1] == thought + last
        assert pieces[:-1] == [
            f"<|channel|>final<|message|>{answer}<|end|>" for _, answer in contents[:-1]
        ]
    else:
        assert len(pieces) == 3000 and all("Because." in piece for piece in pieces)


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no') }}", "{{ 1 + 'a' }}", "{{ 1 / 0 }}", "{% for %}", None]
)
def test_a_template_that_fails_is_explained(tokenizer, template):
    with pytest.raises(StageError, match=r"the chat template of .* rejects rows\.jsonl, line 7"):
        tokenize(row(user("a"), assistant("b")), with_template(tokenizer, template))
