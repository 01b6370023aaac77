"""examples/accelerate/fsdp2.yaml on the small model: two processes train and save as one."""

import subprocess

import pytest

from tests.conftest import ROOT, write_rows
from tests.examples.forms import FORMS
from tests.examples.separate import MESSAGES
from tests.examples.sharded import check_case, run

PATH = ROOT / "examples/accelerate/fsdp2.yaml"
KINDS = [
    ("transformers", "full", 5),
    ("transformers", "dense", 2),
    ("transformers", "lora", 2),
    ("TRL", "lora", 1),
    ("TRL", "full", 1),
]
CASES = [
    (front, trained, form, steps if form == "padding-free" else 1)
    for front, trained, steps in KINDS
    for form in FORMS
]
SAVE = """
import sys
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from sparselong.errors import StageError
from tests.examples.forms import EXAMPLE

base, out, kind = sys.argv[1:]
model = EXAMPLE["open_model"](base, "dense")
gathered = model.state_dict()
if kind == "FSDP":
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    fully_shard(model, mesh=dist.init_device_mesh("cpu", (1,)))
else:
    model.model.norm.weight.ds_id = 0  # DeepSpeed's mark, on empty parameters
try:
    model.save_pretrained(out, state_dict=gathered)
except StageError as error:
    print("refused:", error)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp2")
    write_rows(folder / "data.jsonl", MESSAGES)
    return folder


@pytest.fixture(scope="module")
def sharded(small_base, folder, forked_python):
    paths = (small_base, folder / "data.jsonl", folder / "sharded")
    return run(forked_python, PATH, CASES, *paths, fused=True)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case[:3]))
def test_two_processes_train_as_one(case, small_base, folder, sharded):
    check_case(case, small_base, folder, sharded)


@pytest.mark.parametrize("kind", ["FSDP", "ZeRO"])
def test_a_quantizer_does_not_save_shards(kind, untrained_base, tmp_path, forked_python):
    """In a process of its own: torch keeps the group until the process ends."""
    given = [str(untrained_base), str(tmp_path / "out"), kind]
    done = subprocess.run(
        [forked_python, "-c", SAVE, *given], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "refused: " in done.stdout and "model.hf_quantizer = None before saving" in done.stdout
    assert not list(tmp_path.rglob("*.safetensors"))
