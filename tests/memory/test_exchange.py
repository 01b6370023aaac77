"""Experts and vocabulary shared by processes: memory, choice, refusals, time, host memory."""

import pytest

from sparselong import memory
from sparselong.config import Config
from sparselong.config import schema as config_module
from sparselong.errors import StageError
from sparselong.figures import format_bytes
from sparselong.memory import exchange, fit, placing, stages, storage, timing, training
from sparselong.memory.shape import ModelShape
from tests.conftest import ROOT

GIB = 2**30
BIG, SMALL = (memory.PUBLISHED[f"openai/gpt-oss-{size}"] for size in ("120b", "20b"))
CARD = fit.CARD_BYTES
EXPERT_LORA = ("lora.expert_targets=[gate_up_proj, down_proj]", "lora.expert_r=8")
SMALL_ADAPTERS = ("lora.expert_dtype=bfloat16", "training.optimizer=adamw_bnb_8bit")


WHOLE = {"training.slice_rows": "never", "training.offload_checkpoints": "false"}


def load(*overrides: str) -> Config:
    """Return a config of 120b: experts and whole layers on the GPU unless overrides say else."""
    given = {"experts.placement": "gpu", **WHOLE}
    given |= dict(each.split("=", 1) for each in overrides)
    text = [f"{key}={value}" for key, value in given.items()]
    return config_module.load(ROOT / "configs/gpt-oss-120b-4x3090.yaml", text)


def parts(shape: ModelShape, degree: int, *overrides: str) -> dict[str, int]:
    made = training.finetune_memory(shape, load(*overrides), held=memory.Held(degree))
    return made.components


@pytest.mark.parametrize("shape", [BIG, SMALL], ids=["120b", "20b"])
@pytest.mark.parametrize("degree", [1, 2, 4])
def test_weights_are_exact(shape, degree):
    """4.25 bits an expert weight, 2 bytes of everything else; only these are divided."""
    found = parts(shape, degree)
    layers, experts = shape.layers, shape.experts // degree
    assert found["experts"] == layers * experts * 3 * 2880 * 2880 * 17 // 32
    rows = {1: 201_088, 2: 100_544, 4: 50_272}[degree]
    assert found["embedding"] == 2 * rows * 2880 * 2
    own_biases = layers * experts * 3 * 2880
    whole = shape.attention_biases + shape.sinks + shape.router + shape.norms
    assert found["small"] == 2 * (own_biases + whole)
    alone = parts(shape, 1)
    for name in ("projections", "masters", "lora", "checkpoints", "context", "workspaces"):
        assert found[name] == alone[name], name


def test_a_vocabulary_that_does_not_divide_is_rounded_up():
    assert exchange.vocabulary_rows(BIG, 3) == 67_030
    assert parts(BIG, 3)["embedding"] == 2 * 67_030 * 2880 * 2


@pytest.mark.parametrize(
    ("size", "degree", "gib"),
    [
        ("120b", 1, 56.73),
        ("120b", 2, 28.37),
        ("120b", 4, 14.18),
        ("20b", 1, 9.46),
        ("20b", 4, 2.36),
    ],
)
def test_experts_in_gib(size, degree, gib):
    shape = memory.PUBLISHED[f"openai/gpt-oss-{size}"]
    assert parts(shape, degree)["experts"] / GIB == pytest.approx(gib, abs=0.005)


def test_120b_on_four_cards():
    """16.55 GiB with bf16 attention, 0.79 GiB of checkpoints, 0.18 of LoRA; it fits 23.6 GiB.

    There is room to keep the outputs of full attention: 18 layers, 4,096 tokens a process.
    """
    made = placing.decided_memory(BIG, load(), CARD, held=memory.Held(4))
    found = made.components
    weights = found["experts"] + found["embedding"] + found["small"] + 2 * BIG.attention_weights
    assert weights / GIB == pytest.approx(16.55, abs=0.01)
    assert found["checkpoints"] / GIB == pytest.approx(0.79, abs=0.005)
    assert found["lora"] / GIB == pytest.approx(0.18, abs=0.005)
    assert made.devices == 4 and found["kept_attention"] == 18 * 4096 * (2 * 4096 + 4 * 64)
    assert made.peak_bytes / GIB == pytest.approx(21.8, abs=0.05), "README says so"


