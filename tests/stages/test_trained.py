"""The small model trained for real: what it must be worth, and what compression may cost it.

These are the claims that an untrained model cannot test: nothing could get worse.
"""

import json
from pathlib import Path

import pytest
import torch

from sparselong.config.schema import load
from sparselong.data import conversations
from sparselong.evaluate import harness, perplexity
from sparselong.model.loading import load_model, load_tokenizer
from sparselong.model.packed_linear import PackedLinear
from sparselong.packing import dense, integer
from tests.conftest import ROOT, load_script

# Three minutes of training on one core that nobody else uses.
pytestmark = pytest.mark.timeout(900)

CONFIG = ROOT / "configs/tiny.yaml"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """The demo's stages 01 and 02: a trained base and its compressed form."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    arguments = ["--config", str(CONFIG), "--run-dir", str(folder)]
    assert load_script("02_compress").main(arguments) == 0
    return folder


@pytest.fixture(scope="module")
def measure(run_dir):
    """Perplexity on the demo's held-out conversations."""
    config = load(CONFIG)
    validation = conversations.prepare(config, run_dir).validation
    samples = perplexity.load_samples(validation, load_tokenizer(run_dir / "base"), config)
    return lambda model: perplexity.measure(model, samples, 32)["supervised"]["perplexity"]


def test_the_small_model_is_worth_something(run_dir):
    figures = json.loads((run_dir / "base/tiny.json").read_text())["metrics"]
    assert figures["unigram_perplexity"] >= 2 * figures["perplexity"]
    assert figures["perplexity_without_attention"] >= 1.5 * figures["perplexity"]


def test_compression_costs_little_and_a_random_mask_would_show(run_dir, measure):
    base = measure(load_model(run_dir / "base"))
    compressed_model = load_model(run_dir / "02_compress/model")
    compressed = measure(compressed_model)
    assert compressed <= 1.05 * base
    draw_masks_at_random(compressed_model, load_model(run_dir / "base"))
    assert measure(compressed_model) > 1.05 * base


def draw_masks_at_random(model, base) -> None:
    """Puts a random 2:4 mask of the base's weights, in the same format, in place of stage 02's."""
    originals = dict(base.named_modules())
    generator = torch.Generator().manual_seed(0)
    for name, layer in model.named_modules():
        if not isinstance(layer, PackedLinear):
            continue
        weight = originals[name].weight
        order = torch.rand(weight.numel() // 4, 4, generator=generator).argsort(1)
        mask = (order < 2).reshape(weight.shape)
        kept = torch.where(mask, weight, 0.0)
        groups = kept.abs().reshape(weight.shape[0], -1, layer.fmt.group_size)
        scale = (groups.amax(-1) / 7.5).bfloat16()
        stored = dense.pack(layer.fmt, integer.quantize(kept, scale, 4), mask, scale)
        layer.load_state_dict({**stored, "bias": layer.bias})


def test_multiple_choice_is_above_chance(run_dir, tmp_path):
    suite = harness.load_suite(load(CONFIG), tmp_path, load_tokenizer(run_dir / "base"))
    figures = harness.measure(load_model(run_dir / "base"), suite)["demo_hellaswag"]
    assert figures["items"] >= 200
    assert figures["acc"] > figures["chance"] + 2 * figures["acc_stderr"]
