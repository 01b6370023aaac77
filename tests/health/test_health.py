"""The health check's verdicts on simulated machines, and its report."""

import dataclasses
import json
from pathlib import Path

import pytest

from sparselong import memory
from sparselong.health import report
from sparselong.health.check import check
from sparselong.health.machine import Disk, Torch
from sparselong.health.packages import Package
from sparselong.health.rows import Row
from sparselong.health.sources import Source
from sparselong.health.stage import plan_for
from sparselong.kernels.attention import choice
from tests.health.machines import (
    ALONE,
    BIG,
    FOUR_3090,
    GIB,
    H200,
    NONE,
    SMALL,
    TINY,
    failures,
    gpu,
    judge,
    load,
    machine,
)

WHOLE = ("training.slice_rows=never", "training.offload_checkpoints=false")


def test_tiny_runs_without_a_gpu():
    rows = judge(TINY, NONE)
    assert failures(TINY, NONE) == set()
    assert "eager" in rows["attention kernel"].found
    assert rows["expert kernel"].found == "torch, decoded expert by expert"


@pytest.mark.parametrize(
    ("overrides", "facts", "found"),
    [
        ([], H200, "Triton, decode (not timed above 512 rows"),
        (["sequence_len=4096"], H200, "Triton, packed (H200, 128 rows per expert"),
        (["sequence_len=4096"], FOUR_3090, "Triton, packed (not timed on this architecture)"),
        ([], NONE, "torch, decoded expert by expert"),
    ],
)
def test_the_expert_backend_matches_stage_03(overrides, facts, found):
    """On a GPU the measured table decides by the micro-batch's number of routed tokens."""
    config = load("gpt-oss-20b-1x3090", *overrides)
    assert judge(config, facts)["expert kernel"].found.startswith(found)


def test_the_expert_row_counts_the_tokens_of_one_rank():
    """A quarter of 16,384 tokens gives each of 32 experts 512 rows."""
    shared = load("gpt-oss-20b-1x3090", "sequence_parallel_degree=4")
    assert judge(shared, FOUR_3090)["expert kernel"].found.startswith("Triton, packed")


def test_120b_without_a_gpu_says_what_is_missing():
    rows = judge(BIG, NONE)
    assert failures(BIG, NONE) == {"CUDA driver", "GPU", "sequence parallel", "attention kernel"}
    found = rows["GPU"].found
    plan = memory.make_plan(BIG)
    each, whole = plan.memory.peak_bytes / GIB, plan.replicated.peak_bytes / GIB
    assert f"4 GPUs (compute capability 8.0 or newer) with {each:.2f} GiB free on each" in found
    assert f"sharded over them (replicated: {whole:.2f} GiB)" in found


def test_20b_without_a_gpu_fails_even_with_eager_attention():
    eager = load("gpt-oss-20b-1x3090", "flash_attention=false")
    assert {"CUDA driver", "GPU"} <= failures(eager, NONE)


def test_120b_on_four_3090_shares_sequence_experts_and_vocabulary():
    rows = judge(BIG, FOUR_3090)
    assert failures(BIG, FOUR_3090) == set()
    assert "4 GPUs share each sequence" in rows["sequence parallel"].found
    assert rows["expert parallel"].found.startswith("4 processes share experts and vocabulary")
    assert "does not fit with a margin" in rows["expert parallel"].found
    assert rows["collectives"].found.endswith("nccl in use")
    assert rows["peer access"].status == "ok"
    assert {f"GPU {index}" for index in range(4)} <= set(rows)
    plan = plan_for(BIG, FOUR_3090)
    assert plan.held == plan.evaluation_held == (4, "gpu")
    text = report.plan_text(report.build(BIG, FOUR_3090, plan, list(rows.values())))
    assert (
        "replicated      sharded  host memory" in text
        and "Chosen for experts and vocabulary: sharded" in text
    )


def test_120b_replicated_on_four_3090_says_what_is_missing_and_that_sharding_fits():
    whole = load("gpt-oss-120b-4x3090", "expert_parallel_degree=1", "experts.placement=gpu")
    row = judge(whole, FOUR_3090)["GPU memory"]
    assert row.status == "fail" and "GiB short" in row.found
    assert "with experts and vocabulary sharded" in row.found


