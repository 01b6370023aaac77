"""Seeded mutations of a valid base folder and data file: read as what they mean, or explained.

`make test-mutations` (`--all-mutations`) takes all of them, and runs all four stages on twelve; a
plain run takes forty. Nothing of the user's may change.
"""

import json
import random
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.conftest import load_script
from tests.inputs.conftest import OUTCOMES
from tests.inputs.mutations import rows as row_mutations
from tests.inputs.mutations.checkpoints import Mutation, all_mutations
from tests.inputs.mutations.folder import hash_tree
from tests.inputs.mutations.rows import RowMutation, all_row_mutations
from tests.inputs.mutations.verdict import Verdict, assert_read_as_stored, configure, judge

SEED = 20261128
ROWS_PLAIN = 20


def pytest_generate_tests(metafunc):
    everything = metafunc.config.getoption("--all-mutations", False)
    for name, make in (("mutation", all_mutations), ("row_mutation", all_row_mutations)):
        if name in metafunc.fixturenames:
            drawn = make() if everything else random.Random(SEED).sample(make(), ROWS_PLAIN)
            metafunc.parametrize(name, drawn, ids=[each.name for each in drawn])
    if "whole" in metafunc.fixturenames:
        both = [*all_mutations(), *all_row_mutations()]
        drawn = random.Random(SEED).sample(both, 12) if everything else []
        metafunc.parametrize("whole", drawn, ids=[each.name for each in drawn])


@pytest.fixture(scope="module")
def sound(tmp_path_factory, untrained_base) -> tuple[Path, Path, Path]:
    """A valid base, training file and validation file."""
    folder = tmp_path_factory.mktemp("sound")
    train = folder / "train.jsonl"
    train.write_bytes(row_mutations.write(row_mutations.reference_rows()))
    validation = folder / "validation.jsonl"
    validation.write_bytes(row_mutations.write(row_mutations.reference_rows()[:3]))
    return untrained_base, train, validation


@pytest.fixture(scope="module")
def reference(sound, tmp_path_factory) -> Verdict:
    verdict = judge(configure(*sound), tmp_path_factory.mktemp("reference") / "run")
    assert verdict.refusal is None and len(verdict.ids) == 12
    assert_read_as_stored(verdict, sound[0])
    return verdict


def assert_explained(refusal: str | None) -> None:
    assert refusal is not None, "accepted"
    lines = [line.split(":")[0] for line in refusal.splitlines()]
    assert [key for key in lines if key in ("error", "expected", "found", "fix")] == [
        *("error", "expected", "found", "fix"),
    ], refusal
    assert "Traceback" not in refusal


