"""examples/accelerate/fsdp2.yaml on the small model: two processes train and save as one."""

import subprocess

import pytest

from tests.conftest import ROOT, write_rows
from tests.examples.separate import MESSAGES
from tests.examples.sharded import check_losses, check_saved, run, train_alone

PATH = ROOT / "examples/accelerate/fsdp2.yaml"
CASES = [
    ("transformers", "full", 5),
    ("transformers", "dense", 2),
    ("transformers", "lora", 2),
    ("TRL", "lora", 1),
    ("TRL", "full", 1),
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
def sharded(untrained_base, folder, forked_python):
    paths = (untrained_base, folder / "data.jsonl", folder / "sharded")
    return run(forked_python, PATH, CASES, *paths, fused=True)


@pytest.mark.parametrize("front, trained, steps", CASES)
def test_two_processes_train_as_one(front, trained, steps, untrained_base, folder, sharded):
    out = folder / "alone" / f"{front}-{trained}"
    alone = train_alone(front, trained, steps, untrained_base, folder / "data.jsonl", out)
    check_losses(sharded[front, trained], alone)
    if front == "transformers" and trained != "lora":
        check_saved(folder / "sharded" / out.name, out, untrained_base, trained)


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
