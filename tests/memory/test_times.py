"""Estimated seconds against measured ones, all from committed results; no figure is repeated here.

A case is a training step, or a whole stage. The newest result of each subject and machine counts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.compress_rate import CONFIGS, SUBJECTS
from benchmarks.record import newest
from benchmarks.true_widths import FEW
from sparselong.config.schema import Config, load
from sparselong.memory import PUBLISHED, Held, make_plan, placing, stages, storage, timing
from sparselong.memory.evaluated import answer_seconds
from sparselong.memory.shape import ModelShape, find_shape

ROOT = Path(__file__).resolve().parents[2]
BIG, SMALL = (PUBLISHED[f"openai/gpt-oss-{size}"] for size in ("120b", "20b"))
H200 = timing.find_rate("NVIDIA H200")
TOLERANCE = 0.3
Case = tuple[str, float, float]


def config_of(name: str, **keys: Any) -> Config:
    return load(ROOT / f"configs/{name}.yaml", [f"{key}={value}" for key, value in keys.items()])


def figures(subject: str, machine: str) -> Iterator[tuple[dict[str, Any], str, str, float]]:
    """Yield case, backend, metric and value of a committed result's rows."""
    for row in newest(subject)[machine]["rows"]:
        yield row["case"], row["backend"], row["metric"], row["value"]


def step(
    name: str, shape: ModelShape, case: dict[str, Any], held: Held, rate: timing.Rate
) -> float:
    length, batch = case["tokens"], case.get("batch", 1)
    config = config_of(name, sequence_len=length, micro_batch_size=batch)
    gpus = case.get("gpus", 1)
    return timing.training_seconds(shape, config, rate, length * batch, gpus, held)


def step_cases() -> Iterator[Case]:
    for subject in ("train_step", "train_step_short", "train_step_capped"):
        for case, backend, metric, value in figures(subject, "h200"):
            if (backend, metric) == ("masked", "step_seconds"):
                predicted = step("gpt-oss-20b-1x3090", SMALL, case, Held(), H200)
                yield f"20b step, {case['tokens']} tokens", predicted, value
    for subject, machine in (("fit_120b", "h200x4"), ("fit_120b_host", "h200")):
        for case, _, metric, value in figures(subject, machine):
            if metric == "step_seconds" and case["arm"] == "masked":
                held = Held(case["gpus"], case.get("placement", "gpu"))
                slow = timing.EXCHANGED_BYTES_PER_SECOND
                rate = dataclasses.replace(
                    H200, **({} if case["peer"] else {"exchanged_bytes_per_second": slow})
                )
                predicted = step("gpt-oss-120b-4x3090", BIG, case, held, rate)
                label = f"120b step, {case['tokens']} tokens, {case['gpus']} GPUs"
                yield f"{label}, peer {case['peer']}", predicted, value


def stages_of(config: Config, shape: ModelShape, rate: timing.Rate, tokens: int, gpus: int):
    disk = storage.disk_bytes(shape, config)
    held = Held(gpus)
    return timing.stage_seconds(shape, config, rate, disk, tokens, gpus=gpus, held=held)


def demo_cases(machine: str, rate: timing.Rate) -> Iterator[Case]:
    """The demo's command is in the result, with the overrides in parentheses."""
    command = newest("demo")[machine]["command"]
    words = command.partition("(")[2].rstrip(")").split()
    config = load(ROOT / "configs/tiny.yaml", [word for word in words if "=" in word])
    found = {(c.get("stage"), metric): v for c, _, metric, v in figures("demo", machine)}
    tokens = int(found["01_health", "plan.training_tokens"])
    predicted = stages_of(config, find_shape(config.model), rate, tokens, 1)
    for name in ("02_compress", "03_finetune", "04_eval"):
        yield f"{name}, demo on {machine}", predicted[name], found[name, "seconds"]


