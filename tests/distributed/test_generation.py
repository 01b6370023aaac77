"""Processes that share a model generate the tokens of one process."""

import os
import runpy
import subprocess
import sys

import pytest

from sparselong.errors import StageError
from sparselong.generation.shared import share_model
from tests.conftest import ROOT
from tests.distributed.generation import (
    COUNT,
    PIECES,
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


def test_what_cannot_be_shared_is_refused_before_anything_is_opened(untrained_base, monkeypatch):
    with pytest.raises(StageError, match=r"(?s)openai/gpt-oss-120b.*no such directory"):
        share_model("openai/gpt-oss-120b", print)
    values = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2}
    for name, value in {**values, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(StageError, match="several machines"):
        share_model(untrained_base, print)


SCRIPT = """
import sys
import torch
import sparselong

def answer(model):
    ids = torch.arange(1, 12)[None]
    return list(sparselong.generate(model, ids, 6))

tokens = sparselong.share_model(sys.argv[1], answer)
if tokens is not None:
    print("tokens", *tokens)
"""


@pytest.mark.timeout(180)
def test_a_script_runs_alone_and_under_torchrun(untrained_base, tmp_path, monkeypatch, capsys):
    script = tmp_path / "answer.py"
    script.write_text(SCRIPT)
    monkeypatch.setattr(sys, "argv", [str(script), str(untrained_base)])
    runpy.run_path(str(script), run_name="__main__")
    alone = capsys.readouterr().out
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    ended = subprocess.run(
        [sys.executable, *torchrun, str(script), str(untrained_base)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == alone and alone.startswith("tokens ")