def test_experts_that_fit_are_not_shared():
    four = load("gpt-oss-20b-1x3090", "sequence_parallel_degree=4")
    row = judge(four, FOUR_3090)["expert parallel"]
    assert row.status == "ok" and row.found.startswith("off: each process holds all experts")
    assert failures(four, FOUR_3090) == set()


def test_a_number_of_sharing_processes_is_checked_against_gpus_and_launcher():
    two = load("gpt-oss-120b-4x3090", "expert_parallel_degree=2")
    assert failures(two, FOUR_3090) == {"GPU memory"}
    few = judge(load("gpt-oss-20b-1x3090", "expert_parallel_degree=4"), machine([gpu()]))
    assert few["expert parallel"].status == "fail"
    assert "here: 1 usable GPU" in few["expert parallel"].found
    row = judge(load("gpt-oss-20b-1x3090", "expert_parallel_degree=4"), FOUR_3090)
    assert row["expert parallel"].status == "warn"
    assert row["expert parallel"].fix == "torchrun --nproc_per_node=4 03_finetune.py"
    bare = dataclasses.replace(FOUR_3090, torch=Torch("2.13.0", "13.0", 4, False, True))
    shared = load("gpt-oss-20b-1x3090", "expert_parallel_degree=4")
    assert judge(shared, bare)["collectives"].status == "fail"


def test_a_split_sequence_is_checked_against_gpus_heads_and_collectives():
    three = machine(gpu(index) for index in range(3))
    small = load("gpt-oss-20b-1x3090", "sequence_parallel_degree=4")
    for config, fewer_fit in ((BIG, False), (small, True)):  # 128 experts are not shared by three
        row = judge(config, three)["sequence parallel"]
        assert row.status == "fail" and "here: 3 usable GPUs" in row.found
        assert "a machine with 4 GPUs" in row.fix
        assert ("sequence_parallel_degree=3" in row.fix) == fewer_fit
    stride = judge(load("gpt-oss-120b-4x3090", "heads_k_stride=3"), FOUR_3090)["sequence parallel"]
    assert stride.status == "fail" and "8 KV heads" in stride.found
    split = load("tiny", "sequence_parallel_degree=4")
    assert judge(split, NONE)["sequence parallel"].status == "ok"
    assert judge(split, NONE)["collectives"].found.endswith("gloo in use")
    few = judge(split, dataclasses.replace(NONE, cores=3))["sequence parallel"]
    assert few.status == "fail" and "too few cores for 4 processes" in few.found
    assert "(3)" in few.found and "sequence_parallel_degree=3 or less" in few.fix
    bare = dataclasses.replace(FOUR_3090, torch=Torch("2.13.0", "13.0", 4, False, True))
    assert judge(BIG, bare)["collectives"].status == "fail"


def test_120b_on_an_h200_runs_alone():
    alone = load("gpt-oss-120b-4x3090", ALONE)
    assert failures(alone, H200) == set()
    rows = judge(alone, H200)
    kernels = rows["attention kernel"].found
    assert "full layers: triton (H200" in kernels and "window layers: triton (H200" in kernels
    assert plan_for(alone, H200).rate.flops_per_second == 990e12


def test_20b_fits_one_3090_at_its_own_length():
    assert failures(SMALL, machine([gpu()])) == set()


def test_a_smaller_gpu_gets_the_longest_sequence_that_fits():
    card, batch = gpu(gib=17.5, free=17.5), ("evaluation.batch_size=2", *WHOLE)
    poor = machine([card], host_available_bytes=9 * GIB)  # too little for the experts
    row = judge(load("gpt-oss-20b-1x3090", *batch), poor)["GPU memory"]
    assert row.status == "fail" and "short" in row.found
    assert "training.offload_checkpoints=auto saves" in row.fix
    longest = int(row.fix.split("sequence_len=")[1].split()[0])
    fitting = load("gpt-oss-20b-1x3090", *batch, f"sequence_len={longest}")
    assert failures(fitting, poor) == set()
    longer = load("gpt-oss-20b-1x3090", *batch, f"sequence_len={longest + 128}")
    assert failures(longer, poor) == {"GPU memory"}


def test_a_busy_gpu_is_distinguished_from_a_small_one():
    alone = load("gpt-oss-120b-4x3090", ALONE)
    row = judge(alone, machine([gpu(0, "NVIDIA H200", 140.0, 12.0, (9, 0))]))["GPU memory"]
    assert row.status == "fail" and "stop the other programs" in row.fix