@pytest.mark.parametrize("shape", [BIG, SMALL], ids=["120b", "20b"])
@pytest.mark.parametrize("overrides", [(), EXPERT_LORA, (*EXPERT_LORA, *SMALL_ADAPTERS)])
def test_more_processes_take_less_memory_each(shape, overrides):
    peaks = [
        training.finetune_memory(shape, load(*overrides), held=memory.Held(degree)).peak_bytes
        for degree in (1, 2, 4)
    ]
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == 3


def test_adapters_of_experts_are_divided_and_those_of_projections_whole():
    dense = storage.lora_parameters(BIG, load())
    experts = storage.expert_lora_parameters(BIG, load(*EXPERT_LORA))
    assert experts == 530_841_600
    assert parts(BIG, 4, *EXPERT_LORA)["lora"] == dense * 16 + experts // 4 * 16
    small = parts(BIG, 4, *EXPERT_LORA, *SMALL_ADAPTERS)["lora"]
    assert small == dense * (4 + 4 + 2) + experts // 4 * (2 + 2 + 2)
    # The expert adapters alone: 2.0 GiB with fp32 AdamW, 0.74 with bfloat16 and 8-bit states.
    assert experts // 4 * 16 / GIB == pytest.approx(1.98, abs=0.005)
    assert experts // 4 * 6 / GIB == pytest.approx(0.74, abs=0.005)
    half = load(*EXPERT_LORA, "lora.expert_dtype=bfloat16")
    assert storage.adapter_bytes(BIG, half) == dense * 4 + experts * 2
    assert storage.checkpoint_bytes(BIG, half) - storage.checkpoint_bytes(BIG, load()) == (
        experts * (2 + 4)
    )


def test_rows_that_pass_through_the_experts_are_bounded():
    """Longer sequences make more chunks, not larger ones; only their routing grows."""
    for short, long in ((49_152, 65_536), (65_536, 131_072)):
        less, more = (parts(BIG, 4, f"sequence_len={tokens}") for tokens in (short, long))
        routing = (long - short) * 4 * exchange.ROUTING_BYTES
        assert more["experts_work"] - less["experts_work"] == routing
    assert exchange.window_rows(BIG, 4096, 4) == exchange.WINDOW_ROWS
    assert exchange.window_rows(BIG, 4096, 8) == exchange.WINDOW_ROWS
    assert exchange.window_rows(BIG, 1024, 4) == 4 * 1024 * 4 < exchange.WINDOW_ROWS
    assert exchange.window_rows(BIG, 100, 2) == 2 * 100 * 4


def test_kept_experts_are_not_available():
    kept = training.Kept(True, BIG.layers)
    shared = training.finetune_memory(BIG, load(), held=memory.Held(4), kept=kept)
    assert shared.components["kept_experts"] == 0 < shared.components["kept_attention"]
    assert placing.decide_kept(SMALL, load(), 100 * GIB, held=memory.Held(4)) == (True, False)


@pytest.mark.parametrize(
    ("overrides", "processes", "budget", "degree"),
    [
        ((), 4, CARD, 4),
        ((), 8, CARD, 8),
        ((), 6, CARD, 2),  # of 6 processes, 2 can share 128 experts evenly
        ((), 3, CARD, 1),
        ((), 1, CARD, 1),
        ((), 4, 80 * GIB, 1),
        (("expert_parallel_degree=2",), 4, 80 * GIB, 2),
        (("expert_parallel_degree=1",), 4, CARD, 1),
        (("training.keep_experts=always",), 4, CARD, 1),
    ],
)
def test_the_degree_is_the_fastest_that_fits(overrides, processes, budget, degree):
    config = load(*overrides)
    assert placing.decide_held(BIG, config, processes, budget) == (degree, "gpu")


def test_auto_shares_just_below_the_peak_with_its_margin():
    config = load("training.keep_attention=never", "training.keep_experts=never")
    needed = int(training.finetune_memory(BIG, config).peak_bytes * placing.MARGIN)
    assert placing.decide_held(BIG, config, 4, needed + 1).expert_parallel == 1
    assert placing.decide_held(BIG, config, 4, needed - 2).expert_parallel == 4
    needed = int(sum(stages.evaluation_memory(BIG, config, "cuda").values()) * placing.MARGIN)
    assert placing.decide_evaluation_held(BIG, config, 4, needed + 1).expert_parallel == 1
    assert placing.decide_evaluation_held(BIG, config, 4, needed - 2).expert_parallel == 4


