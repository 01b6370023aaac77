"""A tokenizer that is opened is whole, returns the text that it encodes, and fits the model."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sparselong.errors import StageError
from sparselong.model import load_tokenizer
from sparselong.model.tokenizer import check_rows_kept


@pytest.fixture
def folder(untrained_base, tmp_path) -> Path:
    """The small base's files without its weights."""
    made = tmp_path / "tokenizer"
    made.mkdir()
    for path in untrained_base.iterdir():
        if path.suffix in (".json", ".jinja"):
            (made / path.name).write_bytes(path.read_bytes())
    return made


def edit(path: Path, **changes) -> dict[str, Any]:
    """Change keys of a JSON file; return the document."""
    document = (json.loads(path.read_text()) if path.exists() else {}) | changes
    path.write_text(json.dumps(document))
    return document


def edit_tokenizer(folder: Path, change) -> None:
    document = json.loads((folder / "tokenizer.json").read_text())
    change(document)
    (folder / "tokenizer.json").write_text(json.dumps(document))


def refusal(folder: Path) -> str:
    with pytest.raises(StageError) as caught:
        load_tokenizer(folder)
    assert "\n" not in caught.value.found
    return str(caught.value)


def add_token(folder: Path, content: str, token: int) -> None:
    def change(document):
        last = document["added_tokens"][-1]
        document["added_tokens"].append({**last, "content": content, "id": token})

    edit_tokenizer(folder, change)


# More tokens than rows


def test_one_token_too_many_is_refused_with_both_numbers(folder):
    add_token(folder, "<|extra|>", 2048)
    text = refusal(folder)
    assert "2049 tokens" in text and "2048 rows" in text and "'<|extra|>' (2048)" in text


def test_more_rows_than_tokens_are_fine(folder):
    edit(folder / "config.json", vocab_size=2304)
    assert len(load_tokenizer(folder)) == 2048
    add_token(folder, "<|extra|>", 2048)
    assert len(load_tokenizer(folder)) == 2049


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("tokenizer_config.json", {"eos_token": "<|new_end|>"}),
        ("tokenizer_config.json", {"pad_token": "[PAD]"}),
        ("tokenizer_config.json", {"additional_special_tokens": ["<|new_end|>", "<|more|>"]}),
        ("added_tokens.json", {"<|new_end|>": 2048}),
        ("special_tokens_map.json", {"eos_token": "<|new_end|>"}),
    ],
    ids=str,
)
def test_tokens_that_are_added_on_opening_count(folder, file, changes):
    edit(folder / file, **changes)
    text = refusal(folder)
    assert "do not fit together" in text and "2048 rows" in text


@pytest.mark.parametrize("key", ["eos_token_id", "pad_token_id", "bos_token_id"])
@pytest.mark.parametrize("value", [2048, -1, [2041, 2048], [], "2041", True], ids=str)
def test_ids_of_the_generation_config_are_tokens(folder, key, value):
    edit(folder / "generation_config.json", **{key: value})
    text = refusal(folder)
    assert "generation_config.json" in text and key in text and "2048 rows" in text


def test_an_id_after_a_gap_is_refused(folder):
    add_token(folder, "<|extra|>", 2050)
    edit(folder / "config.json", vocab_size=2304)
    assert "'<|extra|>' with the id 2050" in refusal(folder)


def test_two_tokens_do_not_share_an_id(folder):
    edit_tokenizer(folder, lambda d: d["model"]["vocab"].update({"Ġt": 5}))
    assert "both have the id 5" in refusal(folder)


def test_embeddings_that_axolotl_resized_are_refused(folder):
    check_rows_kept(2048, folder)
    with pytest.raises(StageError, match="resized") as caught:
        check_rows_kept(2049, folder)
    assert "2048 rows" in caught.value.expected and "2049 rows" in caught.value.found


# Whole files


