"""How checkpointed layers compute: the order of choices, their memory, refusals, what is shown."""

import pytest

from sparselong import memory
from sparselong.config import Config
from sparselong.config import schema as config_module
from sparselong.errors import ConfigError, StageError
from sparselong.figures import format_bytes
from sparselong.memory import Held, fit, placing, slicing, training
from tests.conftest import ROOT
from tests.health.machines import GIB, gpu, judge, machine

SMALL, BIG = (memory.PUBLISHED[f"openai/gpt-oss-{size}"] for size in ("20b", "120b"))
WHOLE = Held()
LONG = "sequence_len=131072"


def load(*overrides: str, file: str = "gpt-oss-20b-1x3090") -> Config:
    return config_module.load(ROOT / f"configs/{file}.yaml", overrides)


def settled(config: Config, gib: float, host_gib: float | None = None, **more) -> tuple:
    """Return rows, place of the inputs and backend for a device of so many GiB."""
    given = {"held": WHOLE, "processes_here": 1, "device": "cuda"} | more
    host = None if host_gib is None else int(host_gib * GIB)
    found = placing.settle(
        SMALL, config, budget_bytes=int(gib * GIB), host_budget_bytes=host, **given
    )
    part = found.training
    return part.slice_rows, part.offload_checkpoints, found.attention_backend


@pytest.mark.parametrize(
    ("gib", "host_gib", "chosen"),
    [
        (50, None, ("never", False, "auto")),
        (30, None, ("never", True, "auto")),
        (28, None, ("never", True, "auto")),
        (27.2, None, ("never", True, "triton")),  # slices alone would not save what attention adds
        (fit.CARD_BYTES / GIB, None, (8192, True, "triton")),
        (12, None, (8192, True, "triton")),  # does not fit either, but needs least
        (30, 10, (8192, False, "triton")),  # nor does this: too little host memory
        (42, 10, ("never", False, "triton")),
        (50, 10, ("never", False, "auto")),
    ],
)
def test_auto_takes_the_fastest_way_that_fits(gib, host_gib, chosen):
    assert settled(load(LONG), gib, host_gib) == chosen


def test_each_way_is_taken_just_below_the_margin_of_the_one_before():
    config = load("sequence_len=16384", "training.keep_attention=never")
    asked = [("never", False), ("never", True), (8192, False), (8192, True)]
    peaks = []
    for rows, offloads in asked:
        named = load(
            "sequence_len=16384",
            f"training.slice_rows={rows}",
            f"training.offload_checkpoints={str(offloads).lower()}",
        )
        peaks.append(training.finetune_memory(SMALL, named).peak_bytes)
    for before, after in ((0, 1), (1, 3)):
        budget = peaks[before] * placing.MARGIN
        assert settled(config, budget / GIB + 1e-6)[:2] == asked[before]
        assert settled(config, budget / GIB - 1e-6)[:2] == asked[after]
    no_host = settled(config, peaks[2] * placing.MARGIN / GIB + 1e-6, host_gib=1)
    assert no_host[:2] == (8192, False)


def test_what_is_asked_for_is_taken():
    for text, value in (("training.slice_rows=4096", 4096), ("training.slice_rows=never", "never")):
        assert settled(load(LONG, text), 12)[0] == value
    assert settled(load(LONG, "training.offload_checkpoints=false"), 12)[1] is False
    assert settled(load(LONG, "training.offload_checkpoints=true"), 900)[1] is True
    assert settled(load(LONG, "attention_backend=torch_flash"), 12)[2] == "torch_flash"


def test_auto_changes_nothing_that_it_cannot():
    """Without checkpoints, on a CPU, for few tokens, or where layers must keep their experts."""
    whole = ("never", False)
    assert settled(load(LONG, "training.gradient_checkpointing=false"), 12)[:2] == whole
    assert settled(load(LONG, "training.keep_experts=always"), 12)[:2] == whole
    assert settled(load(LONG), 0, device="cpu") == ("never", False, "auto")
    assert settled(load("sequence_len=8192"), 12)[0] == "never"
    shared = load(LONG, "sequence_parallel_degree=16")
    assert settled(shared, 12, processes_here=16)[0] == "never"
    assert settled(load(LONG, "flash_attention=false"), 12)[2] == "auto"


def test_20b_at_131072_tokens_fits_one_24_gb_card():
    """22.56 GiB were measured so."""
    found = memory.decided_memory(SMALL, load(LONG), fit.CARD_BYTES)
    assert found.peak_bytes == pytest.approx(22.56 * GIB, rel=0.01)
    assert found.peak_bytes < 23.3 * GIB
    on_host = memory.decided_memory(SMALL, load(LONG), int(18 * GIB), held=Held(1, "host"))
    assert on_host.peak_bytes < 18 * GIB
    config = placing.settle(SMALL, load(LONG), Held(1, "host"), 1, int(18 * GIB))
    assert placing.host_bytes(SMALL, config, Held(1, "host"), 1) < 40 * GIB