@pytest.mark.parametrize("degree", [2, 4, 8])
@pytest.mark.parametrize("shape", [BIG, SMALL], ids=["120b", "20b"])
def test_evaluation_takes_no_more_than_training(shape, degree):
    trained = training.finetune_memory(shape, load(), held=memory.Held(degree)).peak_bytes
    found = sum(stages.evaluation_memory(shape, load(), "cuda", memory.Held(degree)).values())
    assert found <= trained


@pytest.mark.parametrize(
    ("overrides", "processes", "helps"),
    [
        (("expert_parallel_degree=1",), 4, "expert_parallel_degree=4 saves"),
        (("sequence_parallel_degree=1",), 1, "sequence_parallel_degree=4 on 4 GPUs saves"),
        (("sequence_parallel_degree=2",), 2, "sequence_parallel_degree=4 on 4 GPUs saves"),
        (("training.keep_experts=always",), 4, "training.keep_experts=auto saves"),
    ],
)
def test_what_cannot_fit_is_refused_with_the_missing_bytes_and_what_helps(
    overrides, processes, helps
):
    config = load(*overrides)
    with pytest.raises(StageError) as refused:
        fit.check_fit(BIG, config, processes, CARD)
    short = fit.least_peak_bytes(BIG, config, CARD) - CARD
    assert f"{format_bytes(short)} short" in refused.value.found
    assert "23.60 GiB on each GPU" in refused.value.expected
    told = refused.value.fix.split("; ")
    assert any(text.startswith(helps) and text.endswith(" fits") for text in told)
    for text in told:  # a change that claims to fit is not refused
        if text.endswith(" fits") and "all other" not in text:
            key = text.split()[0]
            kept = [each for each in overrides if each.split("=")[0] != key.split("=")[0]]
            changed = load(*kept, key)
            fit.check_fit(BIG, changed, placing.planned_processes(changed), CARD)


def test_what_may_fit_is_not_refused():
    config = load()
    fit.check_fit(BIG, config, 4, CARD)
    least = training.finetune_memory(BIG, config, held=memory.Held(4)).peak_bytes
    fit.check_fit(BIG, config, 4, int(least / placing.MARGIN) + 1)
    with pytest.raises(StageError, match="shared by 4 processes"):
        fit.check_fit(BIG, config, 4, int(least / placing.MARGIN) - 1)


def test_the_plan_shows_both_and_the_choice(tmp_path):
    document = memory.plan_stage(load(), tmp_path, "03_finetune")
    assert document["expert_parallel_degree"] == document["processes"] == 4
    assert document["peak_bytes_per_gpu"] == document["sharded_peak_bytes_per_gpu"]
    assert document["replicated_peak_bytes_per_gpu"] > 60 * GIB
    text = memory.show_plan(document)
    assert "replicated      sharded" in text
    assert "Chosen for experts and vocabulary: sharded over 4 processes (experts.place" in text
    alone = memory.plan_stage(load("expert_parallel_degree=1"), tmp_path, "01_health")
    assert alone["peak_bytes_per_gpu"] == alone["replicated_peak_bytes_per_gpu"]
    assert alone["sharded_peak_bytes_per_gpu"] == document["sharded_peak_bytes_per_gpu"]
    text = memory.show_plan(alone)
    assert "Chosen for experts and vocabulary: replicated (expert_parallel_degree: 1, exp" in text
    assert "does not fit a card" in text and "expert_parallel_degree=4 saves" in text


