"""examples/accelerate/zero3.yaml on the small model: two processes train and save as one.

Run by `make test-zero3`, which installs DeepSpeed in a directory of its own. On a CPU the optimizer
is not offloaded: it is in host memory as it is.
"""

import sys

import pytest
import yaml

from tests.conftest import ROOT, write_rows
from tests.examples.separate import MESSAGES
from tests.examples.sharded import check_losses, check_saved, run, train_alone
from tests.examples.test_fsdp2 import CASES

pytestmark = pytest.mark.timeout(600)  # the first run compiles
PATH = ROOT / "examples/accelerate/zero3.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero3")
    write_rows(folder / "data.jsonl", MESSAGES)
    document = yaml.safe_load(PATH.read_text(encoding="utf-8"))
    document["deepspeed_config"]["offload_optimizer_device"] = "none"
    (folder / "zero3.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def sharded(untrained_base, folder):
    paths = (untrained_base, folder / "data.jsonl", folder / "sharded")
    # Not forked_python, whose packages were imported where DeepSpeed cannot be.
    return run(sys.executable, folder / "zero3.yaml", CASES, *paths, fused=True)


@pytest.mark.parametrize("front, trained, steps", CASES)
def test_two_processes_train_as_one(front, trained, steps, untrained_base, folder, sharded):
    out = folder / "alone" / f"{front}-{trained}"
    alone = train_alone(front, trained, steps, untrained_base, folder / "data.jsonl", out)
    check_losses(sharded[front, trained], alone)
    if front == "transformers" and trained != "lora":
        check_saved(folder / "sharded" / out.name, out, untrained_base, trained)