def test_a_process_slices_its_shard_and_inputs_take_host_memory_once_a_sequence():
    config = load(LONG, "sequence_parallel_degree=4", "training.offload_checkpoints=true")
    inputs = 24 * 131072 * 2880 * 2
    assert slicing.host_input_bytes(SMALL, config) == inputs
    assert placing.host_bytes(SMALL, config, WHOLE, 8) == 2 * inputs + 8 * 2 * GIB
    parts = training.finetune_memory(SMALL, config).components
    assert parts["checkpoints"] == 2 * (131072 // 4) * 2880 * 2
    assert slicing.rows_at_once(config, 32768) == 32768
    assert slicing.rows_at_once(load("training.slice_rows=100"), 32768) == 100
    assert slicing.rows_at_once(load("training.slice_rows=100"), 64) == 64
    assert slicing.rows_at_once(load("training.slice_rows=never"), 64) is None


def test_slices_bound_the_memory_of_shared_experts_too():
    config = load(LONG, "training.slice_rows=2048", file="gpt-oss-120b-4x3090")
    whole = load(LONG, "training.slice_rows=never", file="gpt-oss-120b-4x3090")
    found, before = (
        training.finetune_memory(BIG, each, held=Held(4)).components for each in (config, whole)
    )
    assert found[training.EXPERTS] < before[training.EXPERTS]


def test_host_memory_for_inputs_that_does_not_suffice_is_refused_with_both_figures():
    config = load(LONG, "training.offload_checkpoints=true", "experts.placement=gpu")
    needed = 24 * 131072 * 2880 * 2 + 2 * GIB
    fit.check_fit(SMALL, config, 1, 40 * GIB, "cuda", needed)
    with pytest.raises(StageError, match="does not hold the inputs of checkpointed") as refused:
        fit.check_fit(SMALL, config, 1, 40 * GIB, "cuda", needed - GIB)
    assert format_bytes(needed) in refused.value.expected
    assert "1.00 GiB short" in refused.value.found
    assert "training.offload_checkpoints=false" in refused.value.fix
    auto = load(LONG, "experts.placement=gpu")  # takes no more than there is
    fit.check_fit(SMALL, auto, 1, 45 * GIB, "cuda", needed - GIB)


@pytest.mark.parametrize(("key", "value"), [("slice_rows", "64"), ("offload_checkpoints", "true")])
def test_values_that_cannot_work_are_refused(key, value):
    setting = f"training.{key}={value}"
    with pytest.raises(ConfigError) as refused:
        load(setting, "training.gradient_checkpointing=false")
    assert f"training.{key}: {value} needs training.gradient_checkpointing" in str(refused.value)
    with pytest.raises(ConfigError, match="such layers recompute their experts"):
        load(setting, "training.keep_experts=always")
    load(setting, "training.keep_experts=auto")


def test_plan_and_health_show_the_choice_and_why(tmp_path):
    document = memory.plan_stage(load(LONG), tmp_path, "03_finetune")
    assert (document["slice_rows"], document["offload_checkpoints"]) == (8192, True)
    assert document["attention_backend"] == "triton"
    assert document["input_host_bytes"] == 24 * 131072 * 2880 * 2
    shown = " ".join(memory.show_plan(document).split())
    line = (
        "8,192 tokens at a time, inputs in host memory, triton attention (16.88 GiB there) "
        "(auto: needed to fit with a margin)"
    )
    assert f"Checkpointed layers: {line}" in shown and "does not fit a card" not in shown
    short = memory.plan_stage(load(), tmp_path, "03_finetune")
    why = "all tokens at once, inputs on the device (auto: the fastest way)"
    shown = " ".join(memory.show_plan(short).split())
    assert f"Checkpointed layers: {why}" in shown
    kept = "full attention in all 12 layers, experts' gate_up in the last 3 of 24 layers"
    assert short["kept"] == kept
    assert f"Outputs kept for the backward pass: {kept}" in shown
    assert document["kept"] == "" and "Outputs kept" not in memory.show_plan(document)
    none = memory.plan_stage(load("training.gradient_checkpointing=false"), tmp_path, "03_finetune")
    assert none["layers"] == "not checkpointed"
    assert none["layers_reason"] == "training.gradient_checkpointing: false"
    asked = load("training.slice_rows=4096", "attention_backend=triton")
    named = memory.plan_stage(asked, tmp_path, "03_finetune")
    assert named["layers"] == "4,096 tokens at a time, inputs on the device, triton attention"
    assert named["layers_reason"] == (
        "training.slice_rows: 4096, attention_backend: triton, auto: the fastest way"
    )
    assert "Checkpointed" not in memory.show_plan(memory.plan_stage(load(), tmp_path, "04_eval"))

    rows = judge(load(LONG), machine([gpu()], host_available_bytes=60 * GIB))
    assert rows["checkpointed layers"].found == line
    assert "triton (auto: needed to fit" in rows["attention kernel"].found
    assert {row.check for row in rows.values() if row.status == "fail"} == set()
    asked = load(LONG, "training.offload_checkpoints=true", "training.slice_rows=4096")
    poor = judge(asked, machine([gpu()], host_available_bytes=12 * GIB))["host memory"]
    assert poor.status == "fail" and "inputs of checkpointed layers" in poor.found
