"""A conversation in the model's own chat template, and where its assistant turns are in the text.

In harmony, a shortened conversation does not render as a prefix of the whole one (a final
`<|return|>` becomes `<|end|>`, earlier `thinking` is dropped). A turn is therefore located between
two renderings *with* a generation prompt, both of which must be prefixes of the whole. A template
that rewrites history in any other way is refused, because its mask would be wrong.

Three renderings for each turn take time that grows with the square of the number of turns. In a
long conversation, only the first and the last turn of each kind are located so. Turns are of one
kind if the template writes the same text before and after their content; with tool calls, harmony's
own control tokens separate the turns.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from sparselong.data.calls import find_texts
from sparselong.data.layouts import VARIABLES
from sparselong.data.lines import shown
from sparselong.data.rows import Conversation, locate
from sparselong.errors import StageError

_FEW_TURNS = 4
_FRAME = ("<|start|>", "<|end|>", "<|call|>", "<|return|>")
_ASSISTANTS = re.compile(
    r"<\|start\|>assistant(.*?(?:<\|end\|>|<\|call\|>|<\|return\|>))", re.DOTALL
)
# Around contents and reasoning in a marked rendering: private characters, chosen by `unused`.
_PRIVATE = range(0xF0000, 0xFFFFE)


class Template:
    """The chat template with one conversation's variables.

    Args:
        conversation: a conversation as read from a prepared file, or a chat's variables.
        tokenizer: a fast transformers tokenizer with a chat template.
        today: the date for templates that write one.

    Raises:
        StageError: the tokenizer has no template, or the template does not use a variable that the
            conversation sets.
    """

    def __init__(self, conversation: Conversation, tokenizer: Any, today: datetime.date):
        self.where = locate(conversation)
        self.tokenizer = tokenizer
        self.name = f"the chat template of {tokenizer.name_or_path or 'the tokenizer'}"
        names = (*VARIABLES, "tools")
        self.variables = {key: conversation[key] for key in names if key in conversation}
        self.today = today
        try:
            self.source: str = tokenizer.get_chat_template()
        except ValueError as error:
            raise self._rejects(error) from error
        for key in self.variables:
            if key not in self.source:
                raise StageError(
                    f"{self.where} sets `{key}`",
                    f"a chat template that uses `{key}`",
                    f"{self.name} does not",
                    f"remove `{key}`, or use gpt-oss's own template",
                )

    def render(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool = False,
        variables: dict[str, Any] | None = None,
    ) -> str:
        """Return the messages as text.

        Args:
            messages: messages of the conversation, possibly fewer or changed.
            add_generation_prompt: whether the beginning of an assistant turn ends the text.
            variables: values instead of the conversation's own.

        Raises:
            StageError: the template rejects the messages.
        """
        from jinja2 import TemplateError  # imported here: only needed with transformers

        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                strftime_now=self.today.strftime,  # instead of the clock that templates may read
                **(self.variables if variables is None else variables),
            )
        except (TemplateError, ArithmeticError, AttributeError, LookupError) as error:
            raise self._rejects(error) from error
        except (RecursionError, TypeError, ValueError) as error:
            raise self._rejects(error) from error

    def refuse_unwritten(self, messages: list[dict[str, Any]]) -> None:
        """Raise if the messages have tool calls, which the template does not write."""
        called = any("tool_calls" in each or each["role"] == "tool" for each in messages)
        if called and "tool_calls" not in self.source:
            raise StageError(
                f"{self.where} has tool calls",
                "a chat template that writes tool calls",
                f"{self.name} does not",
                "remove the row, or use a model directory with gpt-oss's chat_template.jinja",
            )

    def _rejects(self, error: Exception) -> StageError:
        return StageError(
            f"{self.name} rejects {self.where}",
            "a template for the roles of its messages",
            str(error),
            "fix the messages, or use a model directory with gpt-oss's chat_template.jinja",
        )


def unused(*texts: str, count: int) -> list[str]:
    """Return private characters that do not occur in the texts.

    Raises:
        StageError: the texts leave fewer.
    """
    used = set().union(*texts)
    free = [chr(code) for code in _PRIVATE if chr(code) not in used][:count]
    if len(free) < count:
        raise StageError(
            "a conversation uses nearly all of Unicode's private characters",
            f"{count} unused ones",
            f"{len(free)}",
            "remove the row",
        )
    return free


def find_rendered_thinking(
    template: Template, messages: list[dict[str, Any]], text: str
) -> set[int] | None:
    """Return the indices of messages whose `thinking` is part of the rendered text.

    None if the template changes the reasoning, so that it cannot be found.
    """
    (mark,) = unused(text, *(message.get("thinking", "") for message in messages), count=1)
    marked = [
        {**message, "thinking": _enclose(message["thinking"], f"{mark}{i}{mark}", "", str.strip)}
        if "thinking" in message
        else message
        for i, message in enumerate(messages)
    ]
    rendered, pattern = template.render(marked), re.compile(f"{mark}(\\d+){mark}")
    if pattern.sub("", rendered) != text:
        return None
    return {int(index) for index in pattern.findall(rendered)}


def without_dropped_thinking(
    template: Template, messages: list[dict[str, Any]], text: str
) -> list[dict[str, Any]]:
    """Return the messages without `thinking` that the template drops.

    A template that renders only the last assistant turn's reasoning would otherwise render it in a
    shortened conversation, where an earlier turn is the last one.
    """
    rendered = find_rendered_thinking(template, messages, text)
    if rendered is None:
        turns = _turns(messages)
        rendered = {turns[-1]} if turns else set()
    stripped = [
        {key: value for key, value in message.items() if key != "thinking" or i in rendered}
        for i, message in enumerate(messages)
    ]
    return stripped if template.render(stripped) == text else messages


def find_turns(
    template: Template, messages: list[dict[str, Any]], text: str
) -> list[tuple[int, int]]:
    """Return (start, end) in characters of each assistant turn in the rendered text.

    Raises:
        StageError: a shortened conversation does not render as a prefix of the whole one.
    """
    turns = _turns(messages)
    if any("thinking" in messages[i] for i in turns if i + 1 < len(messages)):
        messages = without_dropped_thinking(template, messages, text)
    # Measured after a question: without a prompt, a last answer ends otherwise than in history.
    question = messages[: turns[0]]
    prompt_length = len(template.render(question, True)) - len(template.render(question))
    if len(turns) > _FEW_TURNS:
        called = any("tool_calls" in message for message in messages)
        find = _find_by_headers if called else _find_by_kind
        spans = find(template, messages, text, prompt_length)
        if spans is not None:
            return spans
    return [_find_turn(template, messages, text, i, prompt_length) for i in turns]


def find_answers(
    template: Template, messages: list[dict[str, Any]], text: str, spans: list[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Return (start, end) of each assistant turn without the reasoning before it.

    Args:
        template: the template.
        messages: the conversation.
        text: the rendered conversation.
        spans: what `find_turns` returns.

    Raises:
        StageError: a turn does not end with what is rendered of it without reasoning.
    """
    bare = [{key: each[key] for key in each if key != "thinking"} for each in messages]
    without = template.render(bare)
    if without == text:
        return spans
    answers = []
    for (start, end), (first, last) in zip(spans, find_turns(template, bare, without), strict=True):
        answer = without[first:last]
        if not text[start:end].endswith(answer):
            raise StageError(
                f"an answer of {template.where} cannot be separated from its reasoning",
                "reasoning before an answer that is rendered as without it",
                f"{template.name} renders {shown(text[start:end])}",
                "use data.train_on=assistant, or gpt-oss's own template",
            )
        answers.append((end - len(answer), end))
    return answers


