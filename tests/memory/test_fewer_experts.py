"""Plans with experts.keep: stage 03 has the experts that are left, 02 and 04 all of them."""

import pytest

from sparselong import memory
from sparselong.chat import opening
from sparselong.config import load
from sparselong.errors import ConfigError
from sparselong.evaluate.compared import Compared, check_sizes
from sparselong.memory import make_plan, placing, storage
from sparselong.memory.limits import check_model
from sparselong.processes import sharing
from tests.conftest import ROOT
from tests.inputs.mutations.folder import edit_json

BIG = memory.PUBLISHED["openai/gpt-oss-120b"]
BF16 = ("shared_dense.weight_bits=16", "shared_dense.sparsity=none")


def load_big(*overrides: str):
    return load(ROOT / "configs/gpt-oss-120b-4x3090.yaml", overrides)


def test_120b_with_half_of_its_experts():
    """34.7 GB: from the published counts of weights, MXFP4 at 4.25 bits and the rest in bf16."""
    experts, expert_biases, router = 114_661_785_600, 39_813_120, 13_275_648
    others = 955_514_880 + 288_000 + 2_304 + 210_240 + 2 * 579_133_440
    half = experts / 2 * 4.25 / 8 + 2 * (expert_biases / 2 + router / 2 + others)
    config = load_big("experts.keep=64", *BF16)
    check_model(config)
    plan = make_plan(config)
    assert plan.disk["compressed_model"] == plan.disk["finetuned_model"] == half
    assert f"{half / 1e9:.1f}" == "34.7"
    assert plan.disk["base"] == make_plan(load_big()).disk["base"]
    assert plan.linkable["compressed_model"] == 0


def test_only_stage_03_is_planned_with_fewer_experts():
    fewer, whole = (make_plan(load_big(*extra)) for extra in (["experts.keep=64"], []))
    for name in ("replicated", "sharded"):
        one, other = (getattr(plan, name).components["experts"] for plan in (fewer, whole))
        assert 2 * one == other
    assert fewer.stages["04_eval"] == whole.stages["04_eval"]
    assert fewer.stages["02_compress"] == whole.stages["02_compress"]
    written = (plan.compress_host["layer_written"] for plan in (fewer, whole))
    assert next(written) - next(written) == whole.compressed["experts"] // 2 // 36
    assert fewer.seconds["02_compress"] > whole.seconds["02_compress"]
    lines = memory.plan_stage(load_big("experts.keep=64"), ROOT / "no", "02_compress")["notes"]
    assert any("Experimental: stage 02 keeps 64 of the base's 128" in line for line in lines)


def test_adapters_are_those_of_the_experts_that_are_left():
    lora = ("lora.expert_targets=[down_proj]", "lora.expert_r=8", "lora.router=true")

    def count(*overrides: str) -> int:
        config = load_big(*lora, *overrides)
        return storage.disk_bytes(BIG, config)["adapter"]

    each = 36 * (8 * (2880 + 2880) + 16) * 4
    assert count() - count("experts.keep=96") == 32 * each


@pytest.mark.parametrize(("keep", "shared"), [(64, 4), (66, 2), (65, 1)])
def test_as_many_processes_share_as_divide_both_numbers(keep, shared):
    """Stage 04 also opens the base, in the same number of processes."""
    config = load_big(f"experts.keep={keep}")
    for shape in (BIG, memory.drop_experts(BIG, config)):
        assert placing.most_expert_parallel(shape, config, 4) == shared


@pytest.mark.parametrize(
    ("keep", "degree", "words"),
    [(64, 4, ""), (66, 4, "one of 1, 2\n"), (96, 3, "1, 2, 4, 8, 16, 32\n"), (127, 1, "")],
)
def test_a_fixed_degree_must_divide_both(keep, degree, words):
    config = load_big(f"experts.keep={keep}", f"expert_parallel_degree={degree}")
    if not words:
        check_model(config)
        return
    with pytest.raises(ConfigError) as caught:
        check_model(config)
    assert f"the {keep} of experts.keep" in caught.value.what
    assert f"{caught.value.expected}\n".endswith(words) and caught.value.exit_code == 2


def test_a_base_in_a_directory_is_judged_by_its_own_number(untrained_base):
    for keep, fits in ((4, True), (7, True), (8, False), (3, False)):
        base = f"model.base={untrained_base}"
        config = load(ROOT / "configs/tiny.yaml", [base, f"experts.keep={keep}"])
        if fits:
            check_model(config)
            assert memory.compressed_shape(config).experts == keep
        else:
            with pytest.raises(ConfigError, match=r"experts\.keep"):
                check_model(config)


def test_a_chat_is_planned_with_the_experts_of_the_opened_model(untrained_base, monkeypatch):
    config, source = load_big("experts.keep=64"), opening.Source(untrained_base)
    asked = {
        model: opening._as_base(config, model, source)
        for model in ("base", "compressed", "finetuned", str(untrained_base))
    }
    keeps = [each.experts.keep for each in asked.values()]
    assert keeps == [None, 64, 64, None]
    monkeypatch.setattr(sharing.torch.cuda, "is_available", lambda: False)
    peaks = {}
    for model in ("base", "finetuned"):
        sharing.decide_evaluation_sharing(asked[model], with_base=False)
        made = sharing.decided_sharing()
        assert made is not None
        peaks[model] = made.predicted_peak_bytes
    experts = [storage.expert_bytes(memory.drop_experts(BIG, each)) for each in asked.values()]
    assert peaks["base"] - peaks["finetuned"] > experts[0] - experts[1] > 20e9
    sharing.decide_evaluation_sharing(asked["finetuned"])
    made = sharing.decided_sharing()
    assert made is not None and made.predicted_peak_bytes == peaks["base"]


@pytest.mark.parametrize(
    ("experts", "processes", "words"),
    [
        *[(6, 1, ""), (6, 2, ""), (4, 4, ""), (8, 3, "")],
        (6, 4, "cannot be measured by 4 processes"),
        (12, 1, "at most the base's 8 experts"),
    ],
)
def test_models_with_fewer_experts_are_compared(
    untrained_base, tmp_path, experts, processes, words
):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((untrained_base / name).read_bytes())
    edit_json(tmp_path / "config.json", lambda d: d.update(num_local_experts=experts))
    compared = [Compared("other", "compared-0", tmp_path, "")]
    if not words:
        check_sizes(compared, untrained_base, processes)
        return
    with pytest.raises(ConfigError) as caught:
        check_sizes(compared, untrained_base, processes)
    assert words in str(caught.value)
