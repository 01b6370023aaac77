"""The plan of a run: files read and written, memory, and time.

`make_plan` plans a whole config, `plan_stage` one stage for `--dry-run`. Neither inspects the GPU:
a plan is made for a kind of device (by default the one the config asks for), and 01_health.py
compares it with the machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparselong.config import Config
from sparselong.memory import fit, stages, storage, timing, training
from sparselong.memory.labels import label
from sparselong.memory.shape import ModelShape, find_shape
from sparselong.memory.table import format_bytes
from sparselong.memory.training import Device, Memory

CPU_PARAMETERS = 1_000_000_000
"""Models of at least this size are not fine-tuned on a CPU, where a step would take hours."""
_SHOWS_TRAINING = ("01_health", "03_finetune")
"""Stages whose plan shows stage 03's memory."""
_HOST_BYTES = 2 * training.GIB
"""Host memory for Python, libraries and file buffers while a GPU computes (estimate)."""


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
        memory: stage 03 in this version, with the whole model on each device.
        changes: changes that make stage 03 fit, the cheapest first; empty if it fits.
        sharded: stage 03 on each of `sequence_parallel_degree` GPUs once experts and vocabulary
            are sharded; None if the degree is 1.
        stages: bytes of the other stages' working memory, by stage and component.
        offloaded_bytes: pinned host memory for stage 03's offloaded checkpoints.
        compress_host: bytes that stage 02 keeps in host memory on any device.
        linkable: the part of `disk` that takes no space if shards can be hard links.
        tokens: number of tokens that stage 03 trains on.
        tokens_note: how `tokens` was determined.
        seconds: estimated time by stage.
    """

    shape: ModelShape
    device: Device
    rate: timing.Rate
    disk: dict[str, int]
    bits_per_weight: dict[str, float]
    compressed: dict[str, int]
    card_bytes: int
    memory: Memory
    changes: list[str]
    sharded: Memory | None
    stages: dict[str, dict[str, int]]
    offloaded_bytes: int
    compress_host: dict[str, int]
    linkable: dict[str, int]
    tokens: int
    tokens_note: str
    seconds: dict[str, float]

    @property
    def host_bytes(self) -> int:
        """Host memory of the stage that needs most, in bytes; with a GPU that is stage 02."""
        if self.device == "cpu":
            return max(self.stage_memory(name)[1] for name in ("03_finetune", *self.stages))
        return max(_total(self.compress_host), self.offloaded_bytes) + _HOST_BYTES

    def stage_memory(self, name: str) -> tuple[dict[str, int], int]:
        """Return the components of a stage's memory and their peak, in bytes."""
        if name == "03_finetune":
            return self.memory.components, self.memory.peak_bytes
        components = self.stages.get(name, {})
        return components, _total(components)

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
            "sharded_bytes_per_gpu": label(self.sharded.components) if self.sharded else None,
            "sharded_peak_bytes_per_gpu": self.sharded.peak_bytes if self.sharded else None,
            "stage_bytes": {name: _total(parts) for name, parts in self.stages.items()},
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
    gpu_bytes: int | None = None,
) -> Plan:
    """Return the plan of a config.

    Args:
        config: the config to plan.
        device: kind of device to plan for; None takes `configured_device`.
        gpu_name: GPU for the time estimate; None takes an RTX 3090.
        gpu_bytes: usable memory of the GPU; None takes that of a 24 GB card.

    Raises:
        StageError: the base model's shape is unknown.
    """
    shape = find_shape(config.model)
    device = device or configured_device(config, shape)
    rate = timing.find_rate(None if device == "cpu" else gpu_name or "RTX 3090")
    disk = storage.disk_bytes(shape, config)
    disk["compress_work"] = 2 * stages.state_bytes(shape, config, device)
    tokens, note = timing.training_tokens(config, _size(Path(config.data.train)))
    shared = config.sequence_parallel_degree > 1 and device == "cuda"
    card_bytes = fit.CARD_BYTES if gpu_bytes is None else gpu_bytes

    def finetuning(sharded: bool) -> Memory:
        kept = fit.decide_kept(shape, config, card_bytes, device, sharded=sharded)
        return training.finetune_memory(shape, config, device, sharded=sharded, kept=kept)

    return Plan(
        shape=shape,
        device=device,
        rate=rate,
        disk=disk,
        bits_per_weight=storage.bits_by_group(config),
        compressed=storage.compressed_groups(shape, config),
        card_bytes=card_bytes,
        memory=finetuning(sharded=False),
        changes=fit.suggest_changes(shape, config, card_bytes) if device == "cuda" else [],
        sharded=finetuning(sharded=True) if shared else None,
        stages=_working_memory(shape, config, device),
        offloaded_bytes=training.offloaded_bytes(shape, config),
        compress_host=stages.compress_host_memory(shape, config, device),
        linkable=storage.linkable_bytes(shape, config),
        tokens=tokens,
        tokens_note=note,
        seconds=timing.stage_seconds(shape, config, rate, disk, tokens),
    )


