"""The text found on the machine, the demo's chat rows, and the multiple-choice items."""

import json
import re

import pytest

from sparselong.data import corpus, demo
from sparselong.errors import StageError


class WordPieces:
    """A stand-in tokenizer: three characters per token, never across a space."""

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return re.findall(r" ?[^ ]{1,3}", text)


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    path = tmp_path_factory.mktemp("items") / "hellaswag.jsonl"
    demo.write_hellaswag(path, WordPieces(), seed=3, items=300)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    demo.write_demo_data(folder, seed=3)
    return {
        name: [
            json.loads(line)["messages"]
            for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        for name in ("train", "validation")
    }


def test_splits_are_disjoint_and_sized():
    paths = {
        split: {document.path for document in corpus.documents() if document.split == split}
        for split in ("train", "held_out")
    }
    assert not paths["train"] & paths["held_out"]
    sizes = {split: sum(map(len, corpus.texts(split))) for split in paths}
    assert sizes["train"] > 1_000_000
    assert 0.05 < sizes["held_out"] / (sizes["train"] + sizes["held_out"]) < 0.25
    assert not set(corpus.texts("train")) & set(corpus.texts("held_out"))


def test_split_depends_only_on_the_path():
    # Must never change: moving these would leak held-out text into models trained earlier.
    assert corpus.split_of("shutil.py") == "train"
    letters = [letter for letter in "abcdefgh" if corpus.split_of(f"{letter}.py") == "held_out"]
    assert letters == ["e"]
    assert all(document.split == corpus.split_of(document.path) for document in corpus.documents())


def test_wrapped_prose_is_joined_and_layout_is_preserved():
    text = "Copy a file\nto another place.\n\n   indented = 1\n   code = 2\n\n- one\n- two\n"
    assert corpus._paragraphs(text) == (
        "Copy a file to another place.",
        "   indented = 1\n   code = 2",
        "- one\n- two",
    )


def test_tests_and_foreign_packages_are_excluded():
    paths = [document.path for document in corpus.documents()]
    assert not [path for path in paths if "site-packages" in path or path.startswith("test/")]
    assert "shutil.py" in paths


def test_a_python_without_sources_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "_library_root", lambda: tmp_path)
    monkeypatch.setattr(corpus, "_read_topics", lambda: iter(()))
    with pytest.raises(StageError, match="standard library"):
        corpus.documents.__wrapped__()


def test_rows_have_the_expected_kinds(rows):
    assert len(rows["train"]) == 1200
    assert len(rows["validation"]) == 130
    for conversations in rows.values():
        for messages in conversations:
            roles = [message["role"] for message in messages if message["role"] != "system"]
            assert roles == ["user", "assistant"] * (len(roles) // 2)
            assert all(message["content"].strip() for message in messages)
            assert sum(len(message["content"]) for message in messages) < 2500
        assert any(len(messages) == 4 for messages in conversations)
        assert any(messages[0]["role"] == "system" for messages in conversations)
        assert any("thinking" in messages[-1] for messages in conversations)


def test_validation_questions_come_from_held_out_documents(rows):
    held_out = {
        entry.name
        for document in corpus.documents()
        if document.split == "held_out"
        for entry in document.entries
    }
    for messages in rows["validation"]:
        question = next(message["content"] for message in messages if message["role"] == "user")
        assert re.search(r"`(.+)`", question)[1] in held_out
    questions = {
        name: {messages[0]["content"] for messages in conversations if len(messages) == 2}
        for name, conversations in rows.items()
    }
    assert not questions["train"] & questions["validation"]


def test_the_same_seed_gives_the_same_files(rows, tmp_path):
    for seed in (3, 4):
        demo.write_demo_data(tmp_path / str(seed), seed)
    again, other = (
        [json.loads(line)["messages"] for line in (tmp_path / s / "train.jsonl").open()]
        for s in "34"
    )
    assert again == rows["train"]
    assert other != rows["train"]


def test_items_are_well_formed(items):
    assert len(items) == 300
    assert [item["ind"] for item in items] == list(range(300))
    fields = {"ind", "activity_label", "ctx_a", "ctx_b", "ctx", "endings", "label"}
    for item in items:
        assert set(item) == fields | {"source_id", "split", "split_type"}
        assert len(set(item["endings"])) == 4
        assert item["label"] in range(4)
    by_label = [sum(item["label"] == label for item in items) for label in range(4)]
    assert min(by_label) > 45


def test_endings_have_equal_lengths(items):
    for item in items:
        lengths = {
            len(WordPieces().encode(f" {ending}", add_special_tokens=False))
            for ending in item["endings"]
        }
        assert len(lengths) == 1
        assert len({len(ending) for ending in item["endings"]}) == 1


def test_the_true_ending_follows_the_context_in_held_out_text(items):
    prose = [" ".join(words) for _, words in demo._held_out_prose()]
    for item in items:
        texts = [f"{item['ctx']} {ending}" for ending in item["endings"]]
        found = [any(text in document for document in prose) for text in texts]
        assert found[item["label"]]
        assert sum(found) == 1


def test_hellaswags_preparation_leaves_items_unharmed(items):
    # lm-eval's hellaswag preprocessing: strip, drop bracketed parts, collapse double spaces.
    for item in items:
        for text in (item["activity_label"], item["ctx_a"], *item["endings"]):
            cleaned = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
            assert cleaned.replace("  ", " ") == text


def test_too_many_items_are_refused(tmp_path):
    with pytest.raises(StageError, match="fewer items"):
        demo.write_hellaswag(tmp_path / "x.jsonl", WordPieces(), seed=0, items=10**6)
    assert not (tmp_path / "x.jsonl").exists()
