"""Several machines: they are refused together or work together, and end together.

A machine is here a torchrun of its own, or a process with its variables; all are this computer.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from sparselong.errors import ConfigError
from sparselong.processes import machines
from sparselong.processes.machines import MachinesError, Place, check_places
from tests.conftest import ROOT, load_script
from tests.distributed.pool import free_port

PATIENCE_SECONDS = 0.3


def places(*counts: int) -> list[Place]:
    """Return the places of machines with these numbers of processes."""
    return [
        Place(local, here, f"node{number}")
        for number, here in enumerate(counts)
        for local in range(here)
    ]


@pytest.fixture
def store() -> TCPStore:
    return TCPStore("127.0.0.1", free_port(), is_master=True, wait_for_workers=False)


@pytest.fixture
def be(monkeypatch) -> Callable[[int, int], None]:
    """Return a function that sets torchrun's variables of a rank of four."""

    def set_variables(rank: int, here: int = 2) -> None:
        values = {"RANK": rank, "WORLD_SIZE": 4, "LOCAL_RANK": rank % here}
        for name, value in {**values, "LOCAL_WORLD_SIZE": here}.items():
            monkeypatch.setenv(name, str(value))

    return set_variables


@pytest.mark.parametrize("counts", [(4,), (2, 2), (4, 4), (1, 1, 1)])
def test_as_many_processes_on_each_machine_fit_together(counts):
    check_places(places(*counts))


INTERLEAVED = [Place(rank // 2, 2, f"node{rank % 2}") for rank in range(4)]
ONE_BLOCK = [Place(rank % 2, 2, f"node{rank}") for rank in range(4)]


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (places(4, 2), "rank 0: 1 of 4 on node0; rank 4: 1 of 2 on node1"),
        (places(2, 4), "rank 0: 1 of 2 on node0; rank 2: 1 of 4 on node1"),
        (places(4, 2, 2), "rank 6: 1 of 2 on node2"),
        (INTERLEAVED, "rank 1: 1 of 2 on node1"),
        (ONE_BLOCK, "rank 0: 1 of 2 on node0"),
    ],
)
def test_machines_that_differ_are_refused(found, told):
    with pytest.raises(MachinesError, match="same number of processes") as refused:
        check_places(found)
    assert told in refused.value.found and "--nproc_per_node" in refused.value.fix


@pytest.mark.parametrize("gpus", [0, 1])
def test_a_machine_with_too_few_gpus_is_refused(gpus):
    found = [replace(place, gpus=2) for place in places(2, 2)]
    check_places(found)
    with pytest.raises(MachinesError, match="2 processes on each machine need") as refused:
        check_places([*found[:2], *(replace(place, gpus=gpus) for place in found[2:])])
    assert refused.value.found == f"{gpus} on node1"


def test_what_one_machine_refuses_ends_all_with_its_exit_code(be, store):
    be(2)
    error = ConfigError("no such file", "a config", "none", "copy it")
    store.set("key/place/0", json.dumps(places(2)[0].__dict__))
    store.set("key/place/1", json.dumps(places(2)[1].__dict__))
    store.set("key/place/3", json.dumps(places(2)[1].__dict__))
    with pytest.raises(MachinesError, match=r"no such file \(rank 2, on ") as refused:
        machines.meet(store, "key", Place.of_process(error))
    assert refused.value.exit_code == 2 and str(refused.value) == refused.value.show()
    be(3)
    assert refused.value.show() == "rank 3: see the message of rank 2"


def test_a_machine_that_does_not_begin_is_named(be, store):
    be(0)
    store.set("key/place/1", "{}")
    with pytest.raises(MachinesError, match="rank 2, 3 did not begin"):
        machines.meet(store, "key", Place.of_process(), PATIENCE_SECONDS)


def test_a_run_directory_that_is_not_shared_is_refused(be, store, tmp_path):
    for rank in range(4):
        store.set(f"key/place/{rank}", json.dumps(places(2, 2)[rank].__dict__))
    shared, own = tmp_path / "shared", tmp_path / "own"
    shared.mkdir()
    be(0)
    machines.mark_directory(shared, store, "key")
    be(2)
    machines.find_directory(shared, store, "key")
    with pytest.raises(MachinesError, match="rank 2 on .* does not see the files of rank 0 on no"):
        machines.find_directory(own, store, "key", PATIENCE_SECONDS)
    own.mkdir()
    (own / machines.FILE).write_text('{"token": "an earlier attempt here"}')
    with pytest.raises(MachinesError) as refused:
        machines.find_directory(own, store, "key", PATIENCE_SECONDS)
    assert "another run" in refused.value.found and "--run-dir" in refused.value.fix


def test_a_failure_on_another_machine_interrupts(store, monkeypatch):
    signals = []
    monkeypatch.setattr(machines.os, "kill", lambda *given: signals.append(given))
    with machines.stopped_with_others(store, "failure", grace_seconds=0.0):
        time.sleep(0.5)
        assert signals == []
        store.set("failure", "it broke")
        time.sleep(0.5)
    assert [pid for pid, _ in signals] == [os.getpid()]
    with machines.stopped_with_others(store, "failure"):  # ends by itself within the grace
        time.sleep(0.5)
    assert len(signals) == 1


