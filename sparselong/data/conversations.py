"""Conversations: two checked files from the configured data source, and tokens from their rows.

Every stage that needs text calls `prepare` first. It turns the demo, a JSON-lines file or a hub
dataset into `runs/NAME/data/train.jsonl` and `validation.jsonl`, with one checked
`{"messages": [...]}` row per line. `source.json` is written last and records the sources. Later or
repeated stages find the same rows. If a config key changes, the files are rebuilt; finished stages
are stale then, because their hashes cover these keys. If the *content* of a source file changes,
`prepare` refuses, because no hash would show that earlier stages of the run used other rows.

`tokenize` renders a conversation with the model's own chat template and marks the assistant's
tokens. In harmony, a shortened conversation does not render as a prefix of the whole one (a final
`<|return|>` becomes `<|end|>`, earlier `thinking` is dropped). A turn is therefore located between
two renderings *with* a generation prompt, both of which must be prefixes of the whole. A template
that rewrites history in any other way is refused, because its mask would be wrong.

Left out: tool calls, images, other row layouts (convert them), and filtering by content.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from datetime import date
from pathlib import Path
from typing import Any, Literal, NamedTuple

from sparselong.config import Config
from sparselong.data.hub import explain_hub_failures
from sparselong.errors import StageError
from sparselong.files import write_atomically
from sparselong.provenance import hash_file

Message = dict[str, str]
ROLES = ("system", "developer", "user", "assistant")
_NAMES = ("train.jsonl", "validation.jsonl")
_SHAPE = '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}'


class DataFiles(NamedTuple):
    """Paths of the two prepared files."""

    train: Path
    validation: Path


def prepare(config: Config, run_dir: Path) -> DataFiles:
    """Return `run_dir/data/{train,validation}.jsonl`, written first unless up to date.

    Raises:
        StageError: a source is missing, unreachable, empty or has changed, or a row is malformed
            (the message names file and line).
    """
    folder = run_dir / "data"
    files = DataFiles(*(folder / name for name in _NAMES))
    record_path = folder / "source.json"
    wanted = {
        "seed": config.seed,
        **config.data.model_dump(mode="json", exclude={"train_on", "date"}),
    }
    if record_path.exists() and files.train.exists() and files.validation.exists():
        record = json.loads(record_path.read_text(encoding="utf-8"))
        if record["config"] == wanted:
            _refuse_changed(record, folder)
            return files
    record_path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    sources = [source for source in (config.data.train, config.data.validation) if source]
    described = [_describe(Path(source)) for source in sources if Path(source).is_file()]
    train, validation = _split(config, folder)
    for path, rows in zip(files, (train, validation), strict=True):
        write_atomically(path, "".join(_dump(row) + "\n" for row in rows))
    record = {
        "config": wanted,
        "sources": described,
        "files": [_describe(path) for path in files],
        "conversations": {"train": len(train), "validation": len(validation)},
    }
    write_atomically(record_path, json.dumps(record, indent=1) + "\n")
    return files


def read(path: Path) -> list[list[Message]]:
    """Return the conversations of a JSON-lines file after checking every row.

    Raises:
        StageError: the file cannot be read or is empty, or a row is malformed.
    """
    return list(_read_rows(path))


def read_line(path: Path, number: int) -> list[Message]:
    """Return the conversation on one line of a JSON-lines file, counted from 1.

    Raises:
        StageError: the file cannot be read or has fewer lines, or the row is malformed.
    """
    lines = 0
    try:
        with path.open(encoding="utf-8") as file:
            for lines, line in enumerate(file, 1):
                if lines == number:
                    return _check(_parse(line, path, number), f"{path}, line {number}")
    except (OSError, UnicodeDecodeError) as error:
        fix = "name a JSON-lines file, for example runs/NAME/data/train.jsonl:1"
        raise StageError(f"{path} cannot be read", "a UTF-8 text file", str(error), fix) from error
    raise StageError(
        f"{path} has no line {number:,}",
        f"a line from 1 to {lines:,}" if lines else "a file with lines",
        f"line {number:,}",
        "name another line",
    )


def tokenize(
    messages: list[Message],
    tokenizer: Any,
    train_on: Literal["assistant", "all"],
    today: date | None = None,
) -> tuple[list[int], list[bool]]:
    """Return the tokens of a conversation and which of them are supervised.

    An assistant turn is everything that the model must generate after the generation prompt: in
    harmony, the channel, the reasoning if it is rendered, the answer and the closing token.

    Args:
        messages: a row as returned by `read`.
        tokenizer: a fast transformers tokenizer with a chat template.
        train_on: `assistant` marks the assistant turns, `all` marks every token.
        today: the date that the template's `strftime_now` gives; None: the clock's.

    Returns:
        (input_ids, supervised), two lists of equal length.

    Raises:
        StageError: the template rejects the conversation, or a shortened conversation does not
            render as a prefix of the whole one.
    """
    messages = _without_dropped_thinking(messages, tokenizer, today)
    text = _render(messages, tokenizer, False, today)
    spans = (
        [(0, len(text))]
        if train_on == "all"
        else _assistant_spans(messages, tokenizer, text, today)
    )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    supervised, ahead = [], iter([*spans, (len(text), len(text))])
    start, end = next(ahead)
    for token_start, _ in encoded["offset_mapping"]:
        while token_start >= end and end < len(text):
            start, end = next(ahead)
        supervised.append(start <= token_start < end)
    return list(encoded["input_ids"]), supervised


def _render(
    messages: list[Message], tokenizer: Any, add_generation_prompt: bool, today: date | None
) -> str:
    from jinja2 import TemplateError  # imported here: only needed with transformers

    options = {"strftime_now": today.strftime} if today else {}

    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, **options
        )
    except (TemplateError, ValueError) as error:  # ValueError: the tokenizer has no template
        raise StageError(
            f"the chat template of {tokenizer.name_or_path or 'the tokenizer'} rejects a row",
            "a template for system, developer, user and assistant messages with text",
            str(error),
            "fix the row, or use a model directory with gpt-oss's chat_template.jinja",
        ) from error


def _without_dropped_thinking(
    messages: list[Message], tokenizer: Any, today: date | None
) -> list[Message]:
    """Return the messages without earlier turns' `thinking` if the template drops it anyway.

    A template that renders only the last assistant turn's reasoning would otherwise render it in a
    shortened conversation, where an earlier turn is the last one.
    """
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not any("thinking" in messages[i] for i in turns[:-1]):
        return messages
    stripped = [
        {key: value for key, value in message.items() if key != "thinking" or i == turns[-1]}
        for i, message in enumerate(messages)
    ]
    same = _render(stripped, tokenizer, False, today) == _render(messages, tokenizer, False, today)
    return stripped if same else messages


def _assistant_spans(
    messages: list[Message], tokenizer: Any, text: str, today: date | None
) -> list[tuple[int, int]]:
    """Return (start, end) in characters of each assistant turn in the rendered text."""
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _render(messages[:i], tokenizer, True, today)
        suffix_length = len(prompt) - len(_render(messages[:i], tokenizer, False, today))
        if i + 1 < len(messages):  # render as history: with a generation prompt, which is cut off
            prefix = _render(messages[: i + 1], tokenizer, True, today)
            prefix = prefix[: len(prefix) - suffix_length]
        else:
            prefix = text
        if suffix_length < 0 or not prefix.startswith(prompt) or not text.startswith(prefix):
            raise StageError(
                f"message {i + 1} of a conversation cannot be located in the rendered text",
                "every shortened conversation renders as a prefix of the whole one",
                f"the template rewrites earlier turns: {messages[i]['content'][:60]!r}",
                "use data.train_on=all, rows with one assistant turn, or gpt-oss's own template",
            )
        spans.append((len(prompt), len(prefix)))
    return spans


def _split(config: Config, folder: Path) -> tuple[list[list[Message]], list[list[Message]]]:
    """Return training and validation conversations from the configured sources."""
    if config.data.train == "demo":
        from sparselong.data.demo import write_demo_data

        write_demo_data(folder / "demo", config.seed)
        train, validation = (read(folder / "demo" / name) for name in _NAMES)
    else:
        train, validation = _read_source(config.data.train), []
    if config.data.validation:
        return train, _read_source(config.data.validation)
    if validation:
        return train, validation
    if len(train) < 2:
        raise StageError(
            f"{config.data.train} is too small to hold out a validation conversation",
            "at least 2 conversations, or data.validation",
            f"{len(train)}",
            "add rows, or name a validation file: data.validation=FILE.jsonl",
        )
    count = min(max(1, round(config.data.validation_fraction * len(train))), len(train) - 1)
    held_out = set(random.Random(config.seed).sample(range(len(train)), count))
    return (
        [row for i, row in enumerate(train) if i not in held_out],
        [row for i, row in enumerate(train) if i in held_out],
    )


def _read_source(source: str) -> list[list[Message]]:
    path = Path(source)
    if path.exists() or path.suffix in (".jsonl", ".json") or path.is_absolute():
        return list(_read_rows(path))
    return list(_read_hub(source))


def _read_rows(path: Path) -> Iterator[list[Message]]:
    fix = "data.train and data.validation take a JSON-lines file, a hub dataset, or demo"
    number = 0
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                yield _check(_parse(line, path, number), f"{path}, line {number}")
    except (OSError, UnicodeDecodeError) as error:
        where = f"{path}, after line {number}" if number else f"{path}"
        raise StageError(f"{where} cannot be read", "a UTF-8 text file", str(error), fix) from error
    if not number:
        raise StageError(f"{path} is empty", f"one row per line: {_SHAPE}", "no lines", fix)


def _parse(line: str, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise StageError(
            f"{path}, line {number} is not JSON",
            f"one row per line: {_SHAPE}",
            f"{error.msg} at column {error.colno}: {line.strip()[:60]!r}",
            "fix or remove the line; turn a JSON array into one object per line",
        ) from error


def _read_hub(name: str) -> Iterator[list[Message]]:
    import datasets

    with explain_hub_failures(
        f"dataset {name} cannot be opened",
        "a file of that name, or a hub dataset with a train split",
        "check the name and the network (HF_HUB_OFFLINE, HF_TOKEN), or name a local file: "
        "data.train=FILE.jsonl",
    ):
        rows: Iterable[Any] = datasets.load_dataset(name, split="train")
    number = 0
    for number, row in enumerate(rows, 1):
        yield _check(row, f"dataset {name}, row {number}")
    if not number:
        raise StageError(f"dataset {name} is empty", "rows", "none", "name another dataset")


def _check(row: Any, where: str) -> list[Message]:
    """Return the row's messages with only the known keys; raise if the row is malformed."""
    fault = _find_fault(row)
    if fault:
        raise StageError(f"{where} is not a conversation", _SHAPE, fault, "fix or remove the row")
    return [
        {key: message[key] for key in ("role", "thinking", "content") if message.get(key)}
        | {"content": message["content"]}
        for message in row["messages"]
    ]