def _working_memory(shape: ModelShape, config: Config, device: Device) -> dict[str, dict[str, int]]:
    """Return components of the other stages' memory by stage; on a CPU they include the host's."""
    compress = stages.compress_memory(shape, config, device)
    if device == "cpu":
        compress |= stages.compress_host_memory(shape, config, device)
    return {
        "02_compress": compress,
        "04_eval": stages.evaluate_memory(shape, config, device),
    }


def _size(path: Path) -> int | None:
    """Return the size of a file in bytes; None if it does not exist."""
    return path.stat().st_size if path.is_file() else None


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
        "sharded_bytes_per_gpu": label(made.sharded.components)
        if made.sharded and name == "03_finetune"
        else None,
        "sharded_peak_bytes_per_gpu": made.sharded.peak_bytes
        if made.sharded and name == "03_finetune"
        else None,
        "estimated_seconds": round(made.seconds[name]),
        "notes": _notes(config, name, made),
        "config": config.model_dump(mode="json"),
    }


def _row(path: Path | str, size: int, what: str) -> dict[str, Any]:
    return {"path": str(path), "bytes": size, "what": what}


def _files(
    config: Config, run_dir: Path, name: str, made: Plan
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    disk = made.disk
    tiny = config.model.base == "tiny"
    base_path = run_dir / "base" if tiny else config.model.base
    base = _row(base_path, disk["base"], "base model")
    source = Path(config.data.train)
    data_path = run_dir / "data" if config.data.train == "demo" else source
    data = _row(data_path, _size(source) or 0, "conversations")
    two, three = run_dir / "02_compress", run_dir / "03_finetune"
    model2 = _row(two / "model", disk["compressed_model"], "compressed model")
    work = _row(two / "work", disk["compress_work"], "temporary")
    masters = _row(two / "masters", disk["compressed_masters"], "dense masters for stage 03")
    model3 = _row(three / "model", disk["finetuned_model"], "fine-tuned model")
    rest3 = [
        _row(three / "checkpoints", disk["finetune_checkpoints"], "latest checkpoints"),
        _row(three / "adapter", disk["adapter"], "adapter"),
    ]
    report = [_row(run_dir / name / "report.md", 0, "report")]
    return {
        "01_health": ([], report),
        "02_compress": ([base, data], [*([base] if tiny else []), model2, masters, work]),
        "03_finetune": ([model2, masters, data], [model3, *rest3]),
        "04_eval": ([base, model2, model3, data], report),
    }[name]


def _memory_notes(made: Plan) -> list[str]:
    """Return notes on the components of stage 03's memory, and what to do if they do not fit."""
    notes = [
        "Memory is that of stage 03. The loss, a layer's experts and its attention are not in "
        "memory at the same time: the peak counts the largest."
    ]
    if made.memory.components.get("kept_attention"):
        notes.append("The outputs of full attention are kept and not recomputed.")
    if made.memory.components.get("kept_experts"):
        notes.append("The experts' gate_up outputs are kept and not recomputed.")
    short = made.memory.peak_bytes - made.card_bytes
    if made.device == "cuda" and short > 0:
        remedies = list(made.changes)
        if not any(text.endswith(" fits") for text in remedies):
            remedies.append(
                "no change of the config is enough: use a larger GPU or a smaller model"
            )
        notes.append(
            f"It does not fit a card with {format_bytes(made.card_bytes)} of usable memory: "
            f"{format_bytes(short)} short; {'; '.join(remedies)}."
        )
    return notes


def _notes(config: Config, name: str, made: Plan) -> list[str]:
    notes = [
        f"Times are estimates for {made.rate.name}. In memory figures, weights are exact and "
        "activations are estimates."
    ]
    if name in _SHOWS_TRAINING:
        notes += _memory_notes(made)
    if name == "03_finetune":
        notes.append(f"{made.tokens:,} training tokens ({made.tokens_note}).")
        if config.sequence_parallel_degree > 1:
            notes.append(
                f"{config.sequence_parallel_degree} GPUs share each sequence; each holds the whole "
                "model. Sharding the model is not implemented yet."
            )
    model = {"02_compress": "compressed_model", "03_finetune": "finetuned_model"}.get(name)
    if model is not None:
        notes.append(
            f"Of the model, {format_bytes(made.linkable[model])} take no disk space if the file "
            "system can hard-link shards."
        )
    return notes