def _turns(messages: list[dict[str, Any]]) -> list[int]:
    return [i for i, message in enumerate(messages) if message["role"] == "assistant"]


def _find_turn(
    template: Template, messages: list[dict[str, Any]], text: str, i: int, prompt_length: int
) -> tuple[int, int]:
    """Return (start, end) of message i's turn by rendering the conversation up to it."""
    prompt = template.render(messages[:i], True)
    if i + 1 < len(messages):  # render as history: with a generation prompt, which is cut off
        prefix = template.render(messages[: i + 1], True)
        prefix = prefix[: len(prefix) - prompt_length]
    else:
        prefix = text
    if prompt_length < 0 or not prefix.startswith(prompt) or not text.startswith(prefix):
        raise StageError(
            f"message {i + 1} of {template.where} cannot be located in the rendered text",
            "every shortened conversation renders as a prefix of the whole one",
            f"the template rewrites earlier turns: {messages[i]['content'][:60]!r}",
            "use data.train_on=all, rows with one assistant turn, or gpt-oss's own template",
        )
    return len(prompt), len(prefix)


def _find_by_headers(
    template: Template, messages: list[dict[str, Any]], text: str, prompt_length: int
) -> list[tuple[int, int]] | None:
    """Return the turns located by harmony's headers, checked at the first and last of each kind.

    None if the template is not harmony's, or if a message spells one of its control tokens.
    """
    written = "".join(find_texts([messages, template.variables]))
    rendered = find_rendered_thinking(template, messages, text)
    if rendered is None or any(token in written for token in _FRAME):
        return None
    parts, turns = list(_ASSISTANTS.finditer(text)), _turns(messages)
    if len(parts) != len(turns) + len(rendered):
        return None
    spans, ahead, kinds = [], iter(parts), {}
    for place, i in enumerate(turns):
        first = next(ahead)
        last = next(ahead) if i in rendered else first
        spans.append((first.start(1), last.end(1)))
        kinds.setdefault(("tool_calls" in messages[i], i in rendered), []).append(place)
    for members in kinds.values():
        for place in {members[0], members[-1]}:
            found = _find_turn(template, messages, text, turns[place], prompt_length)
            if found != spans[place]:
                return None
    return spans