def test_an_old_gpu_driver_or_cpu_build_of_torch_fails():
    old = machine([gpu(0, "Tesla V100", 200.0, 200.0, (7, 0))])
    assert failures(SMALL, old) == {"GPU 0"}
    roomy = [gpu(0, "NVIDIA H200", 140.0, 139.0, (9, 0))]
    assert failures(SMALL, machine(roomy, driver="535.104.05")) == {"CUDA driver"}
    cuda12 = Torch("2.13.0", "12.6", 1, True, True)
    assert failures(SMALL, machine(roomy, driver="535.104.05", torch=cuda12)) == set()
    cpu_build = machine(roomy, torch=Torch("2.13.0+cpu", None, 0, False, True))
    assert failures(SMALL, cpu_build) == {"CUDA driver", "GPU memory", "attention kernel"}
    assert judge(SMALL, cpu_build)["GPU 0"].status == "warn"
    assert failures(TINY, cpu_build) == set()


def test_missing_peer_access_and_nccl_are_warnings():
    cut = Torch("2.13.0", "13.0", 2, False, True, ((0, 1), (1, 0)))
    rows = judge(TINY, machine([gpu(0), gpu(1)], torch=cut))
    assert rows["peer access"].status == rows["collectives"].status == "warn"
    assert "0-1" in rows["peer access"].found


def test_a_named_attention_backend_is_shown_or_refused(monkeypatch):
    monkeypatch.setattr(choice, "refuse_flash_attn_4", lambda: "not installed")

    def row(*overrides: str, **facts) -> Row:
        alone = load("gpt-oss-120b-4x3090", ALONE, *overrides)
        return judge(alone, dataclasses.replace(H200, **facts))["attention kernel"]

    assert row("attention_backend=torch_flash").found.startswith("full and window layers: torch_f")
    unpacked = row("training.sample_packing=false")
    assert "full layers: torch_cudnn" in unpacked.found and "determin" not in unpacked.found
    with monkeypatch.context() as patch:
        patch.setattr(choice, "refuse_flash_attn_4", lambda: None)
        assert "full layers: flash_attn_4" in row("training.sample_packing=false").found
    repeats = row("training.sample_packing=false", "deterministic=true")
    assert "full layers: triton" in repeats.found and repeats.found.endswith("; deterministic")
    missing = row("attention_backend=flash_attn")
    assert missing.status == "fail" and "flash_attn, but that package is not" in missing.found
    assert row("attention_backend=flash_attn", flash_attn=True).status == "ok"
    missing = row("attention_backend=flash_attn_4")
    assert missing.status == "fail" and "--with-flash-attn-4" in missing.fix
    assert row("attention_backend=flash_attn_4", flash_attn_4=True).status == "ok"
    other = row("attention_backend=flash_attn_4", flash_attn_4=True, gpus=(gpu(0),))
    assert other.status == "fail" and "needs compute capability 9.0, GPU 0 has 8.6" in other.found


def test_flash_attention_needs_a_gpu():
    row = judge(load("tiny", "flash_attention=true"), NONE)["attention kernel"]
    assert row.status == "fail" and "flash_attention=false" in row.fix


def test_the_8_bit_optimizer_needs_a_gpu():
    eight = load("tiny", "training.optimizer=adamw_bnb_8bit")
    assert failures(eight, NONE) == {"optimizer"}
    assert failures(eight, H200) == set()


def test_python_and_packages():
    assert failures(TINY, dataclasses.replace(NONE, python=(3, 10, 1))) == {"python"}
    other = (Package("peft", "0.20.0", "0.21.0"),)
    lacking = (Package("axolotl", "0.19.0", None), Package("art", "6.5", None))
    assert failures(TINY, dataclasses.replace(NONE, packages=other)) == {"package versions"}
    assert failures(TINY, dataclasses.replace(NONE, packages=lacking[1:])) == {"packages"}
    own = dataclasses.replace(NONE, own_python=True, packages=(*other, lacking[1]))
    assert failures(TINY, own) == set()
    assert {judge(TINY, own)[name].status for name in ("packages", "package versions")} == {"warn"}
    own = dataclasses.replace(NONE, own_python=True, packages=lacking)
    assert failures(TINY, own) == {"packages"}
    broken = dataclasses.replace(NONE, torch=Torch(error="libc10.so: cannot open"))
    assert failures(TINY, broken) == {"torch"}
    assert judge(TINY, dataclasses.replace(NONE, packages=()))["packages"].status == "warn"