def test_the_plan_of_an_evaluation_shows_both_the_choice_and_what_is_missing(tmp_path):
    document = memory.plan_stage(load(), tmp_path, "04_eval")
    assert document["expert_parallel_degree"] == 4
    assert document["peak_bytes_per_gpu"] == document["sharded_peak_bytes_per_gpu"]
    text = memory.show_plan(document)
    assert "replicated      sharded" in text and "does not fit a card" not in text
    assert "Chosen for experts and vocabulary: sharded over 4 processes (experts.place" in text
    own = "expert_parallel_degree=1"
    alone = memory.plan_stage(load(own), tmp_path, "04_eval")
    peak = alone["peak_bytes_per_gpu"]
    assert peak == alone["replicated_peak_bytes_per_gpu"] > 60 * GIB
    assert alone["sharded_peak_bytes_per_gpu"] == document["sharded_peak_bytes_per_gpu"]
    text = " ".join(memory.show_plan(alone).split())
    assert "Chosen for experts and vocabulary: replicated (expert_parallel_degree: 1, " in text
    short = format_bytes(peak - fit.CARD_BYTES)
    assert f"does not fit a card with 23.60 GiB of usable memory: {short} short" in text
    assert "expert_parallel_degree=auto saves" in text
    text = memory.show_plan(
        memory.plan_stage(load(own, "sequence_parallel_degree=1"), tmp_path, "04_eval")
    )
    assert "sharded" not in text and "larger GPUs" in text
    hosted = memory.plan_stage(load("experts.placement=host"), tmp_path, "04_eval")
    assert hosted["peak_bytes_per_gpu"] == hosted["hosted_peak_bytes_per_gpu"] < 20 * GIB
    assert "experts in host memory" in memory.show_plan(hosted)


@pytest.mark.parametrize(
    ("overrides", "degree", "reason"),
    [
        (("sequence_parallel_degree=1",), 1, "one process"),
        (("sequence_parallel_degree=3",), 1, "3 processes cannot share the experts"),
        (("training.keep_experts=always",), 1, "training.keep_experts"),
        (("expert_parallel_degree=2",), 2, "expert_parallel_degree: 2"),
        (("model.base=openai/gpt-oss-20b",), 1, "fits"),
        (("sequence_parallel_degree=1", "expert_parallel_degree=4"), 4, "degree: 4"),
    ],
)
def test_the_plan_says_why(overrides, degree, reason):
    config = load(*overrides)
    plan = memory.make_plan(config)
    assert plan.held == (degree, "gpu")
    assert plan.memory.devices == placing.planned_processes(config)
    assert reason in plan.held_reason


def test_a_dry_run_counts_experts_that_are_baked(tmp_path):
    """With adapters, all 60.9 GB of experts become new files; without, they can be links."""
    linked = memory.plan_stage(load(), tmp_path, "03_finetune")
    baked = memory.plan_stage(load(*EXPERT_LORA), tmp_path, "03_finetune")
    rows = {row["what"]: row["bytes"] for row in baked["writes"]}
    assert rows["fine-tuned model"] > 60_914_073_600
    notes = " ".join(baked["notes"])
    assert "all 56.73 GiB of them are written as new files" in notes and "hard-link" not in notes
    assert "58.99 GiB take no disk space" in " ".join(linked["notes"])


def test_host_memory_of_loading_is_planned():
    shared, alone = memory.make_plan(load()), memory.make_plan(load("expert_parallel_degree=1"))
    assert shared.host_bytes == max(4 * 4 * GIB, alone.host_bytes)
    assert shared.host_bytes > alone.host_bytes


def test_the_exchange_of_a_step_is_what_the_collectives_move():
    """Five exchanges of 70.8 MB in 36 layers at 4,096 tokens a GPU: at most 13 GB."""
    assert exchange.sent_bytes(BIG, 1) == 0
    step = 4096 * exchange.sent_bytes(BIG, 4)
    assert step == 36 * 5 * 3 * 4096 * 2880 * 2 <= 13e9


def test_time_counts_gpus_and_exchange():
    config, disk = load(), storage.disk_bytes(BIG, load())
    rate = timing.find_rate("RTX 3090")

    def train(gpus: int, shared: int) -> float:
        made = timing.stage_seconds(
            *(BIG, config, rate, disk, 10**7), gpus=gpus, held=memory.Held(shared)
        )
        fixed = rate.startup.finetune + disk["base"] / timing.CACHED_BYTES_PER_SECOND
        launches = 10**7 / config.sequence_len * 36 * timing.PASS_SECONDS
        return made["03_finetune"] - fixed - launches - timing.RANK_SECONDS * (gpus > 1)

    assert train(4, 1) == pytest.approx(train(1, 1) / 4)
    extra = 10**7 / 4 * exchange.sent_bytes(BIG, 4) / timing.EXCHANGED_BYTES_PER_SECOND
    extra += 10**7 / config.sequence_len * 36 * timing.EXCHANGE_SECONDS
    assert train(4, 4) - train(4, 1) == pytest.approx(extra)
