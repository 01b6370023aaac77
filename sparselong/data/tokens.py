"""Tokens of a conversation, and which of them are supervised.

Only the template writes control tokens. Where a message spells one (`<|end|>`), its characters are
ordinary text: the conversation is rendered a second time with a private character for each spelled
token. The control tokens that the tokenizer finds in that text are the template's own. Each stretch
between two of them that holds a private character is encoded again from the real text, with special
tokens split. All other stretches keep their tokens, and so do all conversations that spell none.

Rows without turns need no template: `text` is every one of its tokens and <|endoftext|>, which ends
a document; `input_ids` are taken as they are. Their tokens are supervised whatever `train_on` says,
which chooses among turns, except for those that a row's `labels` leave out.

Left out: tokenizers that join text across a control token, which are refused in such a row.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable
from itertools import accumulate
from typing import Any, NamedTuple

from sparselong.config import TrainOn
from sparselong.data.calls import find_texts
from sparselong.data.layouts import IGNORED
from sparselong.data.rows import Conversation, locate
from sparselong.data.template import (
    Template,
    find_answers,
    find_rendered_thinking,
    find_turns,
    unused,
    without_dropped_thinking,
)
from sparselong.errors import StageError

_END_OF_TEXT = "<|endoftext|>"


class _Rendered(NamedTuple):
    """A rendered conversation.

    Args:
        text: as the template writes it.
        hidden: the same text with a private character for each control token that a message spells.
        spelled: control token by private character.
    """

    text: str
    hidden: str
    spelled: dict[str, str]


def tokenize(
    conversation: Conversation,
    tokenizer: Any,
    train_on: TrainOn,
    today: datetime.date,
    longest: int | None = None,
) -> tuple[list[int], list[bool]]:
    """Return the tokens of a conversation and which of them are supervised.

    An assistant turn is everything that the model must generate after the generation prompt: in
    harmony, the channel, the reasoning if it is rendered, the answer and the closing token.

    Args:
        conversation: a conversation as returned by `conversations.read`.
        tokenizer: a fast transformers tokenizer with a chat template.
        train_on: `assistant` marks the assistant turns, `final` their answers without reasoning
            and tool calls, `last_turn` those after the last question that is answered, `all` marks
            every token; turns of weight 0 are never marked.
        today: the date for templates that write one.
        longest: number of tokens above which the caller leaves a conversation out; its turns are
            not located, and no token of it is marked.

    Returns:
        (input_ids, supervised), two lists of equal length.

    Raises:
        StageError: the template rejects the conversation, or a shortened conversation does not
            render as a prefix of the whole one.
    """
    if "messages" not in conversation:
        ids, supervised = _encode_plain(conversation, tokenizer)
        return ids, supervised if longest is None or len(ids) <= longest else [False] * len(ids)
    template = Template(conversation, tokenizer, today)
    messages = _plain(conversation)
    template.refuse_unwritten(messages)
    text = template.render(messages)
    ids, starts = _encode(_hide_spelled(template, messages, text), template)
    if longest is not None and len(ids) > longest:
        return ids, [False] * len(ids)
    weights = [message.get("weight", 1) for message in conversation["messages"]]
    if train_on == "all" and all(weights):
        return ids, [True] * len(ids)
    marks = _find_marks(template, messages, text, train_on, weights)
    return ids, _mark(starts, marks, train_on == "all")


def _find_marks(
    template: Template,
    messages: list[dict[str, Any]],
    text: str,
    train_on: TrainOn,
    weights: list[int],
) -> list[tuple[int, int, bool]]:
    """Return (start, end, whether it is supervised) of each assistant turn in the text."""
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if train_on == "all" and not all(
        weights[i] for i in range(len(messages)) if i not in set(turns)
    ):
        raise StageError(
            f"{template.where} has weight 0 on a message that is not the assistant's",
            "weights on assistant messages with data.train_on=all",
            "a system, developer or user message that would be supervised",
            "remove the weight, or use data.train_on=assistant",
        )
    spans = find_turns(template, messages, text)
    if train_on == "final":
        spans = find_answers(template, messages, text, spans)
        turns = [i if "tool_calls" not in messages[i] else None for i in turns]
    elif train_on == "last_turn":
        questions = [i for i in range(turns[-1]) if messages[i]["role"] == "user"]
        turns = [i if i > max(questions, default=-1) else None for i in turns]
    return [
        (*span, i is not None and weights[i] != 0) for span, i in zip(spans, turns, strict=True)
    ]


def encode_prompt(template: Template, messages: list[dict[str, Any]]) -> list[int]:
    """Return the tokens of messages and the beginning of the assistant turn that follows them.

    The template sees private characters instead of control tokens that a message spells, so that
    it accepts answers about harmony itself.

    Raises:
        StageError: the template rejects the messages, or the tokenizer cannot encode a spelled
            control token as text.
    """
    private = _find_spelled(template, messages)
    return _encode(_render_hidden(template, messages, private, True), template)[0]


def count_dropped_thinking(conversation: Conversation, tokenizer: Any, today: datetime.date) -> int:
    """Return the number of messages whose `thinking` the template does not write.

    gpt-oss's template writes the reasoning of the last message only.
    """
    messages = _plain(conversation) if "messages" in conversation else []
    if not any("thinking" in message for message in messages):
        return 0
    template = Template(conversation, tokenizer, today)
    text = template.render(messages)
    rendered = find_rendered_thinking(template, messages, text)
    if rendered is None:  # the template changes the reasoning that it writes
        left = without_dropped_thinking(template, messages, text)
        rendered = {i for i, message in enumerate(left) if "thinking" in message}
    return sum("thinking" in message for i, message in enumerate(messages) if i not in rendered)


def _encode_plain(conversation: Conversation, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Return the tokens of a row without turns, and which are supervised."""
    where = locate(conversation)
    if "text" not in conversation:
        ids, size = conversation["input_ids"], len(tokenizer)
        if max(ids) >= size:
            raise StageError(
                f"{where} has tokens of another tokenizer",
                f"ids below {size:,}",
                f"{max(ids):,}",
                "tokenize the row with the base model's tokenizer",
            )
        labels = conversation.get("labels", ids)
        return ids, [wanted != IGNORED for wanted in labels]
    text, added = conversation["text"], tokenizer.get_added_vocab()
    special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    spelled = [token for token in special if token in text]
    if spelled or _END_OF_TEXT not in added:
        raise StageError(
            f"{where} cannot be encoded as plain text",
            f"a text without control tokens, and a tokenizer with {_END_OF_TEXT} to end it",
            f"{', '.join(sorted(spelled)) or 'a tokenizer without it'}",
            "put a conversation under `messages`, or a rendered one's tokens under `input_ids`",
        )
    ids = [*_encode_text(text, tokenizer)[0], added[_END_OF_TEXT]]
    return ids, [True] * len(ids)


