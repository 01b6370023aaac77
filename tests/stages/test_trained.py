"""The small trained model: its expected quality, and the accepted cost of compression.

An untrained model cannot test these claims, since it could not get worse.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sparselong.config.schema import load
from sparselong.data import encode_files, select_usable
from sparselong.evaluate import perplexity
from sparselong.evaluate.tasks import load_suite
from sparselong.model import load_model, load_tokenizer
from sparselong.model.packed_linear import PackedLinear
from sparselong.packing import dense, integer
from tests.conftest import ROOT, load_script
from tests.measuring import measure_tasks

# Three minutes of training on one idle core.
pytestmark = pytest.mark.timeout(900)

CONFIG = ROOT / "configs/tiny.yaml"
POSITIONS = 131_072
MEASURED = sorted((ROOT / "benchmarks/results").glob("demo-cpu2-*.json"))[-1]
LUCK = 1e-4
"""Largest accepted probability that a guessing model passes."""


@pytest.fixture(scope="module")
def measured() -> dict[str, float]:
    """The demo's published figures by stage and metric."""
    rows = json.loads(MEASURED.read_text(encoding="utf-8"))["rows"]
    return {f"{row['case']['stage']} {row['metric']}": row["value"] for row in rows}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """The demo's stages 01 and 02: a trained base and its compressed form."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    arguments = ["--config", str(CONFIG), "--run-dir", str(folder)]
    assert load_script("02_compress").main(arguments) == 0
    return folder


@pytest.fixture(scope="module")
def measure(run_dir):
    """Measure perplexity on the demo's held-out conversations."""
    config = load(CONFIG)
    encoded = encode_files(config, run_dir, load_tokenizer(run_dir / "base"))
    rows = select_usable(encoded, config.sequence_len).validation
    rows = rows[: config.evaluation.perplexity_samples]
    samples = perplexity.load_samples(encoded.validation, rows)
    return lambda model: perplexity.measure(model, samples, 32)["supervised"]["perplexity"]


def test_the_small_model_reaches_the_published_quality(run_dir, measured):
    """Another summation order changes a trained model's perplexity by a few percent."""
    figures = json.loads((run_dir / "base/tiny.json").read_text())["metrics"]
    for name in (
        "perplexity",
        "unigram_perplexity",
        "perplexity_without_attention",
        "perplexity_random_two_four",
    ):
        assert figures[name] == pytest.approx(measured[f"base {name}"], rel=0.05), name


def test_compression_costs_as_published_and_a_random_mask_more(run_dir, measure, measured):
    """Excess over the base's perplexity is at most 1.5 %, and several times as large with a random
    mask. It was 0.3 % in the published run, and up to 1.0 % with other calibration samples."""
    base = measure(load_model(run_dir / "base"))
    compressed_model = load_model(run_dir / "02_compress/model")
    excess = measure(compressed_model) / base - 1
    published = measured["04_eval perplexity.compressed"] / measured["04_eval perplexity.base"] - 1
    assert abs(excess) <= 0.015
    draw_masks_at_random(compressed_model, load_model(run_dir / "base"))
    assert measure(compressed_model) / base - 1 > 5 * published


def test_compression_loses_less_than_the_reference(run_dir, tmp_path):
    """One sweep errs less than two for every projection, and so do the next tokens after it.

    Measured: the errors are 0.57 to 0.89 of two sweeps', on average 0.79; the divergence from the
    base on held-out conversations is less than half of theirs, which are not refined.
    """
    other = tmp_path / "run"
    arguments = ["--config", str(CONFIG), "--run-dir", str(other), f"model.base={run_dir / 'base'}"]
    reference = ["calibration.solver=llmcompressor", "calibration.refinement_steps=0"]
    assert load_script("02_compress").main([*arguments, *reference]) == 0
    one, two = (
        json.loads((folder / "02_compress/manifest.json").read_text())["metrics"]["relative_error"]
        for folder in (run_dir, other)
    )
    ratios = [
        mine[name] / theirs[name] for mine, theirs in zip(one, two, strict=True) for name in mine
    ]
    assert len(ratios) == 16 and max(ratios) <= 1.0 and sum(ratios) / 16 <= 0.9
    config = load(CONFIG)
    encoded = encode_files(config, run_dir, load_tokenizer(run_dir / "base"))
    rows = select_usable(encoded, config.sequence_len).validation[:40]
    base = load_model(run_dir / "base")
    mine, theirs = (
        sum(diverge(base, model, encoded.validation[row][0]) for row in rows)
        for model in (load_model(folder / "02_compress/model") for folder in (run_dir, other))
    )
    assert 0 < mine < 0.75 * theirs


@torch.no_grad()
def diverge(base, model, tokens: list[int]) -> float:
    """Return the summed Kullback-Leibler divergence of the next tokens from the base's."""
    wanted, found = (m(torch.tensor([tokens])).logits[0].log_softmax(-1) for m in (base, model))
    return float((wanted.exp() * (wanted - found)).sum())


def draw_masks_at_random(model, base) -> None:
    """Replace stage 02's weights by the base's under a random 2:4 mask, in the same format."""
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


def test_multiple_choice_is_above_chance(run_dir, tmp_path, measured):
    """The published accuracy; guessing reaches it less than once in 10,000 times."""
    suite = load_suite(load(CONFIG), tmp_path, load_tokenizer(run_dir / "base"), POSITIONS)
    figures = measure_tasks(load_model(run_dir / "base"), suite)["demo_hellaswag"]
    items, chance, accuracy = figures["items"], figures["chance"], figures["acc"]
    published = {
        name: measured[f"04_eval tasks.demo_hellaswag.base.{name}"]
        for name in ("items", "chance", "acc", "stderr")
    }
    assert (items, chance) == (published["items"], published["chance"])
    assert at_least(round(accuracy * items), items, chance) < LUCK
    assert abs(accuracy - published["acc"]) <= 3 * published["stderr"]


def test_exports_answer_every_item_as_the_model_does(run_dir, tmp_path):
    """In plain transformers, with the same answers item by item."""
    formats = ("mxfp4", "hf-bf16")
    arguments = ["--config", str(CONFIG), "--run-dir", str(run_dir), "--from", "compressed"]
    assert load_script("05_export").main([*arguments, "--to", *formats]) == 0
    suite = load_suite(
        load(CONFIG, ["evaluation.limit=40"]),
        tmp_path,
        load_tokenizer(run_dir / "base"),
        POSITIONS,
    )
    wanted = measure_tasks(load_model(run_dir / "02_compress/model"), suite)["demo_hellaswag"]
    assert 0 < sum(wanted["right"]) < 40
    for name in formats:
        folder = run_dir / "05_export" / name
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        found = measure_tasks(model.float().eval(), suite)["demo_hellaswag"]
        assert (found["right"], found["right_norm"]) == (wanted["right"], wanted["right_norm"])
        for mine, theirs in zip(found["log_likelihoods"], wanted["log_likelihoods"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5)


def at_least(right: int, items: int, chance: float) -> float:
    """Probability of at least that many right answers by guessing."""
    return sum(
        math.comb(items, k) * chance**k * (1 - chance) ** (items - k)
        for k in range(right, items + 1)
    )


def test_luck_is_a_binomial_tail():
    assert at_least(0, 400, 0.25) == pytest.approx(1.0)
    assert at_least(2, 2, 0.25) == pytest.approx(1 / 16)
    assert at_least(1, 2, 0.25) == pytest.approx(7 / 16)
    assert at_least(round(0.33 * 400), 400, 0.25) > LUCK > at_least(round(0.34 * 400), 400, 0.25)
