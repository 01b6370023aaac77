"""The proxy's text, tokens and items, and its training in miniature."""

from __future__ import annotations

import argparse
import gzip
import json
import random

import numpy as np
import pytest
import torch

from benchmarks.proxy import corpus_file, items, prepare, text, train
from benchmarks.proxy.batches import ANSWER_WEIGHT, Batches, pack_tasks
from benchmarks.proxy.conversations import make_examples
from benchmarks.proxy.export import write_checkpoint
from benchmarks.proxy.network import Batch, Network, initialise
from benchmarks.proxy.readers import read_manual
from benchmarks.proxy.shape import describe
from benchmarks.proxy.text import Document, Source
from benchmarks.proxy.training import Training
from sparselong.data import corpus
from sparselong.model import load_model
from sparselong.tiny.tokenizer import train_tokenizer

SMALL = {
    **{"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 32, "sliding_window": 8},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 8},
    **{"vocab_size": 512, "max_position_embeddings": 512},
}
LENGTH, ROWS = 256, (2, 1, 1)


def paragraphs(source, count):
    words = ["copy", "the", "file", "of", "a", "path", "into", "which", "directory", "opens"]
    return [" ".join(source.choices(words, k=70)).capitalize() + "." for _ in range(count)]


@pytest.fixture(scope="module")
def documents():
    source = random.Random(0)
    found = []
    for number in range(80):
        body = "\n\n".join(paragraphs(source, 5))
        found.append(Document("manual", "en", number % 4 == 0, body))
    return found


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(corpus.texts("train")[:40], SMALL["vocab_size"], 512)


@pytest.fixture(scope="module")
def prepared(documents, tokenizer):
    def encode(texts):
        ids = tokenizer([f"{each}<|endoftext|>" for each in texts])["input_ids"]
        return np.concatenate([np.array(each, dtype=np.uint16) for each in ids])

    examples = [
        example
        for seed in range(4)
        for example in [
            next(make_examples(tokenizer, {"niah_multikey_2": {1024: 1}}, 2000, str(seed)))
        ]
    ]
    cut = [np.array(example.tokens[-100:], dtype=np.uint16) for example in examples]
    answered = [example.answered[-100:] for example in examples]
    marks = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    return corpus_file.Prepared(
        train=encode([each.text for each in documents if not each.held_out]),
        conversations=encode([each.text[:300] for each in documents]),
        tasks=np.concatenate(cut),
        answered=np.packbits(np.concatenate(answered)),
        held_out=encode([each.text for each in documents if each.held_out]),
        marks=np.array(marks, dtype=np.uint16),
    )


def new_training(prepared, steps: int | None = 6, seed=0):
    network = Network(describe(prepared.marks.tolist(), **SMALL))
    initialise(network, seed)
    return Training(network, Batches(prepared, ROWS, LENGTH, seed, torch.device("cpu")), steps)


def corpus_of(folder, texts):
    folder.mkdir()
    for number, each in enumerate(texts):
        (folder / f"{number}.md").write_text(each, encoding="utf-8")
    return Source("docs", (folder,), (".md",), 10**9)


def test_held_out_text_shares_no_paragraph_with_training_text(tmp_path):
    source = random.Random(1)
    shared = paragraphs(source, 3)
    texts = ["\n\n".join([*paragraphs(source, 4), *shared, "Returns"]) for _ in range(150)]
    found = [
        each
        for each in text.read_documents([corpus_of(tmp_path / "docs", [*texts, texts[0]])])
        if each.kind == "docs"
    ]
    sides = {
        held_out: [
            paragraph
            for each in found
            if each.held_out == held_out
            for paragraph in text.list_paragraphs(each.text)
        ]
        for held_out in (True, False)
    }
    assert len(found) == 150
    assert len(sides[True]) > 8
    assert not set(sides[True]) & set(sides[False])
    assert len(set(sides[False])) == len(sides[False])
    assert all(paragraph in sides[True] for paragraph in shared)  # held-out text keeps the first


def test_copied_code_with_another_name_is_removed():
    lines = [f"    value_{number} = compute(argument, number={number})" for number in range(30)]
    copied = "\n".join(["class First:", *lines])
    renamed = "\n".join(["class Second:", *lines])
    own = paragraphs(random.Random(2), 4)
    first, second = (
        Document("python", "py", False, "\n\n".join([*own[:2], copied])),
        Document("python", "py", False, "\n\n".join([*paragraphs(random.Random(3), 4), renamed])),
    )
    kept = list(text.remove_repetitions([first, second]))
    assert kept[0] == first
    assert "Second" not in kept[1].text
    assert kept[1].text.startswith(paragraphs(random.Random(3), 1)[0])


def test_special_tokens_in_sources_are_not_special(tmp_path, tokenizer):
    body = "\n\n".join([*paragraphs(random.Random(4), 5), 'END = "<|endoftext|>", the last token.'])
    found = text.read_documents([corpus_of(tmp_path / "docs", [body])])
    (document,) = (each for each in found if each.kind == "docs")
    assert "the last token" in document.text
    assert not set(tokenizer.all_special_ids) & {*tokenizer(document.text)["input_ids"]}


def test_a_manual_page_is_rendered(tmp_path):
    page = tmp_path / "cp.1.gz"
    page.write_bytes(
        gzip.compress(
            b".TH CP 1\n.SH NAME\ncp \\- copy \\fIfiles\\fR\n.PP\nWith\n.B \\-r\nfolders\ntoo.\n"
        )
    )
    assert read_manual(page) == "NAME\n\ncp - copy files\n\nWith -r folders too."


def test_tokens_survive_a_round_trip(tmp_path, tokenizer, prepared):
    for sample in ("Grüße, 東京 \u0431\u0430\u0439\u0442\n\tif x:\r\n", "\x00\x7f é"):
        assert tokenizer.decode(tokenizer(sample)["input_ids"]) == sample
    path = tmp_path / corpus_file.NAME
    corpus_file.save(prepared, path)
    for name, array in corpus_file.load(path)._asdict().items():
        np.testing.assert_array_equal(array, getattr(prepared, name))
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match="copy it again"):
        corpus_file.load(path)


