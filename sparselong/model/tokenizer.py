"""Open a checkpoint's tokenizer and check that it can be trusted and that it fits the model.

A tokenizer may load and still be wrong: one whose merges were lost splits text into bytes, one with
more tokens than the embeddings have rows makes Axolotl grow them by random rows, and one that does
not return the text that it encoded trains on something else. All of this is found here, before any
work. transformers is imported only after the files have been checked.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparselong.checkpoint import TOKENIZER
from sparselong.errors import StageError
from sparselong.files import LFS_POINTER, read_json, write_atomically
from sparselong.memory import check_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FIX = "download the checkpoint's tokenizer files again"
_REQUIRED = (TOKENIZER, "tokenizer_config.json")
_OPTIONAL = ("special_tokens_map.json", "added_tokens.json")
_TEMPLATE = "chat_template.jinja"
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_CONTROL = re.compile(r"<\|[^|<>\s]+\|>")
_PROBE = "Sparse 2:4,  naïve 日本語 🙂\n\tx = 'Y'\n"


def _unusable(directory: Path, expected: str, found: str, fix: str = _FIX) -> StageError:
    what = f"the tokenizer of {directory} cannot be used"
    return StageError(what, expected, " ".join(found.split()), fix)


def check_tokenizer_files(directory: Path) -> None:
    """Raise if a tokenizer file of a checkpoint is missing, cut or incomplete. Needs no torch.

    Raises:
        StageError: a file is missing, is not JSON or is a Git LFS pointer, the vocabulary lacks its
            merges or gives an id twice, or generation_config.json names unknown tokens.
    """
    documents = {name: read_json(directory / name, _FIX) for name in _REQUIRED}
    for name in _OPTIONAL:
        if (directory / name).exists():
            read_json(directory / name, _FIX)
    if (directory / _TEMPLATE).exists():
        _read_template(directory / _TEMPLATE)
    generation = directory / "generation_config.json"
    if generation.exists():
        check_token_ids(generation, read_json(generation), _embedding_rows(directory))
    _check_vocabulary(directory, documents[TOKENIZER])


def _read_template(path: Path) -> None:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise _unusable(path.parent, f"{_TEMPLATE}: a UTF-8 text file", str(error)) from error
    if not text.strip() or text.startswith(LFS_POINTER):
        found = f"{_TEMPLATE} is {'a Git LFS pointer' if text.strip() else 'empty'}"
        raise _unusable(path.parent, f"{_TEMPLATE}: a chat template", found)


def _embedding_rows(directory: Path) -> int:
    """Return the number of rows of the embeddings, according to the directory's config.json."""
    path = directory / "config.json"
    rows = read_json(path).get("vocab_size")
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
        raise StageError(
            f"{path} does not say how many rows the embeddings have",
            "vocab_size: a positive integer",
            f"{rows!r}",
            "restore config.json from the published checkpoint",
        )
    return rows


def _check_vocabulary(directory: Path, document: dict[str, Any]) -> None:
    """Raise unless tokenizer.json has a vocabulary with its merges and one id for each token."""
    model, added = document.get("model"), document.get("added_tokens", [])
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    listed = isinstance(added, list) and all(
        isinstance(token, dict) and "id" in token and isinstance(token.get("content"), str)
        for token in added
    )
    if not isinstance(model, dict) or not vocabulary or not listed:
        expected = "tokenizer.json with model.vocab, and added_tokens with id and content"
        raise _unusable(directory, expected, "a tokenizer.json without them")
    if not isinstance(vocabulary, dict):
        return  # a Unigram model, which has no merges
    names = vocabulary | {token["content"]: token["id"] for token in added}
    by_id: dict[Any, str] = {}
    for name, token in names.items():
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise _unusable(directory, "a number as the id of each token", f"{name!r}: {token!r}")
        if by_id.setdefault(token, name) != name:
            found = f"{by_id[token]!r} and {name!r} both have the id {token}"
            raise _unusable(directory, "one token for each id", found)
    if model.get("type", "BPE") == "BPE":
        _check_merges(directory, model, {token["content"] for token in added})


def _check_merges(directory: Path, model: dict[str, Any], added: set[str]) -> None:
    """Raise if there are fewer merges than entries that only a merge can make."""
    merges = model.get("merges")
    made = [n for n in model["vocab"] if len(n) > 1 and n not in added and not _BYTE.fullmatch(n)]
    found = len(merges) if isinstance(merges, list) else 0
    if found < len(made):
        expected = f"at least {len(made)} merges, one for each longer entry of the vocabulary"
        raise _unusable(directory, expected, f"{found} merges in tokenizer.json")
    if model.get("dropout"):
        found = f"model.dropout {model['dropout']} in tokenizer.json"
        raise _unusable(directory, "the same tokens for the same text", found, "set it to null")


def load_tokenizer(directory: Path | str) -> PreTrainedTokenizerBase:
    """Return the checkpoint's tokenizer, with one chat template, after checking it.

    Of several named templates, the one named `default` is used.

    Raises:
        StageError: files are missing or damaged, the tokenizer does not return the text that it
            encoded, has more tokens than the model, or has no usable chat template.
    """
    directory = Path(directory)
    check_tokenizer_files(directory)
    from transformers import AutoTokenizer

    try:
        # Otherwise code in the directory is offered to be run, and the answer waited for.
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        fault = _find_fault(tokenizer)
    except Exception as error:  # the tokenizers library raises bare `Exception`s
        found = f"{type(error).__name__}: {error}"
        raise _unusable(directory, "files that transformers can open", found) from error
    if fault:
        raise _unusable(directory, *fault)
    tokenizer.chat_template = _default_template(tokenizer.chat_template, directory)
    _check_template(tokenizer, directory)
    _check_added_tokens(tokenizer, directory)
    _check_fit(tokenizer, directory)
    return tokenizer


