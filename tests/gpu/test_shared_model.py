"""Evaluation and generation by two GPUs that share a model's experts and vocabulary, over NCCL.

The model computes in bf16 here, so both agree with one GPU up to rounding; fp32 on a CPU agrees to
1e-6 and token by token (tests/distributed/test_evaluation.py, test_generation.py).
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from sparselong.evaluate.spread import Spread
from tests.conftest import ROOT
from tests.distributed.evaluation import draw, measure, measure_with
from tests.distributed.pool import Pool

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
RELATIVE = 2e-3
MARGIN = 0.25
"""Logits by which a chosen token may be below the largest one, for bf16's rounding. The untrained
model's logits have a standard deviation of 1; its largest ones are 3.5 above the mean."""
TOKENS = 24
SCRIPT = f"""
import sys
import torch
import sparselong

def answer(model):
    return list(sparselong.generate(model, torch.arange(1, 100)[None], {TOKENS}))

tokens = sparselong.share_model(sys.argv[1], answer)
if tokens is not None:
    print(*tokens)
"""


@pytest.fixture(scope="module")
def model(untrained_base):
    from sparselong.model.loading import load_model

    return load_model(untrained_base)


@pytest.mark.parametrize("expert_size", [1, 2])
def test_figures_are_one_gpu_s(untrained_base, model, expert_size):
    requests, samples = draw(9)
    wanted = measure_with(model, requests, samples, Spread())
    pool = Pool(2, 60.0, "nccl")
    try:
        found = pool.run(measure, untrained_base, requests, samples, expert_size, None, True)
    finally:
        pool.close()
    for each in found:
        for (score, _), (right, _) in zip(each["answers"], wanted["answers"], strict=True):
            assert score == pytest.approx(right, rel=RELATIVE)
        mine, theirs = (result["perplexity"]["all"] for result in (each, wanted))
        assert mine["tokens"] == theirs["tokens"]
        assert mine["nll"] == pytest.approx(theirs["nll"], rel=RELATIVE)
    assert found[0]["answers"] == found[1]["answers"]


@pytest.mark.timeout(300)
def test_shared_tokens_are_most_likely_under_the_whole_model(untrained_base, model, tmp_path):
    script = tmp_path / "answer.py"
    script.write_text(SCRIPT)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
        *(str(script), str(untrained_base)),
    ]
    paths = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
    environment = {**os.environ, "PYTHONPATH": paths}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stderr
    tokens = [int(word) for word in ended.stdout.split()]
    assert len(tokens) == TOKENS
    ids = torch.tensor([[*range(1, 100), *tokens]], device="cuda")
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[0, -TOKENS - 1 : -1].float()
    chosen = logits.gather(1, ids[0, -TOKENS:, None])[:, 0]
    assert float((logits.amax(1) - chosen).max()) < MARGIN


@pytest.mark.timeout(300)
@pytest.mark.parametrize("launcher", ["python", "torchrun"])
def test_a_chat_is_answered_by_both_gpus(untrained_base, tmp_path, launcher):
    for package in ("pydantic", "rich", "yaml"):
        pytest.importorskip(package)
    words = [str(ROOT / "06_chat.py"), "--config", str(ROOT / "configs/tiny.yaml"), "--json"]
    words += ["--run-dir", str(tmp_path / "run"), "--model", str(untrained_base)]
    words += ["--prompt", "Hi", "--seed", "3", "--max-new-tokens", "12"]
    command = [sys.executable, *words, "expert_parallel_degree=2"]  # one GPU would be enough
    if launcher == "torchrun":
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        command = [sys.executable, *start, *words]
    paths = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
    environment = {**os.environ, "PYTHONPATH": paths}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["usage"]["new_tokens"] > 0
    assert "opened in 2 processes" in ended.stderr
    for text in (ended.stderr, (tmp_path / "run/06_chat/log.rank1.txt").read_text()):
        assert "of 8; only vocabulary rows" in text
