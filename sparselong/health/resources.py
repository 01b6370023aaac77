"""Checks of GPUs, host memory and disk space against the plan."""

from __future__ import annotations

from collections.abc import Iterator

from sparselong.config import Config
from sparselong.figures import format_bytes
from sparselong.health.machine import Gpu, Machine
from sparselong.health.rows import Row, fail, ok, warn
from sparselong.memory import Plan, drop_experts, suggest_changes

_LEAST_CAPABILITY = (8, 0)
"""Ampere, the first GPUs with bf16 matrix units."""


def check_gpus(machine: Machine, plan: Plan) -> Iterator[Row]:
    """Yield a row for each GPU, and one for peer access between them."""
    usable = machine.usable_gpus
    for gpu in machine.gpus:
        yield _gpu(gpu, gpu in usable, plan)
    if not machine.gpus and plan.device == "cpu":
        yield ok("GPU", "none, and none needed")
    elif not machine.gpus:
        yield fail(
            "GPU",
            f"none; needed: {_wanted(plan)}",
            "use a machine with these, or try --config configs/tiny.yaml, which needs no GPU",
        )
    if len(usable) > 1:
        cut = machine.torch.unconnected
        if cut:
            pairs = ", ".join(f"{one}-{two}" for one, two in cut if one < two)
            yield warn(
                "peer access",
                f"not between GPUs {pairs}: copies between them go through host memory",
                "none needed; split sequences and shared experts are slower on these GPUs",
            )
        else:
            yield ok("peer access", "between all GPUs")


def _gpu(gpu: Gpu, usable: bool, plan: Plan) -> Row:
    name = f"GPU {gpu.index}"
    major, minor = gpu.compute_capability
    text = (
        f"{gpu.name}, compute capability {major}.{minor}, {format_bytes(gpu.total_bytes)} "
        f"({format_bytes(gpu.free_bytes)} free), PCIe {gpu.pcie}"
    )
    if gpu.compute_capability < _LEAST_CAPABILITY and plan.device == "cuda":
        return fail(name, f"{text}: bf16 needs 8.0", "exclude it with CUDA_VISIBLE_DEVICES")
    if not usable:
        return warn(name, f"{text}: torch does not see it", "run ./install.sh again")
    return ok(name, text)


def _wanted(plan: Plan) -> str:
    """Describe the GPUs and memory that the plan needs."""
    need = _gpu_need(plan)[1]
    count = plan.memory.devices
    gpus, each = ("1 GPU", "") if count == 1 else (f"{count} GPUs", " on each")
    text = f"{gpus} (compute capability 8.0 or newer) with {format_bytes(need)} free{each}"
    if plan.held.placement == "host":
        return f"{text}, with the experts in host memory"
    if plan.sharded is None:
        return text
    if plan.held.expert_parallel == 1:
        peak = format_bytes(plan.sharded.peak_bytes)
        return f"{text}; stage 03 needs {peak} on each with experts and vocabulary sharded"
    peak = format_bytes(plan.replicated.peak_bytes)
    return f"{text}, with experts and vocabulary sharded over them (replicated: {peak})"


def _gpu_need(plan: Plan) -> tuple[str, int]:
    """Return the stage that needs most GPU memory, and its peak in bytes."""
    peaks = {name: plan.stage_memory(name)[1] for name in ("03_finetune", *plan.stages)}
    name = max(peaks, key=lambda name: peaks[name])
    return name, peaks[name]


def check_memory(config: Config, machine: Machine, plan: Plan) -> Iterator[Row]:
    """Yield rows for GPU memory, if the plan needs a GPU, and for host memory."""
    if plan.device == "cuda":
        usable = machine.usable_gpus
        if usable:
            yield _gpu_memory(config, usable[0], plan, machine.host_available_bytes)
        elif machine.gpus:
            yield fail(
                "GPU memory",
                f"no GPU that torch can use; needed: {_wanted(plan)}",
                "run ./install.sh again",
            )
    need, have = plan.host_bytes, machine.host_available_bytes
    text = (
        f"needs {format_bytes(need)} of {format_bytes(have)} available "
        f"({format_bytes(machine.host_total_bytes)} in total)"
    )
    if need <= have:
        yield ok("host memory", text)
    elif plan.device == "cpu":
        yield fail("host memory", text, "lower micro_batch_size, sequence_len or model.tiny_layers")
    elif plan.expert_host_bytes == need:
        yield fail(
            "host memory",
            f"{text}, most of it for the experts",
            "close other programs, add memory, or use more or larger GPUs",
        )
    elif 2 * plan.input_host_bytes >= need:
        yield fail(
            "host memory",
            f"{text}, most of it for the inputs of checkpointed layers",
            "close other programs, add memory, or set training.offload_checkpoints=auto",
        )
    else:
        yield fail("host memory", text, "close other programs, or add memory")


def _gpu_memory(config: Config, gpu: Gpu, plan: Plan, host_bytes: int) -> Row:
    stage, need = _gpu_need(plan)
    text = f"{stage} needs {format_bytes(need)}, GPU {gpu.index} has {format_bytes(gpu.free_bytes)}"
    if need <= gpu.free_bytes:
        return ok("GPU memory", f"{text} free")
    found = f"{text} free: {format_bytes(need - gpu.free_bytes)} short. Needed: {_wanted(plan)}"
    if need <= gpu.total_bytes:
        return fail("GPU memory", found, "stop the other programs on this GPU (see nvidia-smi)")
    if stage == "03_finetune":
        limits = (gpu.total_bytes, plan.device, host_bytes)
        changes = suggest_changes(drop_experts(plan.shape, config), config, *limits)
        if any(text.endswith(" fits") for text in changes):
            return fail("GPU memory", found, "; ".join(changes))
    return fail("GPU memory", found, "use a larger GPU or a smaller model")


def check_disk(machine: Machine, plan: Plan) -> Iterator[Row]:
    """Yield rows for the disk space of all artifacts; on one file system, shards can be links."""
    base = plan.disk["base"]
    on_hub_disk = machine.base.state == "reachable"
    here = machine.base.state == "here" or on_hub_disk
    run = sum(plan.disk.values()) - (base if here else 0)
    run = max(0, run - machine.run_dir_bytes)
    same = machine.run_disk.device == machine.hub_disk.device
    if on_hub_disk and not same:
        yield _room("disk for the base", base, 0, machine.hub_disk.free_bytes, "set HF_HOME")
    elif on_hub_disk:
        run += base
    linked = plan.linkable["finetuned_model"]
    linked += plan.linkable["compressed_model"] if same else 0
    yield _room(
        "disk",
        run,
        min(linked, run),
        machine.run_disk.free_bytes,
        "free some space, or pass --run-dir on a larger disk",
    )


def _room(check: str, need: int, linkable: int, free: int, fix: str) -> Row:
    text = f"needs {format_bytes(need)}, {format_bytes(free)} free"
    if need <= free:
        return ok(check, text)
    if need - linkable <= free:
        return warn(
            check,
            f"{text}: enough only if {format_bytes(linkable)} of shards can be hard links",
            fix,
        )
    return fail(check, f"{text}: {format_bytes(need - free)} short", fix)