def _find_fault(tokenizer: Any) -> tuple[str, str] | None:
    """Return what was expected and found unless text survives encoding and decoding."""
    expected = "a fast tokenizer that decodes to the text that it encoded, with offsets"
    if not tokenizer.is_fast:
        return expected, f"{type(tokenizer).__name__}, which has no offsets"
    encoded = tokenizer(_PROBE, add_special_tokens=False, return_offsets_mapping=True)
    decoded = tokenizer.decode(encoded["input_ids"])
    if decoded != _PROBE:
        return expected, f"{_PROBE!r} becomes {decoded!r}"
    offsets = encoded["offset_mapping"]
    starts, ends = [start for start, _ in offsets], [end for _, end in offsets]
    if starts != sorted(starts) or (starts[0], ends[-1]) != (0, len(_PROBE)):
        return expected, f"offsets {offsets}"
    if tokenizer.eos_token_id is None:
        return "tokenizer_config.json with an eos_token", "none"
    return None


def _default_template(template: Any, directory: Path) -> str:
    if isinstance(template, dict):
        names, template = sorted(template), template.get("default")
        if template is None:
            found = f"templates named {', '.join(names)}"
            raise _unusable(directory, "a chat template named default", found)
    if not isinstance(template, str) or not template.strip():
        found = "no chat template" if template is None else f"the template {template!r}"
        raise _unusable(directory, f"a chat template ({_TEMPLATE})", found)
    return template


def _check_template(tokenizer: Any, directory: Path) -> None:
    """Raise unless the chat template renders what a conversation says, in tokens that exist.

    A template may reject the conversation, for example because it requires a system message;
    whether it accepts the configured rows is found when they are rendered.
    """
    from jinja2 import TemplateError, TemplateSyntaxError

    said = [{"role": role, "content": f"probe-{role}"} for role in ("user", "assistant")]
    expected = "a chat template that renders a user's and an assistant's message"
    malformed = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
    try:
        text = tokenizer.apply_chat_template(said, tokenize=False)
    except (TemplateSyntaxError, RecursionError, *malformed) as error:
        raise _unusable(directory, expected, f"{type(error).__name__}: {error}") from error
    except TemplateError:
        return
    lost = [message["role"] for message in said if message["content"] not in text]
    if lost:
        found = f"the message of the {' and the '.join(lost)} is left out"
        raise _unusable(directory, expected, found)
    written = dict.fromkeys(_CONTROL.findall(text))
    split = [name for name in written if len(tokenizer.encode(name, add_special_tokens=False)) != 1]
    if split:
        expected = "a control token for each one that the chat template writes"
        raise _unusable(directory, expected, f"{', '.join(split)} as several tokens")


def _check_added_tokens(tokenizer: Any, directory: Path) -> None:
    """Raise if a token has another id than its file says, as after a gap in the ids."""
    added = read_json(directory / TOKENIZER)["added_tokens"]
    wanted = {token["content"]: token["id"] for token in added}
    listed = read_json(directory / "tokenizer_config.json").get("added_tokens_decoder") or {}
    wanted |= {entry["content"]: int(token) for token, entry in listed.items()}
    names = tokenizer.get_vocab()
    for name, token in wanted.items():
        if names.get(name) != token:
            expected = f"{name!r} with the id {token}, as its file says"
            raise _unusable(directory, expected, f"the id {names.get(name)} once it is loaded")


def _check_fit(tokenizer: Any, directory: Path) -> None:
    """Raise if there are more tokens than rows in the embeddings; the reverse is usual."""
    rows, names = _embedding_rows(directory), tokenizer.get_vocab()
    needed = max(len(tokenizer), max(names.values()) + 1)
    if needed > rows:
        beyond = sorted((token, name) for name, token in names.items() if token >= rows)
        shown = ", ".join(f"{name!r} ({token})" for token, name in beyond[:4])
        raise StageError(
            f"the tokenizer and the model of {directory} do not fit together",
            f"at most {rows} tokens, since the embeddings have {rows} rows (vocab_size)",
            f"{needed} tokens; without a row: {shown}",
            "use the tokenizer files that belong to these weights",
        )


def check_rows_kept(rows: int, directory: Path) -> None:
    """Raise if an opened model has another number of embeddings than its directory's files.

    Axolotl appends random rows for tokens that its own opening of the tokenizer adds. They would be
    trained through and never be stored.

    Args:
        rows: rows of the opened model's embeddings.
        directory: the checkpoint from which it was opened.

    Raises:
        StageError: the embeddings were resized.
    """
    stored = _embedding_rows(directory)
    if rows != stored:
        raise StageError(
            f"Axolotl resized the embeddings of {directory} to fit its tokenizer",
            f"{stored} rows, as stored (vocab_size)",
            f"{rows} rows",
            "use tokenizer files that add no tokens when they are opened",
        )


def settle_template(tokenizer: Any, directory: Path) -> None:
    """Write the template in use as the only one of a directory whose tokenizer names several."""
    config = read_json(directory / "tokenizer_config.json")
    if isinstance(config.get("chat_template"), list) and not (directory / _TEMPLATE).exists():
        write_atomically(directory / _TEMPLATE, tokenizer.chat_template)