def test_items_are_true_continuations_of_held_out_text(documents):
    made = items.make_items(documents, 40, seed=0)
    assert made == items.make_items(documents, 40, seed=0)
    held_out = [" ".join(each.text.split()) for each in documents if each.held_out]
    for item in made:
        right = f"{item['ctx']} {item['endings'][item['label']]}"
        assert any(right in whole for whole in held_out)
        assert len(set(item["endings"])) == items.ENDINGS
        for place, ending in enumerate(item["endings"]):
            assert any(ending in whole for whole in held_out)
            if place != item["label"]:
                assert not any(f"{item['ctx']} {ending}" in whole for whole in held_out)
    assert len({item["label"] for item in made}) == items.ENDINGS
    with pytest.raises(ValueError, match="0 items"):
        items.make_items(documents[1:4], 40, seed=0)


def test_a_batch_predicts_nothing_across_documents(prepared):
    batches = Batches(prepared, ROWS, LENGTH, 0, torch.device("cpu"))
    batch, targets = batches.make(5)
    again = Batches(prepared, ROWS, LENGTH, 0, torch.device("cpu")).make(5)
    assert torch.equal(batch.ids, again[0].ids)
    assert not torch.equal(batch.ids, batches.make(6)[0].ids)
    end = int(prepared.marks[2])
    for row in range(sum(ROWS)):
        position = 0
        for column in range(LENGTH):
            assert batch.positions[row, column] == position
            ends = int(batch.ids[row, column]) == end
            if ends or column == LENGTH - 1:
                assert targets.weights[row, column] == 0
            else:
                assert targets.ids[row, column] == batch.ids[row, column + 1]
            position = 0 if ends else position + 1
    starts = (batch.positions.flatten() == 0).nonzero().flatten().tolist()
    assert batch.boundaries.tolist() == [*starts, batch.ids.numel()]


def test_answers_weigh_most(prepared, tokenizer):
    tokens, codes = pack_tasks(prepared, LENGTH)
    assert len(tokens) % LENGTH == 0
    answered = np.unpackbits(prepared.answered)[: len(prepared.tasks)]
    assert (codes == 2).sum() == answered.sum() > 0
    _, targets = Batches(prepared, ROWS, LENGTH, 0, torch.device("cpu")).make(0)
    heavy = targets.ids[targets.weights == ANSWER_WEIGHT].tolist()
    assert "<|endoftext|>" in tokenizer.decode(heavy)
    assert any(character.isdigit() for character in tokenizer.decode(heavy))


