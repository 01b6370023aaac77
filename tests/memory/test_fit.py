"""What fits a card, what to change if it does not, and what is kept if there is room."""

from pathlib import Path

import pytest

from sparselong import memory
from sparselong.config import schema as config_module
from sparselong.errors import StageError
from sparselong.figures import format_bytes
from sparselong.memory import Kept, fit, placing, training

GIB = 2**30
ROOT = Path(__file__).resolve().parents[2]
BIG, SMALL = (memory.PUBLISHED[f"openai/gpt-oss-{size}"] for size in ("120b", "20b"))
NOTHING, ATTENTION, BOTH = Kept(), Kept(True), Kept(True, SMALL.layers)

WHOLE = {"training.slice_rows": "never", "training.offload_checkpoints": "false"}


def load(*overrides: str):
    """Return a config of 20b: experts and whole layers are on the GPU unless overrides say else."""
    given = {"experts.placement": "gpu", **WHOLE}
    given |= dict(each.split("=", 1) for each in overrides)
    text = [f"{key}={value}" for key, value in given.items()]
    return config_module.load(ROOT / "configs/gpt-oss-20b-1x3090.yaml", text)


def peak(*overrides: str, kept: Kept = NOTHING) -> int:
    return training.finetune_memory(SMALL, load(*overrides), kept=kept).peak_bytes


def decide(budget_bytes: int, *overrides: str) -> Kept:
    return placing.decide_kept(SMALL, load(*overrides), budget_bytes)


def test_20b_on_a_24_gb_card_keeps_attention_and_some_experts():
    """Of the layers that 5 % of the prediction leave room for."""
    for tokens, layers in ((4096, 24), (8192, 15), (16384, 3)):
        length = f"sequence_len={tokens}"
        assert decide(fit.CARD_BYTES, length) == Kept(True, layers)
        assert peak(length, kept=Kept(True, layers)) * placing.MARGIN <= fit.CARD_BYTES
    assert not memory.suggest_changes(SMALL, load(), fit.CARD_BYTES)


def test_20b_at_16384_tokens_on_four_24_gb_cards_keeps_the_experts_of_all_layers():
    assert decide(fit.CARD_BYTES, "sequence_parallel_degree=4") == BOTH


def test_auto_keeps_attention_then_experts_of_as_many_layers_as_fit_with_a_margin():
    """An output takes as much in each layer but the first, which takes no memory: it has one."""
    assert decide(int(peak(kept=ATTENTION) * placing.MARGIN) + 1) == Kept(True, 1)
    for layers in (2, 3, 12, 24):
        needed = int(peak(kept=Kept(True, layers)) * placing.MARGIN)
        assert decide(needed + 1) == Kept(True, layers)
        assert decide(needed - 2) == Kept(True, layers - 1)
    without = decide(int(peak(kept=ATTENTION) * placing.MARGIN) - 2)
    assert not without.attention and 1 < without.experts < 24  # in attention's place
    assert decide(int(peak() * placing.MARGIN) - 2) == NOTHING


def test_always_and_never_are_followed_and_the_other_key_is_decided():
    always, never = "training.keep_experts=always", "training.keep_experts=never"
    assert decide(0, always) == Kept(False, 24)
    assert decide(100 * GIB, never) == ATTENTION
    needed = int(peak(kept=BOTH) * placing.MARGIN)
    assert decide(needed + 1, always) == BOTH
    assert decide(needed - 2, always) == Kept(False, 24)  # what is always kept uses its memory
    always, never = "training.keep_attention=always", "training.keep_attention=never"
    assert decide(0, always) == ATTENTION
    assert decide(100 * GIB, never) == Kept(False, 24)
    needed = int(peak(kept=Kept(True, 9)) * placing.MARGIN)
    assert decide(needed + 1, always) == Kept(True, 9)
    needed = int(peak(kept=Kept(False, 9)) * placing.MARGIN)
    assert decide(needed + 1, never) == Kept(False, 9)
    assert decide(needed - 2, never) == Kept(False, 8)


@pytest.mark.parametrize("overrides", [[], ["sequence_len=256"], ["sequence_len=40000"]])
def test_a_peak_grows_with_the_number_of_layers_that_keep_their_experts(overrides):
    """The number that fits is found by bisection."""
    peaks = [peak(*overrides, kept=Kept(True, layers)) for layers in range(25)]
    assert peaks == sorted(peaks) and len(set(peaks)) >= 24


def test_what_is_kept_neither_decides_what_fits_nor_what_a_change_saves():
    """A config that fits keeps more on a larger card, and needs as much as before."""
    config = load()
    needed, *others = (
        memory.least_peak_bytes(SMALL, config, size * GIB) for size in (22, 24, 30, 80)
    )
    assert others == [needed] * 3 and needed == peak()


def test_kept_attention_costs_its_outputs_in_every_second_layer():
    parts = training.finetune_memory(SMALL, load(), kept=ATTENTION).components
    assert parts["kept_attention"] == 12 * 16384 * (2 * 4096 + 4 * 64)


@pytest.mark.parametrize("layers", [1, 5, 24])
def test_kept_experts_cost_their_gate_up_outputs_but_the_live_one(layers):
    kept = Kept(True, layers)
    parts, before = (
        training.finetune_memory(SMALL, load(), kept=each).components for each in (kept, ATTENTION)
    )
    layer = 16384 * 4 * (2 * 2 * 2880 + 4)
    assert parts["kept_experts"] == layers * layer
    assert before[training.EXPERTS] - parts[training.EXPERTS] == layer
    assert peak(kept=kept) - peak(kept=ATTENTION) == (layers - 1) * layer