def tokens_by_transformers(base: Path) -> tuple[tuple[int, ...], ...]:
    """The reference rows' ids from transformers alone, as the folder's template renders them."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    found = []
    for row in row_mutations.reference_rows():
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        found.append(tuple(tokenizer(text, add_special_tokens=False)["input_ids"]))
    return tuple(found)


def mutate_base(mutation: Mutation, sound, tmp_path: Path) -> Path:
    base = shutil.copytree(sound[0], tmp_path / "base")
    mutation.change(base, random.Random(f"{SEED} {mutation.name}"))
    return base


def mutate_rows(mutation: RowMutation, tmp_path: Path) -> tuple[Path, row_mutations.Expected]:
    path = tmp_path / "train.jsonl"
    rng = random.Random(f"{SEED} {mutation.name}")
    data, expected = mutation.change(row_mutations.reference_rows(), rng)
    path.write_bytes(data)
    return path, expected


def test_a_mutated_base_is_read_as_it_is_or_explained(mutation, sound, reference, tmp_path, record):
    base = mutate_base(mutation, sound, tmp_path)
    before = hash_tree(base)
    verdict = judge(configure(base, *sound[1:]), tmp_path / "run")
    assert hash_tree(base) == before
    record(mutation.expected, verdict.refusal)
    if verdict.refusal is not None:
        assert mutation.expected in ("refused", "either"), verdict.refusal
        assert_explained(verdict.refusal)
        return
    assert mutation.expected != "refused", "accepted"
    assert_read_as_stored(verdict, base)
    if mutation.expected == "either":
        assert verdict.ids == tokens_by_transformers(base)
    else:
        assert verdict.tokens == reference.tokens
    if mutation.expected == "same":
        assert verdict.tensors == reference.tensors
        assert verdict.architecture == reference.architecture
    elif mutation.expected == "means":
        same = verdict.tensors == reference.tensors
        assert not same or verdict.architecture != reference.architecture


def test_mutated_rows_are_read_as_they_are_or_explained(
    row_mutation, sound, reference, tmp_path, record
):
    path, expected = mutate_rows(row_mutation, tmp_path)
    before = path.read_bytes()
    verdict = judge(configure(sound[0], path, sound[2]), tmp_path / "run")
    assert path.read_bytes() == before
    record("means" if isinstance(expected, list) else expected, verdict.refusal)
    if verdict.refusal is not None:
        assert expected in ("refused", "either"), verdict.refusal
        assert_explained(verdict.refusal)
        assert str(path) in verdict.refusal
        return
    assert expected != "refused", "accepted"
    if expected == "same":
        assert verdict.tokens == reference.tokens
    elif expected == "spelled":
        assert verdict.spelled == reference.spelled and verdict.tokens != reference.tokens
    else:
        if expected == "either":
            lines = path.read_text(encoding="utf-8-sig").split("\n")
            expected = [_plain(json.loads(line)) for line in lines if line.strip()]
        again = tmp_path / "plain.jsonl"
        again.write_bytes(row_mutations.write(expected))
        plain = judge(configure(sound[0], again, sound[2]), tmp_path / "plain")
        assert verdict.tokens == plain.tokens


def _plain(row: dict) -> dict:
    """The known parts of a row; text parts joined."""
    messages = []
    for message in row["messages"]:
        content = message["content"]
        if isinstance(content, list):
            content = "".join(part["text"] for part in content)
        kept = {key: message[key] for key in ("role", "thinking") if message.get(key)}
        messages.append({**kept, "content": content})
    return {"messages": messages}


@pytest.fixture
def record(request):
    """Return a function that counts an outcome for the summary."""
    counts = request.config.stash[OUTCOMES]
    subject = "rows" if "row_mutation" in request.fixturenames else "base"

    def note(expected: str, refusal: str | None) -> None:
        counts[subject, expected, "accepted" if refusal is None else "explained"] += 1

    return note


STAGES = ("01_health", "02_compress", "03_finetune", "04_eval")


@pytest.fixture(scope="module")
def run_stages(small_arguments):
    """Return a function that runs all four stages and returns exit codes and 04's results."""

    def run(base: Path, train: Path, validation: Path, run_dir: Path) -> tuple[list[int], dict]:
        named = (f"model.base={base}", f"data.train={train}", f"data.validation={validation}")
        quick = ("sequence_len=256", "training.max_steps=2", "training.eval_steps=2")
        more = ("training.save_steps=2", "evaluation.limit=4", "data.date=2026-01-31")
        arguments = [*small_arguments, *named, *quick, *more, "micro_batch_size=2"]
        arguments += ["calibration.samples=2", "--run-dir", str(run_dir)]
        codes = [load_script(stage).main(arguments) for stage in STAGES]
        results = run_dir / "04_eval/results.json"
        return codes, json.loads(results.read_text()) if results.exists() else {}

    return run


@pytest.fixture(scope="module")
def reference_results(run_stages, sound, tmp_path_factory) -> dict:
    codes, results = run_stages(*sound, tmp_path_factory.mktemp("whole") / "run")
    assert codes == [0, 0, 0, 0]
    return results


@pytest.mark.timeout(900)
def test_all_four_stages(whole, run_stages, reference_results, sound, tmp_path, capfd):
    """Refused by every stage, or done with the reference's figures or those of what it means."""
    if isinstance(whole, Mutation):
        base, train, expected = mutate_base(whole, sound, tmp_path), sound[1], whole.expected
    else:
        base = shutil.copytree(sound[0], tmp_path / "base")
        train, expected = mutate_rows(whole, tmp_path)
    before = hash_tree(base), train.read_bytes()
    capfd.readouterr()
    codes, results = run_stages(base, train, sound[2], tmp_path / "run")
    assert "Traceback" not in capfd.readouterr().err
    assert (hash_tree(base), train.read_bytes()) == before
    assert codes in ([0, 0, 0, 0], [1, 1, 1, 1])
    if codes[0]:
        assert expected in ("refused", "either")
        return
    assert expected != "refused"
    if expected == "same":
        assert results["perplexity"] == reference_results["perplexity"]
    elif expected != "either":
        assert results["perplexity"] != reference_results["perplexity"]