def wide_cases() -> Iterator[Case]:
    for case, _, metric, value in figures("true_widths", "h200x4"):
        if metric != "seconds" or case["stage"] not in ("03_finetune", "04_eval"):
            continue
        overrides = {key: value for key, value in FEW.items() if key != "data.train"}
        config = config_of("gpt-oss-120b-4x3090", **overrides, sequence_len=8192)
        shape = dataclasses.replace(BIG, layers=case["layers"], full_layers=case["layers"] // 2)
        tokens, _ = timing.training_tokens(config, None)
        predicted = stages_of(config, shape, H200, tokens, case["processes"])
        label = f"{case['stage']}, 120b's widths, {case['processes']} processes"
        yield label, predicted[case["stage"]], value


def compress_cases() -> Iterator[Case]:
    """Stage 02 at true widths, as often as it was measured."""
    for subject in (SUBJECTS["20b"], SUBJECTS["120b"]):
        for machine, document in newest(subject).items():
            for row in document["rows"]:
                if row["metric"] == "seconds":
                    case = row["case"]
                    config = load(ROOT / CONFIGS[case["shape"]], [
                        f"calibration.samples={case['samples']}",
                        f"calibration.sequence_len={case['sequence_len']}",
                    ])  # fmt: skip
                    layers = {"layers": case["layers"], "full_layers": case["layers"] // 2}
                    base = {"120b": BIG, "20b": SMALL}[case["shape"]]
                    shape = dataclasses.replace(base, **layers)
                    gpu = document["machine"]["gpus"][0].split(",")[0]
                    predicted = stages_of(config, shape, timing.find_rate(gpu), 0, 1)
                    label = f"02_compress, {case['shape']}, {case['layers']} layers, {machine}"
                    yield label, predicted["02_compress"], row["value"]


def beyond(cases: list[Case]) -> list[str]:
    return [
        f"{label}: {predicted:.3g} s predicted, {value:.3g} s measured"
        for label, predicted, value in cases
        if not abs(predicted / value - 1) <= TOLERANCE
    ]


def test_training_steps_take_as_long_as_predicted() -> None:
    cases = list(step_cases())
    assert beyond(cases) == []
    assert len({label for label, _, _ in cases}) >= 10
    assert max(value for _, _, value in cases) > 10 * min(value for _, _, value in cases)


def test_stages_take_as_long_as_predicted() -> None:
    cases = [*demo_cases("h200", H200), *demo_cases("cpu2", timing.CPU)]
    cases += [*wide_cases(), *compress_cases()]
    assert beyond(cases) == []
    for stage, least in (("02_compress", 2), ("03_finetune", 3), ("04_eval", 4)):
        assert sum(label.startswith(stage) for label, _, _ in cases) >= least


def test_answers_are_generated_as_fast_as_measured() -> None:
    """The fixed questions' answers: 20b on an H200, with and without a CUDA graph."""
    throughput = {b: v for _, b, m, v in figures("generation", "h200") if m == "throughput"}
    asked = {"evaluation.health_prompts": 1, "evaluation.health_tokens": 500}
    config = config_of("gpt-oss-20b-1x3090", **asked)
    cases = [
        (f"{backend}, {gpus} GPUs", answer_seconds(SMALL, config, H200, gpus), 1500 / rate / gpus)
        for backend, gpus, rate in (
            ("graph", 1, throughput["graph"]),
            ("kernels", 2, throughput["kernels"]),
        )
    ]
    assert beyond(cases) == []
    hosted = answer_seconds(SMALL, config, H200, 1, Held(placement="host"))
    assert hosted > 100 * cases[0][1]  # every token copies all experts


def test_the_time_of_stage_04_has_its_answers() -> None:
    """An answer to 24 questions of up to 1,024 tokens by each of three models, on a CPU."""
    whole, none = (
        stages_of(
            config_of("tiny", **{"evaluation.health_prompts": n, "evaluation.health_tokens": 1024}),
            find_shape(config_of("tiny").model),
            timing.CPU,
            0,
            1,
        )["04_eval"]
        for n in (8, 0)
    )
    assert whole - none == pytest.approx(3 * 24 * 1024 * 4 * timing.CPU.decode_layer_seconds)


def test_wrong_rates_would_be_seen() -> None:
    """Half the efficiency, or exchanges for nothing, are beyond the tolerance."""
    slow = dataclasses.replace(H200, efficiency=H200.efficiency / 2)
    case = {"tokens": 16_384}
    ((_, _, measured), *_) = step_cases()
    predicted = step("gpt-oss-20b-1x3090", SMALL, case, Held(), slow)
    assert beyond([("slow", predicted, measured)])
    free = dataclasses.replace(H200, exchanged_bytes_per_second=1e15)
    predicted = step("gpt-oss-120b-4x3090", BIG, case | {"gpus": 4}, Held(4), free)
    apart = [
        v for label, _, v in step_cases() if label.endswith("16384 tokens, 4 GPUs, peer False")
    ]
    assert beyond([("free", predicted, apart[0])])


def test_stage_02_takes_the_slowest_part_of_its_stream() -> None:
    config = config_of("gpt-oss-120b-4x3090")
    layer = timing.layer_seconds(BIG, config, H200)
    slow_disk = dataclasses.replace(H200, disk_bytes_per_second=0.5e9)
    assert timing.layer_seconds(BIG, config, slow_disk) == pytest.approx(2 * layer, rel=0.2)
    few = config_of("gpt-oss-120b-4x3090", **{"calibration.samples": 8})
    read = stages.layer_bytes(BIG) / H200.disk_bytes_per_second
    assert timing.layer_seconds(BIG, few, H200) == read < layer
    old = timing.find_rate("RTX 3090")
    assert timing.layer_seconds(BIG, config, old) > 2 * layer  # it computes longer than it writes


def test_the_promised_times_of_stage_02_are_within_reach() -> None:
    """128 x 2,048 tokens on an H200: 20b in 90 s beside the disk's time, 120b in 4 minutes."""
    fast_disk = dataclasses.replace(H200, disk_bytes_per_second=1e12)
    for shape, name, rate, most in (
        (SMALL, "gpt-oss-20b-1x3090", fast_disk, 90.0),
        (BIG, "gpt-oss-120b-4x3090", H200, 240.0),
    ):
        config = config_of(name)
        assert config.calibration.samples * config.calibration.sequence_len == 262_144
        assert stages_of(config, shape, rate, 0, 1)["02_compress"] <= most


@pytest.mark.parametrize("name", ["gpt-oss-20b-1x3090", "gpt-oss-120b-4x3090"])
def test_the_promised_memory_of_stage_02_is_within_reach(name: str) -> None:
    planned = make_plan(config_of(name), "cuda", "NVIDIA H200")
    assert planned.stage_memory("02_compress")[1] <= 12 * 2**30
    assert sum(planned.compress_host.values()) + placing.PROCESS_BYTES <= 16 * 2**30


def test_the_solvers_rate_is_the_measured_one() -> None:
    found = newest("solver")["h200"]
    seconds = sum(
        row["value"]
        for row in found["rows"]
        if (row["backend"], row["metric"]) == ("sweep", "solve_seconds")
    )
    solved = sum(rows * inputs**2 for rows, inputs in BIG.projections.values())
    operations = seconds * H200.fp32_flops_per_second / solved
    assert timing.SOLVE_OPERATIONS == pytest.approx(operations, rel=0.1)


def test_the_rates_of_copies_and_of_opening_are_the_measured_ones() -> None:
    copied = 2 * storage.expert_bytes(BIG)
    for case, _, metric, value in figures("fit_120b_host", "h200"):
        if metric == "step_seconds" and case["tokens"] == 512:  # bound by the copies
            rate = copied / value
            assert timing.FAST_COPIED_BYTES_PER_SECOND == pytest.approx(rate, rel=0.1)
    found = {
        case["processes"]: value
        for case, _, metric, value in figures("true_widths", "h200x4")
        if metric == "seconds" and case["stage"] == "04_eval"
    }
    assert timing.RANK_SECONDS == pytest.approx(found[4] - found[1], rel=0.1)
