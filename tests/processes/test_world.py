"""Several trainers: which ranks start where, failure reports, and exchanges over gloo."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from torch.distributed import HashStore, TCPStore

from sparselong.config.schema import Config, load
from sparselong.errors import ConfigError, StageError
from sparselong.processes import follow, watch
from sparselong.processes.failure import failure_path
from sparselong.processes.launch import (
    World,
    check_launcher,
    evaluation_world,
    find_world,
    joined_rank,
    rank_environments,
)
from sparselong.processes.process import run_trainer
from sparselong.run import Stage
from tests.conftest import ROOT

THREE = {rank: {"RANK": str(rank)} for rank in range(3)}
LOST = "rank {rank} waited in vain"


@pytest.fixture
def stage(tmp_path) -> Stage:
    made = Stage("03_finetune", load(ROOT / "configs/tiny.yaml"), tmp_path)
    made.dir.mkdir()
    return made


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


def config(*overrides: str) -> Config:
    return load(ROOT / "configs/tiny.yaml", list(overrides))


def join_torchrun(monkeypatch, rank: int, size: int, local: int, here: int) -> None:
    values = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": here}
    values |= {"MASTER_ADDR": os.environ.get("MASTER_ADDR", "127.0.0.1")}
    values |= {"MASTER_PORT": os.environ.get("MASTER_PORT", "29500")}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))


def test_plain_python_starts_one_process_per_sequence_shard(monkeypatch):
    assert find_world(config()) == World(1, {0: 0}, 1, joined=False)
    assert rank_environments(find_world(config()), gpus=0) == {0: {}}
    # Also on a machine with two GPUs: a single process's model is not spread over both.
    assert rank_environments(find_world(config()), gpus=2) == {0: {"CUDA_VISIBLE_DEVICES": "0"}}
    world = find_world(config("sequence_parallel_degree=4"))
    assert (world.size, list(world.local), joined_rank()) == (4, [0, 1, 2, 3], None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    made = rank_environments(world, gpus=4)
    assert [made[rank]["CUDA_VISIBLE_DEVICES"] for rank in range(4)] == ["4", "5", "6", "7"]
    assert [made[rank]["RANK"] for rank in range(4)] == ["0", "1", "2", "3"]
    assert len({made[rank]["MASTER_PORT"] for rank in range(4)}) == 1


def test_under_torchrun_a_process_starts_its_own_rank(monkeypatch):
    join_torchrun(monkeypatch, rank=6, size=8, local=2, here=4)
    world = find_world(config("sequence_parallel_degree=4"))
    assert world == World(8, {6: 2}, 4, joined=True)
    assert rank_environments(world, gpus=4) == {6: {"CUDA_VISIBLE_DEVICES": "2"}}


@pytest.mark.parametrize(("size", "here"), [(6, 6), (4, 2), (12, 6)])
def test_a_sequence_must_stay_on_one_machine(monkeypatch, size, here):
    join_torchrun(monkeypatch, rank=1, size=size, local=1, here=here)
    with pytest.raises(ConfigError) as refused:
        find_world(config("sequence_parallel_degree=4"))
    assert f"{here} processes of one machine cannot form groups of 4" in refused.value.what
    assert "rank 1" in refused.value.what and f"WORLD_SIZE={size}" in refused.value.found


@pytest.mark.parametrize("degree", ["auto", "1", "2", "4"])
def test_processes_of_one_machine_form_groups_that_share_experts(monkeypatch, degree):
    keys = ("sequence_parallel_degree=4", f"expert_parallel_degree={degree}")
    assert find_world(config(*keys)).size == 4
    join_torchrun(monkeypatch, rank=6, size=8, local=2, here=4)
    keys = ("sequence_parallel_degree=1", f"expert_parallel_degree={degree}")
    assert find_world(config(*keys)).here == 4


@pytest.mark.parametrize(("size", "here", "degree"), [(8, 4, 8), (6, 6, 4), (4, 4, 3)])
def test_an_expert_group_must_divide_the_processes_of_a_machine(monkeypatch, size, here, degree):
    join_torchrun(monkeypatch, rank=1, size=size, local=1, here=here)
    with pytest.raises(ConfigError) as refused:
        find_world(config(f"expert_parallel_degree={degree}"))
    assert f"{here} processes of one machine cannot form groups of {degree}" in refused.value.what
    assert "rank 1" in refused.value.what and "auto" in refused.value.fix


def test_an_expert_group_must_divide_the_processes_that_the_script_starts():
    with pytest.raises(ConfigError) as refused:
        find_world(config("sequence_parallel_degree=2", "expert_parallel_degree=4"))
    assert "2 processes" in refused.value.what and "torchrun" in refused.value.fix
    with pytest.raises(ConfigError, match="1 process of one machine"):
        find_world(config("expert_parallel_degree=2"))


@pytest.mark.parametrize(
    ("gpus", "keys", "size"),
    [
        (0, (), 1),
        (0, ("sequence_parallel_degree=4",), 1),
        (0, ("expert_parallel_degree=2",), 2),
        (8, (), 1),
        (8, ("sequence_parallel_degree=4",), 4),
        (2, ("sequence_parallel_degree=4",), 2),
        (4, ("sequence_parallel_degree=4", "expert_parallel_degree=2"), 4),
        (4, ("expert_parallel_degree=2",), 2),
    ],
)
def test_evaluation_uses_the_gpus_of_training_that_are_there(gpus, keys, size):
    world = evaluation_world(config(*keys), gpus)
    assert world == World(size, {rank: rank for rank in range(size)}, size, joined=False)


def test_evaluation_takes_any_number_of_processes_from_torchrun(monkeypatch):
    join_torchrun(monkeypatch, rank=5, size=6, local=2, here=3)
    world = evaluation_world(config("sequence_parallel_degree=4"), gpus=3)
    assert world == World(6, {5: 2}, 3, joined=True)
    with pytest.raises(ConfigError, match="3 processes of one machine cannot form groups of 2"):
        check_launcher(config("expert_parallel_degree=2"))


def test_evaluation_refuses_fewer_gpus_than_share_experts():
    with pytest.raises(ConfigError, match="1 process of one machine cannot form groups of 2"):
        evaluation_world(config("expert_parallel_degree=2"), gpus=1)


def run_ranks(stage: Stage, code: str, ranks=THREE) -> StageError:
    """Run this code on all ranks and return the reported error."""
    started = time.monotonic()
    with pytest.raises(StageError) as failure:
        run_trainer(stage, [sys.executable, "-c", "import os, time\n" + code], ranks)
    assert time.monotonic() - started < 60
    left = subprocess.run(["pgrep", "-f", str(stage.dir)], capture_output=True, text=True)
    assert not left.stdout, "a rank outlived the others"
    return failure.value


def failure_code(stage: Stage, what: str, consequence: bool = False) -> str:
    """Code that writes a failure like the trainer's excepthook does, and exits."""
    return (
        f"import json; path = {str(stage.dir)!r} + '/failure' + ('.rank' + rank) * (rank != '0')\n"
        f"what = {what!r}.format(rank=rank)\n"
        "document = dict(what=what, expected='e', found='f', fix='x')\n"
        f"document['consequence'] = {consequence}\n"
        "open(path + '.json', 'w').write(json.dumps(document)); os._exit(1)\n"
    )