def _set(key, value):
    return lambda document: document["model"].update({key: value})


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda d: d.update(added_tokens=[]), "as several tokens"),
        (lambda d: d["added_tokens"][0].update(content=[]), "added_tokens"),
        (lambda d: d["model"].pop("merges"), "0 merges"),
        (_set("merges", []), "0 merges"),
        (lambda d: d["model"]["merges"].pop(), "1782 merges"),
        (_set("vocab", {}), "model.vocab"),
        (_set("vocab", {"a": "0"}), "'a': '0'"),
        (_set("dropout", 0.1), "dropout 0.1"),
        (lambda d: d.pop("model"), "model.vocab"),
        (lambda d: d.update(model=[]), "model.vocab"),
        (lambda d: d["added_tokens"].append("<|x|>"), "added_tokens"),
        (lambda d: d.update(pre_tokenizer={"type": "Nonsense"}), "cannot be used"),
        (lambda d: d.update(decoder={"type": "Nonsense"}), "cannot be used"),
        (lambda d: d.update(decoder=None), "becomes"),
        (lambda d: d.update(normalizer={"type": "Lowercase"}), "becomes"),
    ],
)
def test_an_incomplete_tokenizer_is_refused(folder, change, word):
    edit_tokenizer(folder, change)
    assert word in refusal(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("size", [None, 0, 200])
def test_a_missing_or_cut_file_is_refused_by_name(folder, name, size):
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if size is not None:
        (folder / name).write_bytes(content[:size])
    assert name in refusal(folder)


@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"],
)
def test_an_lfs_pointer_is_recognized(folder, name):
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    text = refusal(folder)
    assert name in text and "Git LFS pointer" in text


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"eos_token": None}, "eos_token"),
        ({"model_input_names": None}, "TypeError"),
        ({"model_max_length": {}}, "TypeError"),
        ({"added_tokens_decoder": [1]}, "AttributeError"),
        ({"added_tokens_decoder": {"x": {"content": "<|end|>"}}}, "ValueError"),
        ({"chat_template": 5}, "template"),
        ({"chat_template": [5]}, "TypeError"),
    ],
    ids=str,
)
def test_settings_that_transformers_cannot_use_are_refused(folder, changes, word):
    if "chat_template" in changes:
        (folder / "chat_template.jinja").unlink()
    edit(folder / "tokenizer_config.json", **changes)
    assert word in refusal(folder)


def test_a_reason_is_never_cut(folder):
    edit(folder / "tokenizer_config.json", tokenizer_class=7)
    assert "Error" in refusal(folder)


def test_byte_fallback_that_returns_its_text_is_accepted(folder, untrained_base):
    edit_tokenizer(folder, _set("byte_fallback", True))
    text = "Grüße, 日本"
    wanted = load_tokenizer(untrained_base)(text)["input_ids"]
    assert load_tokenizer(folder)(text)["input_ids"] == wanted


def test_byte_fallback_without_the_bytes_is_refused(folder):
    """Its vocabulary lacks most characters, and spaces become another one."""

    def change(document):
        document["model"]["byte_fallback"] = True
        document["pre_tokenizer"] = None
        document["normalizer"] = {"type": "Prepend", "prepend": "▁"}

    edit_tokenizer(folder, change)
    assert "becomes" in refusal(folder)


def test_a_tokenizer_without_offsets_is_refused(folder, monkeypatch):
    from transformers import AutoTokenizer

    slow = SimpleNamespace(is_fast=False, chat_template="x")
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda directory, **_: slow)
    assert "no offsets" in refusal(folder)


# Chat templates


def name_templates(folder: Path, **templates: str) -> None:
    (folder / "chat_template.jinja").unlink()
    rows = [{"name": name, "template": text} for name, text in templates.items()]
    edit(folder / "tokenizer_config.json", chat_template=rows)


def test_the_default_of_named_templates_is_used(folder):
    template = (folder / "chat_template.jinja").read_text()
    name_templates(folder, tool_use="wrong", default=template)
    assert load_tokenizer(folder).chat_template == template


def test_the_default_beside_additional_templates_is_used(folder):
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/rag.jinja").write_text("wrong")
    template = (folder / "chat_template.jinja").read_text()
    assert load_tokenizer(folder).chat_template == template


def test_named_templates_without_a_default_are_refused(folder):
    name_templates(folder, tool_use="x", rag="y")
    text = refusal(folder)
    assert "named default" in text and "rag, tool_use" in text


@pytest.mark.parametrize(
    ("template", "word"),
    [
        ("", "empty"),
        ("{% if", "TemplateSyntaxError"),
        ("Hello", "user and the assistant is left out"),
        ("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
         "message of the assistant"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
    ],
)  # fmt: skip
def test_a_template_that_drops_messages_is_refused(folder, template, word):
    (folder / "chat_template.jinja").write_text(template)
    assert word in refusal(folder)


@pytest.mark.parametrize("gone", ["<|start|>", "<|message|>", "<|end|>"])
def test_a_control_token_of_the_template_is_one_token(folder, gone):
    def change(document):
        added = document["added_tokens"]
        document["added_tokens"] = [token for token in added if token["content"] != gone]

    edit_tokenizer(folder, change)
    edit(folder / "config.json", vocab_size=2304)
    assert gone in refusal(folder) or "as its file says" in refusal(folder)


def test_a_template_of_another_format_is_refused(folder):
    text = "{% for m in messages %}<|im_start|>{{ m.role }}{{ m.content }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(text)
    assert "<|im_start|> as several tokens" in refusal(folder)


def test_a_missing_template_is_refused(folder):
    (folder / "chat_template.jinja").unlink()
    assert "no chat template" in refusal(folder)


def test_a_tokenizer_with_code_of_its_own_is_refused_without_asking(folder, monkeypatch):
    asked = []
    monkeypatch.setattr("builtins.input", lambda *words: asked.append(words) or "n")
    (folder / "mine.py").write_text("raise SystemExit\n")
    code = {"AutoTokenizer": ["mine.Mine", None]}
    edit(folder / "tokenizer_config.json", auto_map=code, tokenizer_class="Mine")
    assert "cannot be used" in refusal(folder) and not asked
