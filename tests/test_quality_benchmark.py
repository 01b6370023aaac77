"""The comparison of methods: references against plain definitions, figures, and a small table."""

import itertools
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import quality
from benchmarks.compared import compressing, measuring, methods, table, text, tuning, verdicts
from benchmarks.compared.rows import list_rows
from sparselong.adapters import Masters, add_masked_lora, masked_layers
from sparselong.evaluate.perplexity import Sample
from sparselong.evaluate.work import Request
from sparselong.model import load_model
from sparselong.packing import DenseFormat, integer
from sparselong.tiny.build import TinySpec, build_tiny
from tests.conftest import write_rows

OUT, IN, TOKENS, DAMPENING = 24, 64, 600, 0.01
SPARSE, INT4 = DenseFormat(16, "2:4", 32), DenseFormat(4, "none", 32)
BOTH = DenseFormat(4, "2:4", 32)
OURS = "ours, sweep alone"


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0)).bfloat16()


@pytest.fixture(scope="module")
def inputs() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    shared, mixed, noise = (
        torch.randn(rows, IN, generator=generator) for rows in (TOKENS, IN, TOKENS)
    )
    correlated = shared / torch.arange(1, IN + 1) @ mixed + 0.1 * noise
    return correlated * torch.linspace(0.3, 3.0, IN)


@pytest.fixture(scope="module")
def hessian(inputs) -> torch.Tensor:
    return 2 / len(inputs) * inputs.T @ inputs