def test_a_killed_rank_is_named_and_the_others_are_stopped(stage):
    code = f"# {stage.dir}\nif os.environ['RANK'] == '1': os.kill(os.getpid(), 9)\ntime.sleep(120)"
    failure = run_ranks(stage, code)
    assert failure.what == "rank 1 of 03_finetune ended with signal SIGKILL"
    assert "log.rank1.txt" in failure.fix


def test_orphaned_workers_of_a_rank_do_not_block(stage):
    worker = f"sleep 120 # {stage.dir}"
    code = f"import subprocess; subprocess.Popen([{worker!r}], shell=True); os.kill(os.getpid(), 9)"
    assert "SIGKILL" in run_ranks(stage, code).what


def test_the_cause_is_reported_and_not_its_consequences(stage):
    # The consequences are written first; the flag distinguishes them, not their text.
    lost = "\n ".join(failure_code(stage, LOST, consequence=True).splitlines())
    broken = "could not finish the exchange of its own accord"
    broke = "\n ".join(("time.sleep(0.3)", *failure_code(stage, broken).splitlines()))
    code = f"rank = os.environ['RANK']\nif rank == '2':\n {broke}\nelse:\n {lost}\n"
    assert run_ranks(stage, code).what == f"rank 2: {broken}"
    same = f"rank = os.environ['RANK']\n{failure_code(stage, 'a loss of NaN')}"
    assert run_ranks(stage, same).what == "a loss of NaN"  # every rank has seen it


def test_an_unresponsive_rank_is_named_by_the_ranks_that_waited(stage):
    lost = "\n ".join(failure_code(stage, LOST, consequence=True).splitlines())
    code = f"rank = os.environ['RANK']\nif rank != '1':\n {lost}\ntime.sleep(120) # {stage.dir}"
    failure = run_ranks(stage, code)
    assert "waited in vain" in failure.what
    assert "rank 1 was still running" in failure.found