@pytest.fixture(scope="module")
def trained(prepared):
    training = new_training(prepared)
    losses = []
    while not training.is_done:
        losses.append(torch.stack(training.run_step()).tolist())
    return training, losses


def test_training_learns(trained):
    _, losses = trained
    assert losses[-1][0] < losses[0][0] - 0.1
    assert all(np.isfinite(step).all() for step in losses)


def test_a_resumed_training_equals_one_that_was_not_interrupted(trained, prepared, tmp_path):
    whole, losses = trained
    first = new_training(prepared)
    begun = [torch.stack(first.run_step()).tolist() for _ in range(3)]
    first.save(tmp_path / "state")
    second = new_training(prepared, seed=1)
    second.batches.seed = 0
    second.load(tmp_path / "state")
    continued = [torch.stack(second.run_step()).tolist() for _ in range(3)]
    assert [*begun, *continued] == losses
    for one, other in zip(whole.network.parameters(), second.network.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_checkpoint_is_the_network_with_rounding(trained, prepared, tokenizer, tmp_path):
    network = trained[0].network
    with torch.no_grad():  # six steps leave biases and sinks near zero, where errors do not show
        for name, value in network.named_parameters():
            if name.endswith(("bias", "sinks")):
                value.normal_(0, 0.5, generator=torch.Generator().manual_seed(len(name)))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    write_checkpoint(network, tmp_path / "checkpoint", tmp_path / "tokenizer")
    model = load_model(tmp_path / "checkpoint", attn_implementation="sparselong")
    ids = torch.from_numpy(prepared.train[:100].astype(np.int64))[None]
    batch = Batch(ids, torch.arange(100)[None], torch.tensor([0, 100], dtype=torch.int32))
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        found = {}
        for rounds in (True, False):
            states, _ = network(batch, rounds)
            weight = network.lm_head.weight.bfloat16().float()
            found[rounds] = states @ weight.T
    torch.testing.assert_close(found[True], expected, rtol=1e-4, atol=1e-4)
    assert (found[False] - expected).abs().max() > 1e-2


def test_the_command_trains_within_its_files(prepared, tmp_path, monkeypatch, capsys):
    path = tmp_path / corpus_file.NAME
    corpus_file.save(prepared, path)
    monkeypatch.setattr(train, "MINIATURE", SMALL)
    monkeypatch.setattr(train, "_MINIATURE_LENGTH", LENGTH)
    out = tmp_path / "out"
    arguments = ["--corpus", path, "--folder", out, "--steps", 4, "--miniature"]
    monkeypatch.setattr("sys.argv", ["train.py", *map(str, arguments)])
    train.main()
    assert "done after 4 steps, complete: True" in capsys.readouterr().out
    record = json.loads((out / "training.json").read_text())
    assert record["steps"] == 4
    assert record["history"][-1]["of"] == 4
    assert len(list(out.iterdir())) <= 8


def test_a_run_without_time_still_leaves_a_checkpoint(prepared, tmp_path):
    args = argparse.Namespace(minutes=0.0, runs=1, folder=tmp_path)
    training = new_training(prepared, steps=None)
    run = train.Run(training, args, deadline=0.0)
    assert run.train() == []
    write_checkpoint(training.network, tmp_path)
    assert load_model(tmp_path).config.num_hidden_layers == SMALL["num_hidden_layers"]


def test_the_manifest_counts_what_is_written(documents, prepared, tmp_path):
    path = tmp_path / corpus_file.NAME
    corpus_file.save(prepared, path)
    manifest = prepare.describe(documents, prepared, path)
    counts = manifest["text"]["manual"]["en"]
    assert counts["documents"] == len(documents)
    assert counts["held_out_bytes"] == sum(
        len(each.text.encode()) for each in documents if each.held_out
    )
    assert manifest["tokens"]["train"] == len(prepared.train)
    assert manifest["file_bytes"] == path.stat().st_size
