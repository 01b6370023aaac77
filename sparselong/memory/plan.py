"""The plan of a run: files read and written, memory, and time.

`make_plan` plans a whole config, `plan_stage` one stage for `--dry-run`. Neither inspects the GPU:
a plan is made for a kind of device (by default the one the config asks for), and 01_health.py
compares it with the machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sparselong.config import Config, describe_profile
from sparselong.figures import format_bytes
from sparselong.memory import evaluated, fit, placing, slicing, stages, storage, timing, training
from sparselong.memory.labels import label
from sparselong.memory.shape import ModelShape, describe_dropped, drop_experts, find_shape
from sparselong.memory.storage import Held
from sparselong.memory.training import Device, Memory
from sparselong.memory.ways import (
    Ways,
    describe_kept,
    describe_layers,
    expert_host_bytes,
    explain_layers,
    plan_ways,
)

CPU_PARAMETERS = 1_000_000_000
"""Models of at least this size are not fine-tuned on a CPU, where a step would take hours."""
_SHOWS_TRAINING = ("01_health", "03_finetune")
"""Stages whose plan shows stage 03's memory."""
_LOADING_BYTES = 4 * training.GIB
"""Most host memory of a process that reads its slices of the weights, page cache aside."""


@dataclass(frozen=True)
class Plan:
    """The planner's results for a config. Components are keyed as in LABELS.

    Attributes:
        shape: sizes of the base model.
        device: kind of device that the plan is for.
        rate: speed of the device, for the estimates in `seconds`.
        disk: bytes on disk by artifact.
        bits_per_weight: bits per weight of the compressed model, by group.
        compressed: bytes of the compressed model, by group.
        card_bytes: usable memory of the device.
        replicated: stage 03 with all experts and the whole vocabulary on each device.
        sharded: stage 03 on each device if processes share them: as many as
            `expert_parallel_degree` says, or as can; None if only one could.
        hosted: stage 03 on each device with the experts in host memory, shared by as many processes
            as can; None if the config does not allow it.
        held: how stage 03 holds experts and vocabulary.
        held_reason: why so.
        settled: the config with how stage 03's checkpointed layers compute (`placing.settle`).
        settled_reason: why so.
        evaluation_held: how stage 04 holds them.
        changes: changes that make stage 03 fit, the cheapest first; empty if it fits.
        stages: bytes of the other stages' working memory, by stage and component.
        expert_host_bytes: host memory of stage 03's or 04's processes if experts are there; else 0.
        compress_host: bytes that stage 02 keeps in host memory on any device.
        linkable: the part of `disk` that takes no space if shards can be hard links.
        tokens: number of tokens that stage 03 trains on.
        tokens_note: how `tokens` was determined.
        seconds: estimated time by stage.
        estimates: time and cost on each type of GPU that has a price, or on the planned one.
    """

    shape: ModelShape
    device: Device
    rate: timing.Rate
    disk: dict[str, int]
    bits_per_weight: dict[str, float]
    compressed: dict[str, int]
    card_bytes: int
    replicated: Memory
    sharded: Memory | None
    hosted: Memory | None
    held: Held
    held_reason: str
    settled: Config
    settled_reason: str
    evaluation_held: Held
    changes: list[str]
    stages: dict[str, dict[str, int]]
    expert_host_bytes: int
    compress_host: dict[str, int]
    linkable: dict[str, int]
    tokens: int
    tokens_note: str
    seconds: dict[str, float]
    estimates: list[timing.Estimate]

    @property
    def memory(self) -> Memory:
        """Stage 03 as it was chosen: replicated, sharded, or with its experts in host memory."""
        if self.held.placement == "host":
            assert self.hosted is not None
            return self.hosted
        return self.sharded if self.sharded and self.held.expert_parallel > 1 else self.replicated

    @property
    def host_bytes(self) -> int:
        """Host memory of the stage that needs most, in bytes; with a GPU often that is stage 02."""
        if self.device == "cpu":
            return max(self.stage_memory(name)[1] for name in ("03_finetune", *self.stages))
        shared = max(self.held.expert_parallel, self.evaluation_held.expert_parallel) > 1
        loading = self.memory.devices * _LOADING_BYTES if shared else placing.PROCESS_BYTES
        compress = _total(self.compress_host) + placing.PROCESS_BYTES
        return max(compress, self.input_host_bytes + loading, self.expert_host_bytes)

    @property
    def input_host_bytes(self) -> int:
        """Host memory of the inputs of stage 03's layers, of all processes, in bytes."""
        sequences = max(1, self.memory.devices // self.settled.sequence_parallel_degree)
        return sequences * slicing.host_input_bytes(self.shape, self.settled)

    def stage_memory(self, name: str) -> tuple[dict[str, int], int]:
        """Return the components of a stage's memory and their peak, in bytes."""
        if name == "03_finetune":
            return self.memory.components, self.memory.peak_bytes
        components = self.stages.get(name, {})
        return components, _total(components)

    def columns(self) -> dict[str, Any]:
        """Return stage 03's memory, held in each way, and which was chosen, as JSON."""
        ways = {"replicated": self.replicated, "sharded": self.sharded, "hosted": self.hosted}
        found: dict[str, Any] = {
            "processes": self.replicated.devices,
            "expert_parallel_degree": self.held.expert_parallel,
            "expert_placement": self.held.placement,
            "held_reason": self.held_reason,
            "expert_host_bytes": self.expert_host_bytes,
            "slice_rows": self.settled.training.slice_rows,
            "offload_checkpoints": self.settled.training.offload_checkpoints,
            "attention_backend": self.settled.attention_backend,
            "layers": describe_layers(self.settled),
            "layers_reason": self.settled_reason,
            "kept": describe_kept(self.memory.kept, self.shape),
            "input_host_bytes": self.input_host_bytes,
        }
        for way, memory in ways.items():
            found[f"{way}_bytes_per_gpu"] = label(memory.components) if memory else None
            found[f"{way}_peak_bytes_per_gpu"] = memory.peak_bytes if memory else None
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as a JSON document."""
        return {
            "device": self.device,
            "parameters": self.shape.total,
            "bytes_on_disk": label(self.disk),
            "linkable_bytes": label(self.linkable),
            "bits_per_weight": label(self.bits_per_weight),
            "compressed_bytes": label(self.compressed),
            "bytes_per_gpu": label(self.memory.components),
            "peak_bytes_per_gpu": self.memory.peak_bytes,
            "card_bytes": self.card_bytes,
            "changes_to_fit": self.changes,
            **self.columns(),
            "stage_bytes": {name: _total(parts) for name, parts in self.stages.items()},
            "components_at_peak": {
                name: label(parts)
                for name, parts in {**self.stages, "03_finetune": self.memory.at_peak}.items()
            },
            "host_bytes": self.host_bytes,
            "training_tokens": self.tokens,
            "training_tokens_note": self.tokens_note,
            "estimated_seconds": {name: round(value) for name, value in self.seconds.items()},
            "estimated_for": self.rate.name,
        }


def _total(components: dict[str, int]) -> int:
    return sum(components.values())


def configured_device(config: Config, shape: ModelShape) -> Device:
    """Return the kind of device that a config is meant for.

    It is `cpu` for models below a billion parameters without flash attention, otherwise `cuda`.
    """
    return "cpu" if shape.total < CPU_PARAMETERS and not config.flash_attention else "cuda"


def make_plan(
    config: Config,
    device: Device | None = None,
    gpu_name: str | None = None,
    gpu_bytes: int = fit.CARD_BYTES,
    host_budget_bytes: int | None = None,
    gpus: int | None = None,
) -> Plan:
    """Return the plan of a config.

    Args:
        config: the config to plan.
        device: kind of device to plan for; None takes `configured_device`.
        gpu_name: GPU for the time estimate; None takes an RTX 3090.
        gpu_bytes: usable memory of the GPU; by default that of a 24 GB card.
        host_budget_bytes: available host memory; None: not known, taken as enough.
        gpus: number of GPUs that train; None takes the fewest that the config needs.

    Raises:
        ConfigError: `expert_parallel_degree` does not divide the number of experts.
        StageError: the base model's shape is unknown.
    """
    shape = find_shape(config.model)
    device = device or configured_device(config, shape)
    disk = storage.disk_bytes(shape, config)
    disk |= stages.temporary_bytes(shape, config, device)
    given = (shape, config, gpu_bytes, device, host_budget_bytes)
    ways = plan_ways(*given)
    gpus = (gpus or ways.replicated.devices) if device == "cuda" else 0
    return Plan(
        shape=shape,
        device=device,
        disk=disk,
        bits_per_weight=storage.bits_by_group(config),
        compressed=storage.compressed_groups(drop_experts(shape, config), config),
        card_bytes=gpu_bytes,
        **ways._asdict(),
        settled_reason=explain_layers(config, ways.settled),
        changes=fit.suggest_changes(drop_experts(shape, config), *given[1:]) if gpus else [],
        stages=_working_memory(shape, config, device, ways.evaluation_held),
        expert_host_bytes=expert_host_bytes(shape, config, ways),
        compress_host=stages.compress_host_memory(shape, config, device),
        linkable=storage.linkable_bytes(shape, config),
        **_times(shape, config, gpu_name, gpus, disk, ways),
    )


def _times(
    shape: ModelShape, config: Config, gpu: str | None, gpus: int, disk: dict[str, int], ways: Ways
) -> dict[str, Any]:
    """Return the plan's fields about time; `gpus` is 0 on a processor."""
    tokens, note = timing.training_tokens(config, _data_size(config))
    work = {"disk": disk, "tokens": tokens, "gpus": max(1, gpus)}
    held = {"held": ways.held, "evaluation_held": ways.evaluation_held}
    seconds_on = partial(timing.stage_seconds, shape, config, **work, **held)
    rate = timing.find_rate(gpu or "RTX 3090" if gpus else None)
    return {
        **{"rate": rate, "tokens": tokens, "tokens_note": note, "seconds": seconds_on(rate)},
        "estimates": timing.estimate(config, gpu, gpus, seconds_on),
    }


def _working_memory(
    shape: ModelShape, config: Config, device: Device, evaluation_held: Held
) -> dict[str, dict[str, int]]:
    """Return components of the other stages' memory by stage; on a CPU they include the host's."""
    compress = stages.compress_memory(shape, config, device)
    if device == "cpu":
        compress |= stages.compress_host_memory(shape, config, device)
    return {
        "02_compress": compress,
        "04_eval": stages.evaluation_memory(shape, config, device, evaluation_held),
    }


def _size(path: Path) -> int | None:
    """Return the size of a file in bytes; None if it does not exist."""
    return path.stat().st_size if path.is_file() else None


def _data_size(config: Config) -> int | None:
    """Return the size of the training files in bytes; None if one is not on this machine."""
    sizes = [_size(Path(share.source)) for share in config.data.shares]
    return None if None in sizes else sum(filter(None, sizes))


def plan_stage(config: Config, run_dir: Path, name: str) -> dict[str, Any]:
    """Return what a stage would do: the document that `--dry-run` prints. Changes nothing.

    Args:
        config: the config to plan.
        run_dir: the run directory, for the paths.
        name: `01_health`, `02_compress`, `03_finetune` or `04_eval`.

    Raises:
        StageError: the base model's shape is unknown.
    """
    made = make_plan(config)
    components, peak = made.stage_memory("03_finetune" if name == "01_health" else name)
    columns = made.columns() if name in _SHOWS_TRAINING else {}
    if name == "04_eval":
        columns = _plan_evaluation(config, made).columns()
    reads, writes = _files(config, run_dir, name, made)
    return {
        "stage": name,
        "status": "plan",
        "device": made.device,
        "reads": reads,
        "writes": writes,
        "bytes_on_disk": sum(row["bytes"] for row in writes),
        "bytes_per_gpu": label(components),
        "peak_bytes_per_gpu": peak,
        "changes_to_fit": made.changes if name in _SHOWS_TRAINING else [],
        **columns,
        "estimated_seconds": round(made.seconds[name]),
        **({"estimates": [e.describe() for e in made.estimates]} if name == "03_finetune" else {}),
        "profile": {"name": config.profile, "sets": describe_profile(config)},
        "notes": _notes(config, name, made),
        "config": config.model_dump(mode="json"),
    }


def _row(path: Path | str, size: int, what: str) -> dict[str, Any]:
    return {"path": str(path), "bytes": size, "what": what}


def _files(
    config: Config, run_dir: Path, name: str, made: Plan
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    disk, tiny = made.disk, config.model.base == "tiny"
    base = _row(run_dir / "base" if tiny else config.model.base, disk["base"], "base model")
    data = [
        _row(run_dir / "data" if name == "demo" else name, _size(Path(name)) or 0, "conversations")
        for name in (share.source for share in config.data.shares)
    ]
    two, three = run_dir / "02_compress", run_dir / "03_finetune"
    model2 = _row(two / "model", disk["compressed_model"], "compressed model")
    masters = _row(two / "masters", disk["compressed_masters"], "dense masters for stage 03")
    work = _row(two / "work", disk["compress_work"], "temporary")
    states = _row(run_dir / "04_eval/states", disk["evaluate_work"], "at most, temporary")
    model3 = _row(three / "model", disk["finetuned_model"], "fine-tuned model")
    rest3 = [
        _row(three / "checkpoints", disk["finetune_checkpoints"], "latest checkpoints"),
        _row(three / "adapter", disk["adapter"], "adapter"),
    ]
    report = [_row(run_dir / name / "report.md", 0, "report")]
    return {
        "01_health": ([], report),
        "02_compress": ([base, *data], [*([base] if tiny else []), model2, masters, work]),
        "03_finetune": ([model2, masters, *data], [model3, *rest3]),
        "04_eval": ([base, model2, model3, *data], [*report, states]),
    }[name]


def _memory_notes(made: Plan) -> list[str]:
    """Return notes on the components of stage 03's memory, and what to do if they do not fit."""
    notes = [
        "Memory is that of stage 03. The loss, a layer's experts and its attention are not in "
        "memory at the same time: the peak counts the largest."
    ]
    if made.held.placement == "host":
        notes.append(
            f"The experts are in host memory: {format_bytes(made.expert_host_bytes)} of it with "
            "the processes. A step takes at least as long as copying its processes' experts twice."
        )
    return notes + _missing(made, made.memory.peak_bytes, fit.add_last_resort(made.changes))


def _plan_evaluation(config: Config, made: Plan) -> evaluated.Evaluation:
    given = (made.evaluation_held, made.card_bytes, made.device)
    return evaluated.plan_evaluation(made.shape, config, *given)


def _missing(made: Plan, peak_bytes: int, remedies: list[str]) -> list[str]:
    """Return how much memory a stage lacks, and what would help; nothing if it fits."""
    short = peak_bytes - made.card_bytes
    if made.device == "cpu" or short <= 0:
        return []
    return [
        f"It does not fit a card with {format_bytes(made.card_bytes)} of usable memory: "
        f"{format_bytes(short)} short; {'; '.join(remedies)}."
    ]


def _notes(config: Config, name: str, made: Plan) -> list[str]:
    notes = [
        f"Times are estimates for {made.rate.name}. In memory figures, weights are exact and "
        "activations are estimates.",
        *describe_dropped(made.shape, config),
    ]
    if name in _SHOWS_TRAINING:
        notes += _memory_notes(made)
    if name == "03_finetune":
        notes.append(f"{made.tokens:,} training tokens ({made.tokens_note}).")
        if config.sequence_parallel_degree > 1:
            notes.append(f"{config.sequence_parallel_degree} GPUs share each sequence.")
        if config.lora.expert_targets:
            notes.append(
                f"Experts have adapters: all {format_bytes(made.compressed['experts'])} of them "
                "are written as new files, not as links."
            )
    if name == "04_eval":
        evaluation = _plan_evaluation(config, made)
        notes += _missing(made, evaluation.peak_bytes, evaluation.remedies(made.card_bytes))
    model = {"02_compress": "compressed_model", "03_finetune": "finetuned_model"}.get(name)
    if model is not None and made.linkable[model]:
        notes.append(
            f"Of the model, {format_bytes(made.linkable[model])} take no disk space if the file "
            "system can hard-link shards."
        )
    return notes