def test_failures_of_an_earlier_run_are_ignored(stage):
    failure_path(stage.dir, 1).write_text('{"what": "old", "expected": "", "found": "", "fix": ""}')
    assert "SIGKILL" in run_ranks(stage, "os.kill(os.getpid(), 9)").what


PROLOGUE = """
import sys, torch
from pathlib import Path
from functools import partial
from sparselong.processes import world as ranks
from sparselong.processes.failure import tell_failures, write_failure
rank = int(os.environ["RANK"])
WORK = Path({work!r})
tell_failures(WORK, rank)
mesh = ranks.join(2, exchange_seconds=4)
assert "RANK" not in os.environ and ranks.count() == 2 and ranks.is_first() == (rank == 0)
"""


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("code", "what", "found"),
    [
        (
            "same = {'a': torch.ones(3), 'b': torch.arange(5.0), 'c': None}\n"
            "same['c'] = torch.tensor([1, 2, 3], dtype=torch.bfloat16)\n"
            "ranks.check_replicas(same, step=1)\n"
            "assert [*ranks.merge_peaks({'host': 5 + rank})] == ['host']\n"
            "same['b'][4] += 1e-6 * rank\n"
            "ranks.check_replicas(same, step=7)\n",
            "the ranks' adapters or masks differ at step 7",
            "different values on rank 1, first in b",
        ),
        (
            "if rank == 1: time.sleep(60)\nranks.check_replicas({'a': torch.ones(3)}, step=1)\n",
            "rank {rank} stops because rank 1 of 2 failed",
            "rank 1: timeout: 4 s after exchange",
        ),
    ],
    ids=["apart", "timeout"],
)
def test_over_gloo(stage, code, what, found):
    world = World(2, {0: 0, 1: 1}, 2, joined=False)
    prologue = PROLOGUE.format(work=str(stage.dir))
    block = "\n ".join(
        ("with ranks.watched(partial(write_failure, WORK, rank), 4):", *code.split("\n"))
    )
    failure = run_ranks(stage, prologue + block, rank_environments(world, gpus=0))
    assert failure.what in (what.format(rank=0), what.format(rank=1)) and found in failure.found


def test_a_rank_stopped_by_torchrun_names_the_one_that_failed(stage, monkeypatch):
    port = rank_environments(World(2, {0: 0}, 2, joined=False), gpus=0)[0]["MASTER_PORT"]
    _meeting = TCPStore("127.0.0.1", int(port), is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", port)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")

    def train_as(rank: int, train) -> str:
        join_torchrun(monkeypatch, rank=rank, size=2, local=rank, here=2)
        monkeypatch.setattr(follow, "train_ranks", train)
        with pytest.raises((StageError, KeyboardInterrupt)) as ended:
            follow.train_together(stage, ["-c", "pass"])
        return str(ended.value)

    def be_ended(_: Stage, arguments: list[str], world: World) -> None:
        assert arguments == ["-c", "pass"] and world.size == 2
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    def fail(*_: object) -> None:
        raise StageError("rank 1: it broke", "e", "a loss of NaN", "x")

    assert train_as(0, be_ended) == "SIGTERM"  # the stage explains it
    assert "rank 1: it broke" in train_as(1, fail)
    told = train_as(0, be_ended)
    assert "rank 0 was stopped because another rank failed" in told
    assert "rank 1: it broke: a loss of NaN" in told


@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", ["03_finetune", "04_eval", "06_chat"])
def test_under_torchrun_every_process_ends_when_the_stage_refuses(tmp_path, name):
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"),
        *(str(ROOT / f"{name}.py"), "--config", str(ROOT / "configs/tiny.yaml")),
        *("--run-dir", str(tmp_path / "run"), "sequence_parallel_degree=2"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=170)
    assert ended.returncode == 1
    assert ended.stderr.count(f"{name} needs 02_compress") == 1
    assert ended.stderr.count("error:    ") == 1  # torchrun may stop rank 1 before it says more
    assert not Path(tmp_path / f"run/{name}").exists()


def test_another_process_s_failure_reaches_rank_0_s_exchanges(monkeypatch):
    """Rank 0, which has the terminal, would else wait for its heartbeat to be missing."""
    store, told, ended = HashStore(), [], threading.Event()
    monkeypatch.setattr(follow, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(watch, "report_end", told.append)
    with pytest.raises(StageError), follow._failing_together(2, store, "key"):
        raise StageError("what", "e", "found", "fix")
    follow._report_failure(store, "key", ended)
    assert told == [2]
    ended.set()
    follow._report_failure(HashStore(), "key", ended)
    assert told == [2]
