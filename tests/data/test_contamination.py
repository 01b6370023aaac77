"""Items of evaluation tasks in the training rows, found before training and by stage 04."""

import json

import pytest
from datasets import Dataset

from sparselong.config import load
from sparselong.data.overlap import sequences, warn_before_training, warn_of_items
from sparselong.data.overlap.contamination import find_contaminated
from tests.conftest import ROOT

WORDS = [f"word{i}" for i in range(30)]


def test_thirteen_consecutive_words_are_contamination_twelve_are_not():
    items = [" ".join(WORDS[:20]), "nothing of it " * 10]
    shared = "Before, " + ", ".join(WORDS[3:16]).upper() + "; after."
    assert find_contaminated(items, [shared]) == [0]
    assert find_contaminated(items, [" ".join(WORDS[3:15])]) == []
    assert find_contaminated(items, [" ".join(WORDS[0:10] + WORDS[11:20])]) == []


def test_short_items_count_if_they_occur_in_full():
    assert find_contaminated(["a b c", "a d", ""], ["x a b c y"]) == [0]


def test_warning_counts_the_items_in_the_training_file(tmp_path):
    row = [{"role": "user", "content": "?"}, {"role": "assistant", "content": " ".join(WORDS)}]
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"messages": row}) + "\n")
    items = {"seen": [" ".join(WORDS[:15]), "other"], "unseen": ["other"]}
    (warning,) = warn_of_items(items, path)
    assert "1 of the 2 items of seen" in warning


def test_every_text_of_a_row_is_searched_and_token_rows_are_named(tmp_path):
    words = " ".join(WORDS)
    call = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": words}}]}
    ask, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": "x"}
    rows = (
        {"text": words},
        {"messages": [ask, call]},
        {"messages": [ask, {**answer, "thinking": words}]},
        {"input_ids": [1, 2]},
    )
    found = []
    for row in rows:
        path = tmp_path / "train.jsonl"
        path.write_text(json.dumps(row) + "\n")
        (warning,) = warn_of_items({"seen": [words]}, path)
        found.append(warning)
    assert all("1 of the 1 items of seen" in warning for warning in found[:3])
    assert "1 of 1 training rows are token ids" in found[3]


def test_characters_of_languages_without_spaces_are_words():
    text = "東京の天気は晴れで、気温は二十五度まで上がる見込みです。"
    assert find_contaminated([text], [f"前置き。{text[3:18]}後書き。"]) == [0]
    assert find_contaminated([text], [f"前置き。{text[3:14]}後書き。"]) == []


def test_a_sample_of_many_sequences_still_finds_what_is_shared(monkeypatch):
    items = [" ".join(f"{name}{i}" for i in range(200)) for name in ("one", "two", "three")]
    monkeypatch.setattr(sequences, "MOST_HASHES", 100)
    assert find_contaminated(items, [f"And {items[1]} too."]) == [1]


class Words:
    """A tokenizer with a token for each three letters, as far as the demo's items need one."""

    def encode(self, text, add_special_tokens):
        return [*range(0, len(text), 3)]


def configured(*overrides):
    return load(ROOT / "configs/tiny.yaml", overrides)


def written(path, *texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_items_of_the_demo_and_of_a_task_on_this_machine_are_found_before_training(
    tmp_path, monkeypatch
):
    """One task of lm-eval's is in the cache of data sets, another would need the network."""
    question = "Which of the seven rivers of the old kingdom runs north past the mill and the ford"
    _cache(tmp_path / "cache" / "openai___gsm8k", question)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    tasks = "evaluation.tasks=[demo_hellaswag,gsm8k,hellaswag,ruler_vt]"
    config = configured(tasks, "evaluation.limit=50")
    path = written(tmp_path / "train.jsonl", f"As is known: {question}?", "Something else.")
    found, missing = warn_before_training(config, path, Words())
    assert found.startswith("1 of the 1 items of gsm8k share 13 consecutive words")
    assert "not compared yet with the items of hellaswag; 04" in missing and "Rowan" in missing


def _cache(folder, question):
    """Leave a data set as `datasets` does that has loaded it once."""
    place = folder / "main" / "0.0.0" / "0123456789abcdef"
    place.mkdir(parents=True)
    rows = Dataset.from_list([{"question": question, "answer": "The Wye. #### 1"}])
    splits = {}
    for split in ("train", "test"):
        rows.save_to_disk(folder / split)
        (arrow,) = (folder / split).glob("*.arrow")
        arrow.rename(place / f"gsm8k-{split}.arrow")
        splits[split] = {"name": split, "num_bytes": 1, "num_examples": 1, "dataset_name": "gsm8k"}
    info = json.loads((folder / "test" / "dataset_info.json").read_text())
    names = {"builder_name": "parquet", "dataset_name": "gsm8k", "config_name": "main"}
    info |= {**names, "version": {"version_str": "0.0.0"}, "splits": splits}
    (place / "dataset_info.json").write_text(json.dumps(info))


def test_the_demo_s_own_items_are_compared(tmp_path):
    from sparselong.data import write_hellaswag

    config = configured()
    write_hellaswag(tmp_path / "items.jsonl", Words(), config.seed)
    items = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    row = items[0]
    whole = f"{row['ctx']} {row['endings'][row['label']]}"
    path = written(tmp_path / "train.jsonl", whole)
    (warning,) = warn_before_training(config, path, Words())
    assert warning.startswith("1 of the 400 items of demo_hellaswag share 13")
    path = written(path, "Nothing of it.")
    assert warn_before_training(config, path, Words()) == []


@pytest.mark.parametrize("fault", ["time", "crash"])
def test_items_that_cannot_be_read_are_said_to_be_left_out(tmp_path, monkeypatch, fault):
    from sparselong.data.overlap import training

    if fault == "time":
        monkeypatch.setattr(training, "_SECONDS", 0.01)
    else:
        monkeypatch.setattr(training, "_PROGRAM", "sparselong.data.overlap.nothing")
    path = written(tmp_path / "train.jsonl", "x")
    (warning,) = warn_before_training(configured("evaluation.tasks=[gsm8k]"), path, Words())
    assert "not compared yet with the items of gsm8k" in warning
    assert ("not read in" if fault == "time" else "No module named") in warning