def test_disk_counts_links_only_if_they_are_possible():
    alone = load("gpt-oss-120b-4x3090", ALONE)

    def disk(free_gib, hub_device=1, state="here", hub_free=900):
        base = Source("base model", "openai/gpt-oss-120b", state, "")
        facts = dataclasses.replace(
            H200,
            run_disk=Disk(Path("/run"), int(free_gib * GIB), 1),
            hub_disk=Disk(Path("/hub"), hub_free * GIB, hub_device),
            base=base,
        )
        return judge(alone, facts)

    assert disk(130)["disk"].status == "ok"
    assert disk(12)["disk"].status == "warn"
    assert disk(3)["disk"].status == "fail" and "short" in disk(3)["disk"].found
    assert disk(12, hub_device=2)["disk"].status == "fail"
    assert disk(130, state="reachable")["disk"].status == "warn"
    assert disk(200, state="reachable")["disk"].status == "ok"
    apart = disk(130, hub_device=2, state="reachable", hub_free=20)
    assert apart["disk"].status == "ok" and apart["disk for the base"].status == "fail"


def test_existing_files_of_the_run_need_no_more_space():
    full = dataclasses.replace(NONE, run_disk=Disk(Path("/"), 1024, 1))
    assert failures(TINY, full) == {"disk"}
    assert failures(TINY, dataclasses.replace(full, run_dir_bytes=GIB)) == set()


def test_host_memory():
    poor = dataclasses.replace(NONE, host_available_bytes=GIB // 2)
    assert failures(TINY, poor) == {"host memory"}


def test_sources_and_licence():
    def rows(base: Source, data: Source):
        return judge(TINY, dataclasses.replace(NONE, base=base, data=(data,)))

    here = Source("training data", "demo", "made", "")
    gated = Source("base model", "some/model", "reachable", "", gated=True)
    assert rows(gated, here)["licence"].status == "fail"
    known = dataclasses.replace(gated, account="me")
    assert rows(known, here)["licence"].status == "ok"
    missing = dataclasses.replace(gated, state="missing", gated=False)
    assert rows(missing, here)["base model"].status == "fail"
    lost = Source("training data", "x.jsonl", "missing", "there is no file x.jsonl")
    row = rows(known, lost)["training data"]
    assert row.status == "fail" and "data.train" in row.fix
    task = Source("evaluation task arc", "arc", "unknown", "")
    assert rows(known, task)["evaluation task arc"].status == "warn"


def test_trackers_that_are_asked_for_must_be_installed():
    asked = ("training.trackio_project=a", "training.use_tensorboard=true")
    config, row = load("tiny", *asked), "training.trackio_project"
    assert failures(config, NONE) == set()
    assert judge(config, NONE)["training.use_tensorboard"].found == "tensorboard installed"
    without = dataclasses.replace(NONE, missing=("gradio",))
    assert failures(config, without) == {row}
    assert judge(config, without)[row].found == "missing: gradio"
    assert judge(config, without)[row].fix.endswith(" gradio")
    assert failures(TINY, without) == set()


def test_report_is_json_and_fits_its_width():
    config = load("gpt-oss-120b-4x3090", "expert_parallel_degree=1")
    plan = plan_for(config, FOUR_3090)
    rows = check(config, FOUR_3090, plan)
    document = report.build(config, FOUR_3090, plan, rows)
    assert json.loads(json.dumps(document))["ready"] is False
    text = f"{report.rows_text(document)}\n{report.plan_text(document)}"
    assert max(map(len, text.splitlines())) <= 100
    assert "cannot run" in report.verdict(document)
    assert report.markdown(document).count("| fail |") == 1


def test_a_terminal_gets_the_same_text_in_colour(capsys, monkeypatch):
    rows = [Row("disk", "fail", "needs [1 GiB]", "free some"), Row("GPU", "ok", "x")]
    document = report.build(TINY, NONE, plan_for(TINY, NONE), rows)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    report.print_table(document)
    text = capsys.readouterr().err
    assert "needs [1 GiB]" in text and "free some" in text and "\x1b[1;31mfail" in text
