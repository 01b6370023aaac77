"""Experts in host memory in the plan: bytes of device and host, the order of choices, refusals."""

import pytest

from sparselong import memory
from sparselong.config import Config
from sparselong.config import schema as config_module
from sparselong.errors import StageError
from sparselong.figures import format_bytes
from sparselong.health import report
from sparselong.memory import Held, fit, placing, stages, storage, timing, training
from tests.conftest import ROOT
from tests.health.machines import FOUR_3090, GIB, gpu, judge, machine, plan_for

BIG, SMALL = (memory.PUBLISHED[f"openai/gpt-oss-{size}"] for size in ("120b", "20b"))
CARD = fit.CARD_BYTES
EXPERTS = 60_914_073_600
EMBEDDING = 201_088 * 2880 * 2
ONE, HOST = "sequence_parallel_degree=1", "experts.placement=host"
WHOLE = (
    *("training.keep_attention=never", "training.keep_experts=never"),
    *("training.slice_rows=never", "training.offload_checkpoints=false"),
)


def load(*overrides: str) -> Config:
    return config_module.load(ROOT / "configs/gpt-oss-120b-4x3090.yaml", overrides)


@pytest.mark.parametrize("degree", [1, 2, 4])
def test_two_layers_of_a_processs_experts_stay_on_the_device(degree):
    on_gpu, on_host = (
        training.finetune_memory(BIG, load(), held=Held(degree, where)) for where in ("gpu", "host")
    )
    found, parts = dict(on_host.components), on_gpu.components
    assert parts["experts"] == EXPERTS // degree
    assert found["experts"] == 0 and found["expert_buffers"] == EXPERTS // degree * 2 // 36
    moved = EMBEDDING if degree == 1 else 0  # a shared one stays
    tables = found.pop("page_tables")
    assert tables == (EXPERTS // degree + moved) * 8 // 4096
    rest = {name: size for name, size in found.items() if "expert" not in name}
    assert rest == {**{name: parts[name] for name in rest}, "embedding": parts["embedding"] - moved}
    saved = parts["experts"] - found["expert_buffers"] + moved - tables
    assert on_gpu.peak_bytes - on_host.peak_bytes == saved
    before, after = (
        stages.evaluation_memory(BIG, load(), "cuda", Held(degree, where))
        for where in ("gpu", "host")
    )
    assert after["experts"] == 0 and after["expert_buffers"] == found["expert_buffers"]
    assert after["page_tables"] == tables
    assert before["base_rest"] - after["base_rest"] == moved


def test_on_a_cpu_the_buffers_come_on_top():
    config = config_module.load(ROOT / "configs/tiny.yaml")
    shape = memory.find_shape(config.model)
    plain, host = (
        training.finetune_memory(shape, config, "cpu", held=Held(1, where)).components
        for where in ("gpu", "host")
    )
    assert host == {**plain, "expert_buffers": plain["experts"] * 2 // shape.layers}


@pytest.mark.parametrize(
    ("overrides", "processes", "gib", "host_gib", "chosen"),
    [
        ((), 4, 80, 500, (1, "gpu")),
        ((), 4, 23.6, 500, (4, "gpu")),
        ((), 4, 12, 500, (4, "host")),
        ((), 1, 23.6, 500, (1, "host")),
        ((), 1, 23.6, None, (1, "host")),
        ((), 1, 23.6, 40, (1, "gpu")),  # refused: nothing fits
        ((), 3, 23.6, 500, (1, "host")),  # three cannot share 128 experts: three copies
        ((), 3, 23.6, 100, (1, "gpu")),
        (("expert_parallel_degree=2",), 4, 23.6, 500, (2, "host")),
        (("expert_parallel_degree=1",), 4, 23.6, 500, (1, "host")),
        (("experts.placement=gpu",), 1, 23.6, 500, (1, "gpu")),
        ((HOST,), 4, 80, 500, (4, "host")),
        ((HOST, "expert_parallel_degree=1"), 4, 80, 500, (1, "host")),
        ((HOST,), 1, 80, 10, (1, "host")),  # refused
    ],
)
def test_the_fastest_way_that_fits_is_chosen(overrides, processes, gib, host_gib, chosen):
    host = None if host_gib is None else host_gib * GIB
    given = (BIG, load(*overrides), processes, int(gib * GIB), "cuda", host)
    assert placing.decide_held(*given) == chosen


def test_host_memory_is_taken_just_below_the_margin_of_the_gpu():
    config = load(ONE, *WHOLE)
    needed = int(training.finetune_memory(BIG, config).peak_bytes * placing.MARGIN)
    assert placing.decide_held(BIG, config, 1, needed + 1) == (1, "gpu")
    assert placing.decide_held(BIG, config, 1, needed - 2) == (1, "host")
    needed = int(sum(stages.evaluation_memory(BIG, config, "cuda").values()) * placing.MARGIN)
    assert placing.decide_evaluation_held(BIG, config, 1, needed + 1) == (1, "gpu")
    assert placing.decide_evaluation_held(BIG, config, 1, needed - 2) == (1, "host")


def test_what_barely_exceeds_the_gpu_stays_there_if_host_memory_does_not_fit_either():
    config = load(ONE, *WHOLE)
    peak = training.finetune_memory(BIG, config).peak_bytes
    given = (BIG, config, 1, int(peak * 0.98), "cuda", 10 * GIB)
    assert placing.decide_held(*given) == (1, "gpu")
    fit.check_fit(*given)


@pytest.mark.parametrize("processes", [1, 4])
def test_host_memory_that_does_not_suffice_is_refused_with_both_figures(processes):
    config = load(HOST, f"sequence_parallel_degree={processes}", "expert_parallel_degree=1")
    needed = processes * (EXPERTS + EMBEDDING + 2 * GIB)
    assert placing.host_bytes(BIG, config, Held(1, "host"), processes) == needed
    fit.check_fit(BIG, config, processes, CARD, "cuda", needed)
    with pytest.raises(StageError, match="host memory does not hold the experts") as refused:
        fit.check_fit(BIG, config, processes, CARD, "cuda", needed - GIB)
    assert format_bytes(needed) in refused.value.expected
    assert f"{format_bytes(needed - GIB)}: 1.00 GiB short" in refused.value.found
    assert ("expert_parallel_degree=4" in refused.value.fix) == (processes == 4)


def test_if_neither_place_suffices_the_refusal_says_both():
    with pytest.raises(StageError, match="does not fit in memory") as refused:
        fit.check_fit(BIG, load(ONE), 1, CARD, "cuda", 30 * GIB)
    assert "GiB short; with the experts in host memory 59.81 GiB" in refused.value.found
    assert refused.value.found.endswith("available 30.00 GiB")
    assert "experts.placement" not in refused.value.fix


def test_host_memory_stays_within_the_experts_and_6_gib():
    held = Held(1, "host")
    assert placing.host_bytes(BIG, load(ONE), held, 1) <= EXPERTS + 6 * GIB
    offloaded = load(ONE, "training.offload_checkpoints=true")
    more = 36 * 16384 * 2880 * 2
    found = placing.host_bytes(BIG, offloaded, held, 1)
    assert found == placing.host_bytes(BIG, load(ONE), held, 1) + more


def test_a_step_takes_as_long_as_its_copies():
    config, rate = load(ONE, "sequence_len=512"), timing.find_rate("RTX 3090")
    disk, tokens = storage.disk_bytes(BIG, config), 10 * 512
    on_gpu, on_host = (
        timing.stage_seconds(BIG, config, rate, disk, tokens, held=Held(1, where))["03_finetune"]
        for where in ("gpu", "host")
    )
    fixed = rate.startup.finetune + disk["base"] / timing.CACHED_BYTES_PER_SECOND
    assert on_host - fixed == pytest.approx(10 * 2 * EXPERTS / timing.COPIED_BYTES_PER_SECOND)
    assert on_host > on_gpu


def test_plan_and_health_show_the_column_and_the_choice(tmp_path):
    config = load(ONE)
    document = memory.plan_stage(config, tmp_path, "03_finetune")
    assert document["expert_placement"] == "host" and document["peak_bytes_per_gpu"] < CARD
    assert document["peak_bytes_per_gpu"] == document["hosted_peak_bytes_per_gpu"]
    assert document["expert_host_bytes"] == EXPERTS + EMBEDDING + 2 * GIB
    text = memory.show_plan(document)
    assert "replicated  host memory" in text and "two layers of experts" in text
    joined = " ".join(text.split())
    assert (
        "replicated, experts in host memory (59.81 GiB there) (auto: the experts do not" in joined
    )
    assert "The experts are in host memory" in joined and "does not fit a card" not in joined

    rich = machine([gpu()], host_available_bytes=100 * GIB)
    rows = judge(config, rich)
    assert {row.check for row in rows.values() if row.status == "fail"} == set()
    assert rows["expert placement"].found.startswith("in host memory in stage 03 and 04, 59.81 GiB")
    plan = plan_for(config, rich)
    shown = report.plan_text(report.build(config, rich, plan, list(rows.values())))
    assert "host memory" in shown and "experts in host memory" in shown

    poor = judge(load(ONE, HOST), machine([gpu()], host_available_bytes=50 * GIB))["host memory"]
    assert poor.status == "fail" and "needs 59.81 GiB of 50.00 GiB" in poor.found
    assert "most of it for the experts" in poor.found
    both = judge(config, machine([gpu()], host_available_bytes=50 * GIB))["GPU memory"]
    assert both.status == "fail"
    assert judge(load(), FOUR_3090)["expert placement"].found == "on the device"