def _plain(conversation: Conversation) -> list[dict[str, Any]]:
    """Return the messages as the template knows them."""
    return [
        {key: value for key, value in message.items() if key != "weight"}
        for message in conversation["messages"]
    ]


def _mark(starts: list[int], spans: list[tuple[int, int, bool]], outside: bool) -> list[bool]:
    """Return for each token, given its first character, what its span says, or `outside`."""
    supervised, ahead = [], iter([*spans, (1 << 62, 1 << 62, outside)])
    start, end, inside = next(ahead)
    for token_start in starts:
        while token_start >= end:
            start, end, inside = next(ahead)
        supervised.append(inside if start <= token_start else outside)
    return supervised


def _control_tokens(template: Template) -> set[str]:
    """Return special tokens, and other added tokens that the template writes."""
    return {
        token.content
        for token in template.tokenizer.added_tokens_decoder.values()
        if token.special or (token.content.strip() and token.content in template.source)
    }


def _change_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Return a copy with every text changed that `find_texts` yields."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): _change_texts(each, change) for key, each in value.items()}
    return [_change_texts(each, change) for each in value] if isinstance(value, list) else value


def _hide_spelled(template: Template, messages: list[dict[str, Any]], text: str) -> _Rendered:
    """Return the rendered conversation with the control tokens hidden that messages spell."""
    private = _find_spelled(template, messages)
    if not private:
        return _Rendered(text, text, {})
    rendered = _render_hidden(template, messages, private)
    if rendered.text != text:
        raise StageError(
            f"{template.where} spells control tokens, which {template.name} changes",
            "a template that writes contents unchanged",
            f"{', '.join(private)} in a message",
            "remove the control tokens from the row, or use gpt-oss's own template",
        )
    return rendered


def _control_pattern(template: Template) -> re.Pattern[str]:
    controls = sorted(_control_tokens(template), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, controls)) or r"(?!)")