def test_without_checkpoints_or_a_gpu_nothing_is_kept():
    whole = "training.gradient_checkpointing=false"
    assert peak(whole, kept=BOTH) == peak(whole)
    assert training.finetune_memory(SMALL, load(), "cpu", kept=BOTH) == training.finetune_memory(
        SMALL, load(), "cpu"
    )


def test_largest_sequence_len_is_the_largest_that_fits():
    budget = 17 * GIB
    longest = fit.largest_sequence_len(SMALL, load(), budget)
    assert 0 < longest < 16384 and longest % fit.STEP_TOKENS == 0
    assert peak(f"sequence_len={longest}") <= budget
    assert peak(f"sequence_len={longest + fit.STEP_TOKENS}") > budget
    assert fit.largest_sequence_len(BIG, load("model.base=openai/gpt-oss-120b"), budget) == 0


def test_65536_tokens_fit_only_with_inputs_in_host_memory():
    long, budget = "sequence_len=65536", fit.CARD_BYTES
    assert peak(long, "training.offload_checkpoints=true") * placing.MARGIN < budget
    assert peak(long, "attention_backend=triton") > budget
    told = memory.suggest_changes(SMALL, load(long), budget)
    assert told[0].startswith("training.offload_checkpoints=auto saves")
    assert told[1].startswith("training.slice_rows=auto saves")
    assert told[2].startswith("experts.placement=host saves") and told[2].endswith(" fits")
    assert told[-1].startswith("sequence_parallel_degree=2 on 2 GPUs saves")
    named = load(long, "attention_backend=torch_flash")
    assert any(
        "attention_backend=triton saves" in text
        for text in memory.suggest_changes(SMALL, named, budget)
    )


@pytest.mark.parametrize(
    ("overrides", "first"),
    [
        (["training.gradient_checkpointing=false"], "training.gradient_checkpointing=true"),
        (["micro_batch_size=4"], "training.offload_checkpoints=auto"),
        (["sequence_len=32768", "training.keep_attention=always"], "training.keep_attention=auto"),
        (["training.keep_experts=always"], "training.keep_experts=auto"),
    ],
)
def test_suggested_changes_keep_their_promises(overrides, first):
    """A suggestion that claims to fit must fit, and must save what it claims."""
    budget = int(20.5 * GIB)
    config = load(*overrides)
    told = memory.suggest_changes(SMALL, config, budget)
    assert told[0].startswith(first)
    before = fit.least_peak_bytes(SMALL, config, budget)
    for text in told:
        if text.startswith("with all"):
            continue
        override = text.split()[0]
        changed = load(
            *[o for o in overrides if o.split("=")[0] != override.split("=")[0]], override
        )
        after = fit.least_peak_bytes(SMALL, changed, budget)
        assert text.endswith("fits") == (after <= budget), text
        if "saves" in text:
            assert format_bytes(before - after) in text
    assert any("sequence_len=" in text for text in told)


def test_no_change_fits_a_model_that_is_too_large():
    """Even eight GPUs with 6 GiB each hold too much of the model."""
    config = load("model.base=openai/gpt-oss-120b")
    told = memory.suggest_changes(BIG, config, 6 * GIB)
    assert told and not any(text.endswith(" fits") for text in told)
    with pytest.raises(StageError) as refused:
        fit.check_fit(BIG, config, 1, 6 * GIB)
    assert refused.value.fix.endswith("use a larger GPU or a smaller model")


def test_all_changes_together_are_suggested_if_none_is_enough():
    config, budget = load("model.base=openai/gpt-oss-120b"), 12 * GIB
    told = memory.suggest_changes(BIG, config, budget)
    every = [text.split()[0] for text in told if " saves " in text and "on 8" not in text]
    assert "experts.placement=host" in every and "training.offload_checkpoints=auto" in every
    together = "with all other changes, sequence_len="
    (last,) = (text for text in told if text.startswith(together))
    length = last.removeprefix(together).split()[0]
    changed = load("model.base=openai/gpt-oss-120b", *every, f"sequence_len={length}")
    assert int(length) > 8192 and fit.least_peak_bytes(BIG, changed, budget) <= budget


def test_120b_on_one_card_is_told_to_use_four_or_host_memory():
    config = load("model.base=openai/gpt-oss-120b")
    told = memory.suggest_changes(BIG, config, fit.CARD_BYTES)
    alone, last = (text for text in told if text.endswith(" fits"))
    assert alone.startswith("experts.placement=host saves")
    assert last.startswith("sequence_parallel_degree=4 on 4 GPUs saves") and last == told[-1]


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["sequence_len=131072"], ["14.89 GiB short", "sequence_len=45568 instead of 131072 fits"]),
        (["model.base=openai/gpt-oss-120b"], ["short", "sequence_parallel_degree=4 on 4 GPUs"]),
        (
            ["model.base=openai/gpt-oss-120b", "training.offload_checkpoints=auto"],
            [
                "short; training.slice_rows=auto saves",
                "experts.placement=host saves",
                "; sequence_parallel_degree=4 on 4 GPUs",
            ],
        ),
    ],
)
def test_a_dry_run_reports_the_shortage_and_what_to_change(overrides, parts, tmp_path):
    notes = " ".join(memory.plan_stage(load(*overrides), tmp_path, "03_finetune")["notes"])
    for part in parts:
        assert part in notes
    assert "no change" not in notes or "instead of" not in notes


def test_a_dry_run_that_fits_has_no_such_note(tmp_path):
    notes = " ".join(memory.plan_stage(load(), tmp_path, "03_finetune")["notes"])
    assert "does not fit" not in notes
