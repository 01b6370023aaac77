"""Processes that share a model generate the tokens of one process."""

import os
import runpy
import subprocess
import sys
from contextlib import contextmanager
from typing import Any

import pytest

from sparselong.errors import StageError
from sparselong.generation import shared
from sparselong.generation.shared import SharedModel, share_model
from sparselong.processes import world
from tests.conftest import ROOT
from tests.distributed.generation import (
    COUNT,
    PIECES,
    PROMPT,
    fail_in_step,
    generate_until_one_is_killed,
    talk_alone,
    talk_together,
)
from tests.distributed.pool import Pool


@pytest.fixture(scope="module")
def wanted(untrained_base) -> dict:
    return talk_alone(untrained_base)


@pytest.mark.parametrize("size", [2, 4])
def test_tokens_are_one_process_s(pools, untrained_base, wanted, size):
    found, *others = pools[size].run(talk_together, untrained_base, size)
    assert others == [None] * (size - 1)
    assert "another one of the same shared model" in found.pop("abandoned")
    assert found == {name: tokens for name, tokens in wanted.items() if name != "abandoned"}
    assert len(found["greedy"]) == COUNT and len(found["stopped"]) == 5
    assert [turn[0] for turn in found["turns"][:4]] == [0, PROMPT, PROMPT + 8, PROMPT + 9]
    assert found["turns"][-1] == PROMPT + 4, "an answer that was broken off"
    assert len(set(found["greedy"] + found["sampled"])) > 6, "too few tokens for a comparison"


@pytest.mark.parametrize("piece", PIECES)
def test_every_piece_is_needed(pools, untrained_base, wanted, piece):
    found, _ = pools[2].run(talk_together, untrained_base, 2, piece)
    assert found["greedy"] != wanted["greedy"]


@pytest.mark.parametrize("which", [0, 1])
def test_a_process_killed_while_it_generates_is_named(untrained_base, tmp_path, which):
    pool = Pool(2)
    outcomes = pool.try_run(generate_until_one_is_killed, untrained_base, which, tmp_path)
    pool.close()
    assert outcomes[which] == ("died", -9)
    outcome, result = outcomes[1 - which]
    if outcome == "died":
        assert result == 1
        result = (tmp_path / f"{1 - which}.txt").read_text()
    assert result.count("error: ") == 1
    assert f"rank {1 - which} stops because rank {which} of 2 failed" in result


@pytest.fixture
def fail(untrained_base, tmp_path):
    """Run `fail_in_step` in two processes; return what each was told."""

    def run(moment: str) -> list[str]:
        pool = Pool(2, timeout_seconds=60)
        outcomes = pool.try_run(fail_in_step, untrained_base, moment, tmp_path)
        pool.close()
        texts = [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)]
        return [text if o[0] == "died" else o[1] for o, text in zip(outcomes, texts, strict=True)]

    return run


@pytest.mark.parametrize("moment", ["start", "advance"])
def test_a_failed_step_ends_all_even_if_the_first_process_catches_it(fail, moment):
    leader, follower = fail(moment)
    answered, caught, refused, ended = leader.split("\n", 3)[:3] + [leader.rsplit("error:", 1)[1]]
    assert answered.startswith("[") and caught == "RuntimeError: the first process alone"
    assert "cannot be used any more" in refused and "cannot be used any more" in ended
    assert leader.count("found:    RuntimeError: the first process alone") == 2
    assert "rank 1 stops because rank 0 of 2 failed" in follower
    assert "rank 0: RuntimeError: the first process alone" in follower


def test_a_refused_prompt_is_no_failure(fail):
    answered, *refused, again = fail("refused")[0].split("\n")
    assert answered == again and answered.startswith("[")
    assert [each.split(":")[1] for each in refused] == [" input_ids"] * 2


def test_the_first_process_killed_between_requests_is_named(fail):
    assert "rank 1 stops because rank 0 of 2 failed" in fail("killed")[1]


def test_a_closed_model_refuses_requests(monkeypatch):
    monkeypatch.setattr(shared, "_broadcast", lambda _: None)
    model: Any = None
    closed = SharedModel(model, {})
    closed.close()
    with pytest.raises(StageError, match="after the other processes had ended"):
        closed.open_decoder(9)


def test_a_rank_s_part_is_watched_while_it_is_shared(untrained_base, monkeypatch):
    """Without the watch, a killed process would leave the others waiting."""
    monkeypatch.setattr(shared, "joined_rank", lambda: 0)
    monkeypatch.setattr(shared, "is_one_machine", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    seen = []

    @contextmanager
    def watched(tell: Any) -> Any:
        seen.append("watched")
        yield
        seen.append("unwatched")

    for name in ("connect", "join", "leave"):
        monkeypatch.setattr(shared.ranks, name, lambda *_, name=name: seen.append(name))
    monkeypatch.setattr(shared.ranks, "watched", watched)
    monkeypatch.setattr(shared.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(shared, "replicate_rows", lambda _: {})
    monkeypatch.setattr(shared, "load_model", lambda *_, **__: seen.append("loaded"))
    monkeypatch.setattr(shared, "lead_or_follow", lambda *_: seen.append("answered"))
    share_model(untrained_base, print)
    order = ["connect", "join", "loaded", "watched", "answered", "leave", "unwatched"]
    assert seen == order


def test_what_cannot_be_shared_is_refused_before_anything_is_opened(untrained_base, monkeypatch):
    with pytest.raises(StageError, match=r"(?s)openai/gpt-oss-120b.*no such directory"):
        share_model("openai/gpt-oss-120b", print)
    values = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2}
    for name, value in {**values, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(StageError, match="several machines"):
        share_model(untrained_base, print)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(StageError, match=r"(?s)8 experts.*3 processes\n.*--nproc_per_node=2 "):
        share_model(untrained_base, print)
    monkeypatch.setattr(world, "_was_joined", True)
    with pytest.raises(StageError, match="a second model cannot be shared"):
        share_model(untrained_base, print)


SCRIPT = """
import sys
import torch
import sparselong.errors

def answer(model):
    ids = torch.arange(1, 12)[None]
    return list(sparselong.generate(model, ids, 6))

tokens = sparselong.share_model(sys.argv[1], answer)
if tokens is not None:
    print("tokens", *tokens)
if len(sys.argv) > 2:
    try:
        sparselong.share_model(sys.argv[1], answer)
    except sparselong.errors.StageError as error:
        print(error.what, file=sys.stderr)
"""


@pytest.mark.timeout(180)
def test_a_script_runs_alone_and_under_torchrun(
    untrained_base, tmp_path, monkeypatch, capsys, forked_python
):
    script = tmp_path / "answer.py"
    script.write_text(SCRIPT)
    monkeypatch.setattr(sys, "argv", [str(script), str(untrained_base)])
    runpy.run_path(str(script), run_name="__main__")
    alone = capsys.readouterr().out
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    ended = subprocess.run(
        [sys.executable, *torchrun, str(script), str(untrained_base), "twice"],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTHON_EXEC": forked_python,
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == alone and alone.startswith("tokens ")
    assert ended.stderr.count("a second model cannot be shared") == 2