def _find_spelled(template: Template, messages: list[dict[str, Any]]) -> dict[str, str]:
    """Return a private character for each control token that messages or variables spell."""
    pattern = _control_pattern(template)
    written = list(find_texts([messages, template.variables]))
    found = sorted({token for value in written for token in pattern.findall(value)})
    if not found:
        return {}
    return dict(zip(found, unused(template.source, *written, count=len(found)), strict=True))


def _render_hidden(
    template: Template,
    messages: list[dict[str, Any]],
    private: dict[str, str],
    prompt: bool = False,
) -> _Rendered:
    """Render with private characters instead of control tokens.

    Args:
        template: the template.
        messages: the conversation.
        private: what `_find_spelled` returns.
        prompt: whether the beginning of an assistant turn ends the text.
    """
    pattern = _control_pattern(template)

    def hide(value: str) -> str:
        return pattern.sub(lambda match: private[match[0]], value)

    hidden = template.render(
        _change_texts(messages, hide), prompt, _change_texts(template.variables, hide)
    )
    spelled = {character: token for token, character in private.items()}
    return _Rendered(_restore(hidden, spelled), hidden, spelled)


def _restore(hidden: str, spelled: dict[str, str]) -> str:
    return hidden.translate(str.maketrans(spelled))


def _encode(rendered: _Rendered, template: Template) -> tuple[list[int], list[int]]:
    """Return token ids, and the place of each token's first character in `rendered.text`."""
    ids, spans = _encode_text(rendered.hidden, template.tokenizer)
    if not rendered.spelled:
        return ids, [start for start, _ in spans]
    controls = _control_tokens(template)
    decoder = template.tokenizer.added_tokens_decoder
    control_ids = {number for number, token in decoder.items() if token.content in controls}
    lengths = (len(rendered.spelled.get(character, " ")) for character in rendered.hidden)
    place = list(accumulate(lengths, initial=0))  # in the text, of each character of `hidden`
    out_ids: list[int] = []
    out_starts: list[int] = []
    first, begin = 0, 0  # the token and the character after the last control token
    cuts = [index for index, number in enumerate(ids) if number in control_ids]
    for index in [*cuts, len(ids)]:
        end = spans[index][0] if index < len(ids) else len(rendered.hidden)
        piece = rendered.hidden[begin:end]
        if not rendered.spelled.keys().isdisjoint(piece):
            inner, inner_spans = _encode_spelled(piece, ids[first:index], rendered, template)
            if not control_ids.isdisjoint(inner):
                raise _cannot_encode(rendered, template)
            out_ids += inner
            out_starts += [place[begin] + start for start, _ in inner_spans]
        else:
            out_ids += ids[first:index]
            out_starts += [place[start] for start, _ in spans[first:index]]
        if index < len(ids):
            out_ids.append(ids[index])
            out_starts.append(place[end])
            first, begin = index + 1, spans[index][1]
    return out_ids, out_starts


def _encode_spelled(
    piece: str, found: list[int], rendered: _Rendered, template: Template
) -> tuple[list[int], list[tuple[int, int]]]:
    """Return ids and spans of the real text of a stretch between control tokens.

    Args:
        piece: the stretch with hidden control tokens.
        found: its tokens within the whole text.
        rendered: the conversation.
        template: the template with its tokenizer.
    """
    result = _encode_text(_restore(piece, rendered.spelled), template.tokenizer, split=True)
    # This also sets the tokenizer back to finding special tokens.
    if _encode_text(piece, template.tokenizer)[0] != found:
        raise _cannot_encode(rendered, template)
    return result


def _encode_text(
    text: str, tokenizer: Any, split: bool = False
) -> tuple[list[int], list[tuple[int, int]]]:
    encoded = tokenizer(
        text,
        add_special_tokens=False,
        return_offsets_mapping=True,
        split_special_tokens=split,
        verbose=False,  # the caller decides what is too long
    )
    return list(encoded["input_ids"]), encoded["offset_mapping"]


def _cannot_encode(rendered: _Rendered, template: Template) -> StageError:
    return StageError(
        f"{template.where} spells control tokens, which this tokenizer cannot encode as text",
        "a tokenizer whose control tokens are special, and separate the text around them",
        f"{', '.join(sorted(rendered.spelled.values()))} in a message",
        "remove the control tokens from the row, or use gpt-oss's own tokenizer",
    )
