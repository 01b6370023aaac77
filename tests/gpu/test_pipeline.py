"""The four stages on one GPU, and decoding that is bit-identical to the CPU's.

The stages need axolotl, llmcompressor and lm-eval in addition to the machine's torch.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparselong.packing import dense, integer, mxfp4
from sparselong.packing.dense import DenseFormat

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = ("axolotl", "llmcompressor", "lm_eval", "pydantic")
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def test_decoding_is_bit_identical_to_the_cpu():
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (64, 8, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(0, 255, (64, 8), dtype=torch.uint8, generator=generator)
    on_gpu = mxfp4.decode(blocks.cuda(), scales.cuda()).cpu()
    assert torch.equal(on_gpu, mxfp4.decode(blocks, scales))

    fmt = DenseFormat(4, "2:4", 64)
    weight = torch.randn(128, 256, generator=generator)
    mask = torch.rand(128 * 64, 4, generator=generator).argsort(1) < 2
    mask = mask.reshape(128, 256)
    scale = (torch.rand(128, 4, generator=generator) + 0.01).bfloat16()
    codes = integer.quantize(weight, scale, 4)
    assert torch.equal(integer.quantize(weight.cuda(), scale.cuda(), 4).cpu(), codes)
    stored = dense.pack(fmt, codes, mask, scale)
    on_gpu = dense.unpack(fmt, {k: v.cuda() for k, v in stored.items()}).cpu()
    assert torch.equal(on_gpu, dense.unpack(fmt, stored))


@pytest.mark.skipif(bool(MISSING), reason=f"not installed here: {', '.join(MISSING)}")
@pytest.mark.timeout(700)
def test_the_four_stages(tmp_path):
    """Stage 03 also in slices of rows with inputs in host memory, in the same autocast."""
    arguments = [
        *("--config", str(ROOT / "configs/tiny.yaml"), "--run-dir", str(tmp_path / "run")),
        *("flash_attention=true", "training.gradient_checkpointing=true"),
        *("model.tiny_steps=150", "training.max_steps=40", "evaluation.limit=100"),
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    metrics = {}
    for stage in ("01_health", "02_compress", "03_finetune", "04_eval"):
        command = [sys.executable, str(ROOT / f"{stage}.py"), *arguments]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{stage}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
        manifest = json.loads((tmp_path / "run" / stage / "manifest.json").read_text())
        metrics[stage] = manifest["metrics"]
        print(stage, manifest["seconds"], manifest["peak_bytes"])
        if stage != "01_health":
            assert manifest["peak_bytes"]["cuda:0"] > 0
    receipt = json.loads((tmp_path / "run/03_finetune/receipt.json").read_text())
    assert receipt["attention"] == "sparselong" and receipt["fused_layers"] == 4
    compressed, tuned = metrics["02_compress"], metrics["03_finetune"]
    assert compressed["experts_bit_exact"] and compressed["two_four_conforming"] == 1.0
    assert tuned["two_four_conforming"] == 1.0
    curve = {int(step): value for step, value in tuned["eval_perplexity"].items()}
    assert curve[40] < curve[0]
    print(json.dumps(metrics, indent=1))
    slices = ["training.slice_rows=100", "training.offload_checkpoints=true", "--force"]
    command = [sys.executable, str(ROOT / "03_finetune.py"), *arguments, *slices]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
    again = json.loads((tmp_path / "run/03_finetune/manifest.json").read_text())["metrics"]
    assert again["layers"]["copied_bytes"][0] > 0 == tuned["layers"]["copied_bytes"][0]
    for step, value in curve.items():
        assert again["eval_perplexity"][str(step)] == pytest.approx(value, rel=0.02)
