"""examples/accelerate/zero3.yaml on the small model: two processes train and save as one.

Run by `make test-zero3`, which installs DeepSpeed in a directory of its own. On a CPU the optimizer
is not offloaded: it is in host memory as it is.
"""

import json
import sys

import pytest
import yaml

from tests.conftest import ROOT, write_rows
from tests.examples.axolotl_runs import FORMS
from tests.examples.separate import MESSAGES
from tests.examples.sharded import check_case, run
from tests.examples.test_axolotl_long import check_sharded
from tests.examples.test_fsdp2 import CASES

pytestmark = pytest.mark.timeout(600)  # the first run compiles
PATH = ROOT / "examples/accelerate/zero3.yaml"
AUTO = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
STAGE_3 = {
    "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
    **dict.fromkeys(AUTO, "auto"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero3")
    write_rows(folder / "data.jsonl", MESSAGES)
    document = yaml.safe_load(PATH.read_text(encoding="utf-8"))
    document["deepspeed_config"]["offload_optimizer_device"] = "none"
    (folder / "zero3.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def sharded(small_base, folder):
    paths = (small_base, folder / "data.jsonl", folder / "sharded")
    # Not forked_python, whose packages were imported where DeepSpeed cannot be.
    return run(sys.executable, folder / "zero3.yaml", CASES, *paths, fused=True)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case[:3]))
def test_two_processes_train_as_one(case, small_base, folder, sharded):
    check_case(case, small_base, folder, sharded)


@pytest.mark.parametrize("form", FORMS)
def test_axolotl(form, small_base, tmp_path):
    (tmp_path / "zero3.json").write_text(json.dumps(STAGE_3), encoding="utf-8")
    way = {"deepspeed": str(tmp_path / "zero3.json")}
    check_sharded(form, small_base, tmp_path, sys.executable, way)