def best_pairs(scores: torch.Tensor) -> torch.Tensor:
    """Return the mask of two of every four with the largest sum of scores, by trying all."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for row, start in itertools.product(range(len(scores)), range(0, scores.shape[1], 4)):
        four = scores[row, start : start + 4].tolist()
        pair = max(itertools.combinations(range(4), 2), key=lambda p: four[p[0]] + four[p[1]])
        mask[row, [start + each for each in pair]] = True
    return mask


def solve(name: str, weight: torch.Tensor, hessian: torch.Tensor, fmt: DenseFormat, seed: int = 0):
    solver = methods.METHODS[name].solve
    assert solver is not None
    return solver(seed)(weight, hessian, fmt, DAMPENING, "layer")


def test_magnitude_keeps_the_two_largest_of_four(weight, hessian):
    swept = solve("magnitude 2:4", weight, hessian, SPARSE)
    assert torch.equal(swept.mask, best_pairs(weight.float().abs()))
    assert torch.equal(swept.values, torch.where(swept.mask, weight.float(), 0.0))
    assert swept.codes is None


def test_wanda_weighs_magnitudes_by_the_norms_of_inputs(weight, inputs, hessian):
    swept = solve("wanda 2:4", weight, hessian, SPARSE)
    assert torch.equal(swept.mask, best_pairs(weight.float().abs() * inputs.norm(dim=0)))
    assert not torch.equal(swept.mask, best_pairs(weight.float().abs()))
    assert torch.equal(swept.values, torch.where(swept.mask, weight.float(), 0.0))


def test_a_random_mask_keeps_two_of_four_and_depends_on_the_seed(weight, hessian):
    first, again, other = (
        solve("random 2:4", weight, hessian, SPARSE, seed).mask for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert bool((first.reshape(-1, 4).sum(-1) == 2).all())
    drawn = methods.at_random(0)
    assert not torch.equal(drawn(weight, hessian, "a"), drawn(weight, hessian, "b"))


def test_rounding_takes_the_nearest_code_of_the_whole_range(weight, hessian):
    swept = solve("rtn", weight, hessian, INT4)
    groups = weight.float().reshape(OUT, -1, 32)
    scale = (groups.abs().amax(-1) / 7.5).bfloat16()
    assert torch.equal(swept.scale, scale) and swept.mask is None
    nearest = (groups / scale.float()[..., None]).round().clamp(-8, 7).reshape(OUT, IN)
    assert torch.equal(swept.codes.float(), nearest)


def test_pruning_comes_before_the_scale(weight, hessian):
    swept = solve("random 2:4 + rtn", weight, hessian, BOTH)
    kept = torch.where(swept.mask, weight.float(), 0.0).reshape(OUT, -1, 32)
    assert torch.equal(swept.scale, (kept.abs().amax(-1) / 7.5).bfloat16())
    assert not bool(swept.codes[~swept.mask].any())


def output_error(weight, swept, inputs) -> float:
    values = swept.values if swept.codes is None else integer.dequantize(swept.codes, swept.scale)
    if swept.mask is not None:
        values = torch.where(swept.mask, values.float(), 0.0)
    return float((inputs @ (weight.float() - values.float()).T).norm())


def test_methods_that_correct_and_that_choose_better_lose_less(weight, inputs, hessian):
    names = ("random", "magnitude", "wanda", "sparsegpt")
    errors = [
        output_error(weight, solve(f"{name} 2:4", weight, hessian, SPARSE), inputs)
        for name in names
    ]
    assert errors == sorted(errors, reverse=True)
    rounded = {
        name: output_error(weight, solve(name, weight, hessian, BOTH), inputs)
        for name in ("sparsegpt 2:4 + rtn", "sparsegpt 2:4 + gptq", OURS)
    }
    assert rounded[OURS] < rounded["sparsegpt 2:4 + gptq"] < rounded["sparsegpt 2:4 + rtn"]


def test_gptq_after_sparsegpt_loses_the_mask_only_where_it_is_not_kept(weight, hessian):
    lost = solve("sparsegpt 2:4 + gptq, mask lost", weight, hessian, INT4)
    kept = solve("sparsegpt 2:4 + gptq", weight, hessian, BOTH)
    assert lost.mask is None
    assert bool((lost.codes.reshape(-1, 4) != 0).sum(-1).gt(2).any())
    assert not bool(kept.codes[~kept.mask].any())


def test_divergence_and_agreement_are_those_of_their_definitions():
    generator = torch.Generator().manual_seed(0)
    expected, logits = (torch.randn(5, 7, generator=generator).double() for _ in range(2))
    p, q = expected.softmax(-1), logits.softmax(-1)
    direct = float((p * (p / q).log()).sum(-1).mean())
    assert float(tuning.divergence(expected, logits)) == pytest.approx(direct, rel=1e-5)
    assert float(tuning.divergence(logits, logits)) == 0.0


def test_accuracies_are_counted_by_likelihood_and_by_likelihood_per_character():
    requests = [Request([1, 2], 1)] * 4
    items = text.Items(requests, [1, 10, 4, 4], [1, 0])
    found = measuring.grade([-1.0, -2.0, -3.0, -4.0], items)
    assert found["accuracy"] == (0.5, "1")
    assert found["accuracy per character"] == (1.0, "1")
    assert found["accuracy, stderr"][0] == pytest.approx(math.sqrt(0.25 * 2 / 1 / 2))


def test_buckets_are_joined_by_tokens():
    buckets = [
        {"first": 1, "nll": 3.0, "tokens": 1, "kl": 1.0},
        {"first": 24, "nll": 1.0, "tokens": 3, "kl": 5.0},
        {"first": 32, "nll": 2.0, "tokens": 1, "kl": 7.0},
    ]
    found = measuring.by_position(buckets, "kl")
    assert found == {
        "kl, positions 1 to 31": (4.0, "nats"),
        "kl, positions 32 to 127": (7.0, "nats"),
    }
    perplexity = measuring.by_position(buckets, "perplexity")
    assert perplexity["perplexity, positions 1 to 31"][0] == pytest.approx(math.e)


def test_the_table_shows_means_over_seeds_and_what_perplexity_rose_by():
    rows = []
    for method, seed, perplexity in (("base", 0, 10.0), ("ours", 0, 10.1), ("ours", 1, 10.3)):
        case = {"method": method, "experts": "native", "tuned": "no", "seed": seed}
        figures = dict.fromkeys(table.COLUMNS, 1.0) | {"accuracy, stderr": 0.01}
        figures |= {"perplexity": perplexity, "bytes": 2e6, "kl, positions 1 to 31": 0.5}
        rows += [{"case": case, "metric": name, "value": value} for name, value in figures.items()]
    *_, base, ours = table.show(rows).splitlines()
    assert base.startswith("| base | native | no | 1 | 0.00 | 10.000 | ")
    assert ours.startswith("| ours | native | no | 2 | 2.00 ± 1.41 | 10.200 ± 0.141 | ")
    assert "(stderr 0.010)" in ours and ours.endswith("| 2.00 ± 0.00 | 1.0 ± 0.0 |")
    assert table.show_positions(rows, "kl").splitlines()[0] == "| method | 1 to 31 |"
    assert table.show_positions(rows, "kl").splitlines()[-1] == "| ours | 0.5 ± 0 |"


def figure(name: tuple[str, str, str], seed: int, metric: str, value: float) -> dict:
    case = dict(zip(("method", "experts", "tuned"), name, strict=True)) | {"seed": seed}
    return {"case": case, "metric": metric, "value": value}


def test_quotients_are_taken_seed_by_seed_and_judged_by_their_interval():
    """The rises differ by seed, but their quotient is a half in every seed."""
    rows = [figure(table.BASE, 0, "perplexity", 10.0)]
    for seed, rise in enumerate((0.1, 0.2, 0.4)):
        rows.append(figure(verdicts.OURS, seed, "perplexity", 10 * (1 + rise)))
        rows.append(figure(verdicts.REFERENCE, seed, "perplexity", 10 * (1 + 2 * rise)))
    rows.append(figure(verdicts.MAGNITUDE, 0, "perplexity", 14.0))  # rises by 4, 2 and 1 times ours
    rows.append(figure(verdicts.RANDOM, 1, "perplexity", 10.9))
    _, _, ours, magnitude, random = verdicts.show_verdicts(rows).splitlines()
    assert ours.startswith("| rise: `ours` ≤ 0.8 × `sparsegpt 2:4 + gptq` | 0.5000 ±")
    assert ours.endswith("| 3 | yes |")
    half = 4.303 * 1.5275 / 3**0.5
    assert f"| 2.3333 ± {half:.2f}" in magnitude and magnitude.endswith("| 3 | within noise |")
    assert random.endswith("≥ 1.1 × `base` | 1.0900 | 1 | no |")
    assert verdicts.show_verdicts(rows[:1]) == ""


@pytest.mark.parametrize(
    ("sign", "values", "verdict"),
    [
        ("≤", [0.98, 1.0], "within noise"),
        ("≤", [0.98, 0.981], "yes"),
        ("≤", [1.03, 1.031], "no"),
        ("≥", [1.03, 1.031], "yes"),
        ("≥", [0.98, 0.981], "no"),
        ("≤", [1.0], "yes"),
        ("≥", [0.99], "no"),
    ],
)
def test_a_statement_holds_if_its_whole_interval_does(sign, values, verdict):
    statement = verdicts.Statement("perplexity", table.BASE, table.BASE, sign, 1.0)
    assert verdicts.judge(values, statement) == verdict


def test_pieces_come_from_each_document_in_turn():
    documents = [list(range(100)), list(range(200, 280)), list(range(300, 310))]
    pieces = text.cut(documents, 40, 130)
    assert [piece.input_ids[0] for piece in pieces] == [0, 200, 40, 240]
    assert [len(piece.input_ids) for piece in pieces] == [40, 40, 40, 40]


def test_a_malformed_document_is_named(tmp_path):
    path = write_rows(tmp_path / "text.jsonl", [{"split": "train", "text": ""}])
    with pytest.raises(ValueError, match="text.jsonl, line 1: allowed"):
        text.read_documents(path, None)


def test_a_batch_has_each_row_once_with_its_own_positions_and_labels():
    rows = [Sample([5, 6, 7], [False, True, True]), Sample([8, 9], [False, True])]
    tokens, labels, positions = tuning.fill_batch([rows], 6, padding=0)
    assert tokens.tolist() == [[5, 6, 7, 8, 9, 0]]
    assert labels.tolist() == [[-100, 6, 7, -100, 9, -100]]
    assert positions.tolist() == [[0, 1, 2, 0, 1, 0]]


@pytest.fixture(scope="module")
def small(tmp_path_factory, chat_file) -> list[str]:
    """Arguments of a table on an untrained one-layer model that takes seconds."""
    folder = tmp_path_factory.mktemp("quality")
    sizes = {"hidden": 64, "intermediate": 32, "heads": 2, "kv_heads": 1}
    base = build_tiny(folder / "base", TinySpec(layers=1, steps=0, vocab_size=512, **sizes))
    generator = torch.Generator().manual_seed(0)
    rows = [
        {
            "split": split,
            "input_ids": torch.randint(0, 500, (80,), generator=generator).tolist(),
        }
        for split in ("train", "held_out")
        for _ in range(8)
    ]
    item = {"activity_label": "A", "ctx_a": "One two", "ctx_b": "", "endings": list("bcde")}
    items = [{**item, "label": label} for label in (0, 3)]
    given = {
        "base": base,
        "text": write_rows(folder / "text.jsonl", rows),
        "items": write_rows(folder / "items.jsonl", items),
        "tune": chat_file,
        "folder": folder,
        "machine": "test",
        "seeds": 1,
        "steps": 3,
        "packs": 1,
        "length": 256,
        "samples": 1,
        "measured-length": 64,
        "held-out-tokens": 256,
        "compared-tokens": 128,
    }
    return [f"--{name}={value}" for name, value in given.items()]


def run(monkeypatch, capsys, *given: str) -> tuple[list[dict], str]:
    """Run the benchmark; return the rows of its file and what it printed."""
    monkeypatch.setattr(sys, "argv", ["quality.py", *given])
    folder = quality.parse().folder
    quality.main()
    (path,) = folder.glob("quality-test-*.json")
    return json.loads(path.read_text("utf-8"))["rows"], capsys.readouterr().out


def test_a_table_is_measured_in_parts_and_has_every_row(small, tmp_path, monkeypatch, capsys):
    first, said = run(monkeypatch, capsys, *small, "--minutes=0")
    assert "rows are left for the next run" in said
    kept = tmp_path / "kept.json"
    for each in first:
        if each["metric"] == "perplexity":
            each["value"] = 12345.0  # as nothing measures it
    kept.write_text(json.dumps({"rows": first}), encoding="utf-8")
    rows, said = run(monkeypatch, capsys, *small, f"--earlier={kept}", "--minutes=60")
    cases = [each["case"] for each in rows if each["metric"] == "perplexity"]
    assert cases == [row.case for row in list_rows(1, quality.count_kept(base_of(small)))]
    assert [each["value"] for each in rows].count(12345.0) == 1
    figures = {(str(each["case"]), each["metric"]): each["value"] for each in rows}
    base, ours, dense = (
        str(case)
        for case in cases
        if case["experts"] == "native"
        and (case["method"], case["tuned"]) in (("base", "no"), ("ours", "no"), ("base", "dense"))
    )
    assert figures[base, "kl"] == 0.0 and figures[base, "top-1 agreement"] == 1.0
    assert figures[ours, "kl"] > 0.0 and figures[ours, "bytes"] < figures[base, "bytes"]
    assert figures[ours, "2:4 groups"] == 1.0 and figures[dense, "kl"] > 0.0
    assert "| tuned perplexity: `ours`, dynamic ≤ 1 × `ours`, static |" in said
    with pytest.raises(ValueError, match=r"other settings: steps 3.0, now 4.0"):
        run(monkeypatch, capsys, *small, f"--earlier={kept}", "--steps=4")
    monkeypatch.setattr(quality, "REFINEMENT_STEPS", 1)
    with pytest.raises(ValueError, match=r"other settings: refinement steps \d+.0, now 1.0"):
        run(monkeypatch, capsys, *small, f"--earlier={kept}")


def test_a_row_that_fails_costs_no_other_row(small, tmp_path, monkeypatch, capsys):
    make = compressing.Compressor.make

    def fail(self, recipe):
        if recipe.method == "wanda 2:4":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return make(self, recipe)

    monkeypatch.setattr(compressing.Compressor, "make", fail)
    given = [*small, f"--folder={tmp_path}", "--only", "wanda 2:4', ", "anda 2:4 +"]
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, capsys, *given)
    assert ended.value.code == 1
    shown = capsys.readouterr()
    assert "1/2 {'method': 'wanda 2:4'" in shown.out and "CUDA out of memory" in shown.err
    (path,) = tmp_path.glob("quality-test-*.json")
    before = json.loads(path.read_text("utf-8"))["rows"]
    assert {each["case"].get("method") for each in before} == {None, "wanda 2:4 + rtn"}
    monkeypatch.undo()
    rows, _ = run(monkeypatch, capsys, *given)  # the same command continues
    assert rows[: len(before)] == before
    assert {each["case"]["method"] for each in rows[len(before) :]} == {"wanda 2:4"}


def test_only_the_methods_that_say_so_are_refined(small, tmp_path):
    (base, documents) = (Path(each.partition("=")[2]) for each in small[:2])
    read = text.read_documents(documents, None)
    maker = compressing.Compressor(base, read, tmp_path, samples=4, length=64)
    for name in ("sparsegpt 2:4 + gptq", "ours, not refined", "ours"):
        metrics = maker.make(compressing.Recipe(name, 0)).metrics
        assert metrics["masters_match"] and metrics["two_four_conforming"] == 1.0
        (error,) = metrics["attention_error"]
        assert bool(error) == methods.METHODS[name].is_refined == (name == "ours")
    assert error["refined"] < 0.9 * error["solved"]


def test_learned_masks_compute_the_stored_weight_and_pass_every_gradient(small, tmp_path):
    base, documents = (Path(each.partition("=")[2]) for each in small[:2])
    maker = compressing.Compressor(base, text.read_documents(documents, None), tmp_path, 4, 64)
    made = maker.make(compressing.Recipe("ours", 0))
    model = load_model(made.model)
    master_of = Masters(made.masters).read
    targets = ("q_proj", "o_proj")
    tuned, _ = add_masked_lora(model, targets=targets, r=4, alpha=8, master_of=master_of, seed=0)
    layer = next(iter(masked_layers(tuned).values()))
    x = torch.randn(5, layer.master.shape[1], generator=torch.Generator().manual_seed(2))
    expected = layer(x)
    tuning.learn_masks(model)
    out = layer(x)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    out.backward(upstream)
    lora_a, lora_b, scaling = layer.adapter()
    whole = scaling * upstream.T @ x @ lora_a.T  # no mask in it
    torch.testing.assert_close(lora_b.grad, whole, rtol=1e-4, atol=1e-5)


def base_of(given: list[str]) -> Path:
    return Path(given[0].removeprefix("--base="))