def _find_fault(row: Any) -> str | None:
    """Return what is wrong with a row, or None."""
    if not isinstance(row, dict):
        return f"a JSON {type(row).__name__} instead of an object"
    if not isinstance(messages := row.get("messages"), list):
        return f"no list under `messages`; the row's keys are {sorted(row)}"
    for i, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            return f"message {i} is a {type(message).__name__} instead of an object"
        if (role := message.get("role")) not in ROLES:
            return f"message {i} has the role {role!r}; known roles are {', '.join(ROLES)}"
        if not isinstance(content := message.get("content"), str):
            return f"the content of message {i} is {type(content).__name__}, not text"
        if role in ("system", "developer") and i > 1:
            return f"message {i} is a {role} message; only the first message may be one"
        if role == "assistant" and not content.strip():
            return f"message {i} (assistant) is empty"
        thinking = message.get("thinking")
        if thinking and (role != "assistant" or not isinstance(thinking, str)):
            return f"the thinking of message {i} ({role}) is not text in an assistant message"
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        return "no assistant turn"
    return "it starts with an assistant message" if roles[0] == "assistant" else None


def _dump(messages: list[Message]) -> str:
    return json.dumps({"messages": messages}, ensure_ascii=False)


def _describe(path: Path) -> dict[str, Any]:
    return {"path": str(path), "bytes": path.stat().st_size, "sha256": hash_file(path)}


def _refuse_changed(record: dict[str, Any], folder: Path) -> None:
    """Raise if a prepared file or an existing source no longer matches its recorded hash."""
    prepared = [
        {**was, "path": folder / name} for was, name in zip(record["files"], _NAMES, strict=True)
    ]
    for was in [*record["sources"], *prepared]:
        path = Path(was["path"])
        if path.exists() and _describe(path)["sha256"] != was["sha256"]:
            raise StageError(
                f"{path} has changed since this run read it",
                f"sha256 {was['sha256'][:16]}… ({was['bytes']:,} bytes)",
                f"sha256 {hash_file(path)[:16]}… ({path.stat().st_size:,} bytes)",
                f"use another --run-dir for the new rows, or delete {folder} and rerun the stages",
            )