@pytest.mark.parametrize(("rank", "shown"), [(0, 1), (2, 1), (3, 0)])
def test_a_degree_that_no_machine_can_hold_is_refused_on_each(
    be, store, monkeypatch, capsys, tmp_path, rank, shown
):
    """The script ends before it makes the run directory."""
    be(rank)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    what = "2 processes of one machine cannot form groups of 4 that share a sequence"
    refused = Place(0, 2, "node1", 0, (what, "e", "f", "x", 2))
    for other, place in enumerate(places(2, 2)):
        known = refused if rank == 3 and other == 2 else place
        if other != rank:
            store.set(f"sparselong/03_finetune/0/place/{other}", json.dumps(known.__dict__))
    arguments = ["--config", str(ROOT / "configs/tiny.yaml"), "--run-dir", str(tmp_path / "run")]
    assert load_script("03_finetune").main([*arguments, "sequence_parallel_degree=4"]) == 2
    text = capsys.readouterr().err
    assert text.count(f"error:    {what}") == shown and text.count("fix:") == shown
    assert ("rank 3: see the message of rank 2" in text) == (rank == 3)
    assert not (tmp_path / "run").exists()


def test_a_failure_of_rank_0_ends_the_others(be, store, monkeypatch, capsys, tmp_path):
    be(1, here=4)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    store.set("sparselong/03_finetune/0", "ended 1")
    arguments = ["--config", str(ROOT / "configs/tiny.yaml"), "--run-dir", str(tmp_path / "run")]
    assert load_script("03_finetune").main(arguments) == 1
    assert capsys.readouterr().err == "rank 1: rank 0 failed, see its message\n"
    assert not (tmp_path / "run").exists()


SCRIPT = """
import os, sys, time
from sparselong.config import load
from sparselong.processes import find_world, follow_or_lead, train_together
from sparselong.run import Stage, parse_arguments

NAME = "03_finetune"
WORK = '''
import os, sys, torch
from sparselong.processes import world as ranks
from sparselong.processes.sharing import decide_sharing
from sparselong.config import load
rank = int(os.environ["RANK"])
if sys.argv[2] == "lost":
    if rank == 1:
        sys.exit("a broken disk")
    ranks.connect()
    sys.exit("not reached")
ranks.connect()
config = load(sys.argv[1], ["sequence_parallel_degree=2", "expert_parallel_degree=2"])
mesh = ranks.join(2, decide_sharing(config).chosen)
with ranks.watched(print):
    ranks.check_replicas({"a": torch.ones(3)}, step=1)
    total = torch.tensor([float(10 ** rank)])
    torch.distributed.all_reduce(total, group=mesh.data_group)
    seen = ranks.collect(int(total))
    if rank == 0:
        print("[sparselong] sums", seen, flush=True)
    ranks.leave()
'''

def arguments(stage):
    return ["-c", WORK, sys.argv[2], os.environ["HOW"]]

def run(argv):
    given = parse_arguments(NAME, "", argv)
    stage = Stage(NAME, load(given.config, given.overrides), given.run_dir)
    find_world(stage.config)
    stage.dir.mkdir(parents=True, exist_ok=True)
    train_together(stage, arguments(stage))
    time.sleep(1)  # publishing
    (stage.dir / "done").touch()
    return 0

sys.exit(follow_or_lead(NAME, None, run, arguments, find_world))
"""


def run_machines(folder: Path, each: int, how: str = "") -> list[tuple[int, str]]:
    """Run the script under one torchrun a machine, each with this many processes; return their exit
    codes and output."""
    script, port = folder / "stage.py", free_port()
    script.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HOW": how}
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--rdzv_backend=c10d"),
        *(f"--rdzv_endpoint=127.0.0.1:{port}", f"--nproc_per_node={each}", str(script)),
        *("--config", str(ROOT / "configs/tiny.yaml"), "--run-dir", str(folder / "run")),
        f"sequence_parallel_degree={each}",
    ]

    def run(_: int) -> tuple[int, str]:
        ended = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=170
        )
        return ended.returncode, ended.stderr

    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(run, range(2)))


@pytest.mark.timeout(180)
def test_two_torchruns_work_together(tmp_path):
    outcomes = run_machines(tmp_path, 2)
    assert [code for code, _ in outcomes] == [0, 0], outcomes
    assert "sums [101, 1010, 101, 1010]" in outcomes[0][1] + outcomes[1][1]
    assert (tmp_path / "run/03_finetune/done").exists()
    made = json.loads((tmp_path / "run/03_finetune" / machines.FILE).read_text())
    assert len(made["machines"]) == 4


@pytest.mark.timeout(180)
def test_a_rank_lost_on_one_machine_ends_both(tmp_path):
    """Before the ranks have met, so that only the stage's processes can tell."""
    outcomes = run_machines(tmp_path, 1, how="lost")
    for code, text in outcomes:
        assert code == 1 and "a broken disk" in text