class _Gap(NamedTuple):
    """What the template writes between the contents of two messages.

    Args:
        kind: its text, reasoning replaced by a mark.
        fixed: number of characters before the reasoning, or of all.
        start: its place in the rendered text.
        end: the place after it.
    """

    kind: str
    fixed: int
    start: int
    end: int


def _find_by_kind(
    template: Template, messages: list[dict[str, Any]], text: str, prompt_length: int
) -> list[tuple[int, int]] | None:
    """Return the turns located by the first and last turn of each kind.

    None if the template changes contents, or if turns of a kind lie differently.
    """
    # Templates that strip contents leave only marks inside the white space in place.
    gaps = _find_gaps(template, messages, text, str) or _find_gaps(
        template, messages, text, str.strip
    )
    if gaps is None:
        return None
    kinds: dict[tuple[str, str], list[int]] = {}
    for i in _turns(messages):
        kinds.setdefault((gaps[i].kind, gaps[i + 1].kind), []).append(i)
    spans: dict[int, tuple[int, int]] = {}
    for members in kinds.values():
        places = set()
        for i in {members[0], members[-1]}:
            start, end = _find_turn(template, messages, text, i, prompt_length)
            places.add((start - gaps[i].start, end - gaps[i + 1].start))
        start, end = places.pop()
        first = members[0]
        if places or not (0 <= start <= gaps[first].fixed and 0 <= end <= gaps[first + 1].fixed):
            return None
        for i in members:
            spans[i] = gaps[i].start + start, gaps[i + 1].start + end
    return [spans[i] for i in sorted(spans)]


def _find_gaps(
    template: Template, messages: list[dict[str, Any]], text: str, cut: Callable[[str], str]
) -> list[_Gap] | None:
    """Return the gaps before each content and after the last, or None if contents are changed.

    Args:
        template: the template.
        messages: the conversation.
        text: the rendered conversation.
        cut: returns the part of a content that gets marks around it; the rest is in the gaps.
    """
    contents = [message["content"] for message in messages]
    thoughts = [message.get("thinking", "") for message in messages]
    begin, close, think, end = unused(text, *contents, *thoughts, count=4)
    marked = []
    for i, message in enumerate(messages):
        copy = {
            **message,
            "content": _enclose(message["content"], f"{begin}{i}{begin}", close, cut),
        }
        if "thinking" in message:
            copy["thinking"] = _enclose(message["thinking"], think, end, cut)
        marked.append(copy)
    rendered = template.render(marked)
    pieces = re.split(f"{begin}(\\d+){begin}([^{close}]*){close}", rendered)
    plain = [re.sub(f"[{think}{end}]", "", gap) for gap in pieces[::3]]
    given = "".join(a + b for a, b in zip(plain, [*pieces[2::3], ""], strict=True))
    if given != text or pieces[1::3] != [str(i) for i in range(len(messages))]:
        return None
    gaps, place = [], 0
    for gap, bare, content in zip(pieces[::3], plain, [*pieces[2::3], ""], strict=True):
        kind = re.sub(f"{think}[^{end}]*{end}", think + end, gap)
        fixed = gap.index(think) if think in gap else len(bare)
        gaps.append(_Gap(kind, fixed, place, place + len(bare)))
        place += len(bare) + len(content)
    return gaps


def _enclose(text: str, before: str, after: str, cut: Callable[[str], str]) -> str:
    """Return text with marks around the part that `cut` returns."""
    core = cut(text)
    start = text.index(core)
    return f"{text[:start]}{before}{core}{after}{text[start + len(core) :]}"
