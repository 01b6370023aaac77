"""The checks: facts and plan in, rows out. Pure functions that neither probe nor change anything.

A row is `ok`, `warn` (the config runs, with a limitation) or `fail` (it cannot run). Every warning
and failure says what to do. The machine can run the config if no row fails.
"""

from __future__ import annotations

from collections.abc import Iterator

from sparselong.config import Config
from sparselong.errors import ConfigError, StageError
from sparselong.figures import format_bytes
from sparselong.files import is_local
from sparselong.health import resources
from sparselong.health.inputs import Finding
from sparselong.health.machine import Machine
from sparselong.health.packages import NEEDED, Package
from sparselong.health.rows import Row, fail, ok, warn
from sparselong.health.sources import Source
from sparselong.kernels.attention import FLASH_ATTN_4, describe_choice
from sparselong.kernels.experts import choose_backend
from sparselong.memory import (
    Plan,
    check_heads,
    describe_layers,
    drop_experts,
    least_peak_bytes,
    process_tokens,
    rows_at_once,
)
from sparselong.processes import check_cores
from sparselong.provenance import install_command

_PYTHONS = ((3, 11), (3, 12))
_DRIVERS = {12: "530.30", 13: "580"}
"""Oldest supported driver, by the major CUDA version that torch was built with."""
_OPEN_MODELS = ("openai/gpt-oss-120b", "openai/gpt-oss-20b")


def check(config: Config, machine: Machine, plan: Plan) -> list[Row]:
    """Check whether the machine can run the config.

    Args:
        config: the config to run.
        machine: facts about the machine.
        plan: plan of the config for the device that the machine would use.

    Returns:
        Rows in display order: software, GPUs, kernels, memory, disk, model and data.
    """
    return [
        _python(machine),
        *_packages(machine),
        *_driver(machine, plan),
        *resources.check_gpus(machine, plan),
        _parallel(config, machine, plan),
        _experts_shared(config, machine, plan),
        _experts_placed(plan),
        _layers(plan),
        _collectives(plan.memory.devices, machine),
        _attention(config, machine, plan),
        _experts(config, machine, plan),
        _optimizer(config, machine),
        *_trackers(config, machine),
        *resources.check_memory(config, machine, plan),
        *resources.check_disk(machine, plan),
        *_base(machine.base),
        *(_source(source) for source in machine.data),
        *(_opened(finding) for finding in machine.inputs),
    ]


def _python(machine: Machine) -> Row:
    found = ".".join(map(str, machine.python))
    if machine.python[:2] in _PYTHONS:
        return ok("python", found)
    return fail("python", f"{found}, not 3.11 or 3.12", "PYTHON=/path/to/python3.12 ./install.sh")


def _packages(machine: Machine) -> Iterator[Row]:
    if machine.torch.error:
        yield fail("torch", f"cannot be imported: {machine.torch.error}", "run ./install.sh")
    if not machine.packages:
        yield warn(
            "packages",
            "requirements/requirements.lock is missing, so versions cannot be compared",
            "run from a checkout of the repository",
        )
        return
    missing = [package for package in machine.packages if package.installed is None]
    needed = [package for package in missing if package.name in NEEDED]
    different = [p for p in machine.packages if p.installed is not None and not p.matches]
    if needed or (missing and not machine.own_python):
        yield fail("packages", f"missing: {_names(needed or missing)}", "run ./install.sh")
    elif missing:
        yield warn(
            "packages",
            f"{len(missing)} of {len(machine.packages)} pinned packages are missing: "
            f"{_names(missing)}",
            "run ./install.sh if an import fails",
        )
    if different:
        shown = [f"{p.name} {p.installed} (pinned {p.pinned})" for p in different]
        text = f"versions differ from the pinned ones: {_shorten(shown)}"
        if machine.own_python:
            yield warn("package versions", text, "./install.sh installs the tested set in .venv")
        else:
            yield fail("package versions", text, "run ./install.sh")
    if not missing and not different:
        yield ok("packages", f"all {len(machine.packages)} as pinned")


def _trackers(config: Config, machine: Machine) -> Iterator[Row]:
    for key, modules in config.training.tracker_modules.items():
        missing = [name for name in modules if name in machine.missing]
        if missing:
            yield fail(
                f"training.{key}", f"missing: {', '.join(missing)}", install_command(missing)
            )
        else:
            yield ok(f"training.{key}", f"{', '.join(modules)} installed")


def _names(packages: list[Package]) -> str:
    return _shorten([package.name for package in packages])


def _shorten(names: list[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _driver(machine: Machine, plan: Plan) -> Iterator[Row]:
    built = machine.torch.cuda
    if machine.driver is None:
        if plan.device == "cpu":
            yield ok("CUDA driver", "none, and none needed: this config runs on the CPU")
        else:
            yield fail(
                "CUDA driver",
                "none (nvidia-smi does not respond), but this config needs a GPU",
                "install NVIDIA's driver, 530.30 or newer, on a machine with the GPU named below",
            )
    elif built is None:
        tell = warn if plan.device == "cpu" else fail
        yield tell(
            "CUDA driver",
            f"{machine.driver}, but torch {machine.torch.version} is the CPU build",
            "run ./install.sh again: it selects the build for the driver",
        )
    else:
        least = _DRIVERS.get(int(built.partition(".")[0]), "530.30")
        if _version(machine.driver) < _version(least):
            yield fail(
                "CUDA driver",
                f"{machine.driver}, but torch built with CUDA {built} needs {least}",
                "update the driver, or run ./install.sh again for an older CUDA build",
            )
        else:
            yield ok("CUDA driver", f"{machine.driver}, torch built with CUDA {built}")
    nvcc = f"nvcc {machine.nvcc}" if machine.nvcc else "no nvcc"
    yield ok("CUDA toolkit", f"{nvcc} (only install.sh --with-flash-attn needs it)")


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def _parallel(config: Config, machine: Machine, plan: Plan) -> Row:
    degree, have = config.sequence_parallel_degree, len(machine.usable_gpus)
    if degree == 1:
        return ok("sequence parallel", "off: one device holds the whole sequence")
    try:
        check_heads(config, plan.shape)
        if plan.device == "cpu":
            check_cores(degree, have, machine.cores)
    except (ConfigError, StageError) as error:
        return fail("sequence parallel", f"{error.what} ({error.found})", error.fix)
    if plan.device == "cpu" and not have:
        return ok("sequence parallel", f"{degree} processes on this machine share each sequence")
    if have < degree:
        fix = f"use a machine with {degree} GPUs, since a sequence stays on one machine"
        fewer = config.model_copy(update={"sequence_parallel_degree": max(1, have)})
        given = (
            drop_experts(plan.shape, config),
            fewer,
            plan.card_bytes,
            "cuda",
            machine.host_available_bytes,
        )
        if least_peak_bytes(*given) <= plan.card_bytes:
            fix += f", or set sequence_parallel_degree={max(1, have)}"
        return fail(
            "sequence parallel",
            f"sequence_parallel_degree {degree} needs as many GPUs; here: {_count(have)}",
            fix,
        )
    return ok("sequence parallel", f"{degree} GPUs share each sequence")


def _experts_shared(config: Config, machine: Machine, plan: Plan) -> Row:
    """Return the row for the processes that share one copy of experts and vocabulary."""
    name, degree, have = "expert parallel", plan.held.expert_parallel, len(machine.usable_gpus)
    if degree == 1:
        return ok(name, f"off: each process holds all experts ({plan.held_reason})")
    text = f"{degree} processes share experts and vocabulary ({plan.held_reason})"
    needs_gpus = plan.device == "cuda" or have > 0
    if needs_gpus and have < degree and config.expert_parallel_degree != "auto":
        return fail(
            name,
            f"{text}, with as many GPUs; here: {_count(have)}",
            "use a machine with more GPUs, or set expert_parallel_degree=auto",
        )
    if config.sequence_parallel_degree % degree:
        return warn(
            name,
            f"{text}: only torchrun starts a multiple of {degree} processes, "
            f"03_finetune.py starts {config.sequence_parallel_degree}",
            f"torchrun --nproc_per_node={plan.memory.devices} 03_finetune.py",
        )
    return ok(name, text)


def _experts_placed(plan: Plan) -> Row:
    """Return the row for where the experts of stages 03 and 04 are."""
    places = {"03": plan.held.placement, "04": plan.evaluation_held.placement}
    on_host = [stage for stage, placement in places.items() if placement == "host"]
    if not on_host:
        return ok("expert placement", "on the device")
    text = (
        f"in host memory in stage {' and '.join(on_host)}, {format_bytes(plan.expert_host_bytes)}"
    )
    return ok("expert placement", f"{text} with the processes ({plan.held_reason})")


def _layers(plan: Plan) -> Row:
    """Return the row for how stage 03's checkpointed layers compute."""
    text = describe_layers(plan.settled)
    if plan.input_host_bytes:
        text += f" ({format_bytes(plan.input_host_bytes)} there)"
    return ok("checkpointed layers", f"{text} ({plan.settled_reason})")


def _count(gpus: int) -> str:
    return f"{gpus} usable GPU{'' if gpus == 1 else 's'}"


def _collectives(processes: int, machine: Machine) -> Row:
    have = [name for name in ("nccl", "gloo") if getattr(machine.torch, name)]
    wanted = "nccl" if machine.usable_gpus else "gloo"
    text = f"{' and '.join(have) or 'none'} available"
    if processes == 1:
        text = f"{text}; one process needs none"
        if len(machine.usable_gpus) > 1 and wanted not in have:
            return warn("collectives", text, "run ./install.sh for a torch build with NCCL")
        return ok("collectives", text)
    if wanted not in have:
        return fail(
            "collectives",
            f"{text}; processes that train together need {wanted}",
            "run ./install.sh to install a torch build that has it",
        )
    return ok("collectives", f"{text}; {wanted} in use")


def _attention(config: Config, machine: Machine, plan: Plan) -> Row:
    if not machine.usable_gpus and config.flash_attention:
        return fail(
            "attention kernel",
            "flash_attention is on, but this machine has no GPU",
            "run on a machine with a GPU, or set flash_attention=false (small models only)",
        )
    if not config.flash_attention:
        return ok("attention kernel", "transformers' eager (quadratic in sequence_len)")
    named, repeats = plan.settled.attention_backend, config.deterministic
    if missing := _missing_package(named, machine):
        return fail(
            "attention kernel", f"attention_backend is {named}, but {missing[0]}", missing[1]
        )
    if named == "auto":
        major, minor = machine.usable_gpus[0].compute_capability
        packed = config.training.sample_packing
        chosen = describe_choice(f"sm_{major}{minor}", packed, config.sequence_len, repeats)
        text = "; ".join(f"{kind} layers: {backend}" for kind, backend in chosen.items())
    else:
        why = "attention_backend" if named == config.attention_backend else plan.settled_reason
        text = f"full and window layers: {named} ({why})"
    return ok("attention kernel", text + ("; deterministic" if repeats else ""))


def _missing_package(backend: str, machine: Machine) -> tuple[str, str] | None:
    """Return what a backend of an optional package lacks, and what to do; None: nothing."""
    if backend == "flash_attn" and not machine.flash_attn:
        return (
            "that package is not installed",
            "pip install flash-attn (it needs nvcc), or set attention_backend=auto",
        )
    if backend == "flash_attn_4" and not machine.flash_attn_4:
        return (
            f"flash-attn-4 {FLASH_ATTN_4} is not installed",
            "run ./install.sh --with-flash-attn-4, or set attention_backend=auto",
        )
    capability = machine.usable_gpus[0].compute_capability
    if backend == "flash_attn_4" and capability != (9, 0):
        found = ".".join(map(str, capability))
        return f"it needs compute capability 9.0, GPU 0 has {found}", "set attention_backend=auto"
    return None


def _experts(config: Config, machine: Machine, plan: Plan) -> Row:
    """Return the row for the experts' backend in stage 03, on a GPU from the measured table."""
    if plan.device == "cpu" or not machine.usable_gpus:
        return ok("expert kernel", "torch, decoded expert by expert")
    major, minor = machine.usable_gpus[0].compute_capability
    tokens = process_tokens(config)
    routed = (rows_at_once(plan.settled, tokens) or tokens) * plan.shape.experts_per_token
    experts = drop_experts(plan.shape, config).experts
    chosen = choose_backend(f"sm_{major}{minor}", routed, experts)
    return ok("expert kernel", f"Triton, {chosen.backend} ({chosen.evidence})")


def _optimizer(config: Config, machine: Machine) -> Row:
    name = config.training.optimizer
    if config.training.is_8bit and not machine.usable_gpus:
        return fail(
            "optimizer",
            f"{name} needs a GPU, but this machine has none",
            "set training.optimizer=adamw_torch",
        )
    return ok("optimizer", name)


def _base(base: Source) -> Iterator[Row]:
    yield _source(base)
    if base.gated and not base.account:
        yield fail(
            "licence",
            f"{base.name} is gated on the hub, but no valid token is set",
            "accept its licence on its hub page, then: hf auth login",
        )
    elif base.gated:
        yield ok("licence", f"{base.name} is gated; token of {base.account} is set")
    elif base.name in _OPEN_MODELS:
        yield ok("licence", "Apache-2.0, no token needed")
    elif base.licence:
        yield ok("licence", f"{base.licence}, no token needed")


def _source(source: Source) -> Row:
    text = f"{source.name}: {source.detail}"
    if source.state == "missing":
        key = {"base model": "model.base", "training data": "data.train"}.get(source.role)
        key = key or ("data.validation" if source.role == "validation data" else "evaluation.tasks")
        local = "[demo_hellaswag]" if key == "evaluation.tasks" else "something local"
        way = "correct the path" if is_local(source.name) else "connect to the hub"
        way += "" if is_local(source.name) else " (HF_HUB_OFFLINE unset)"
        return fail(source.role, text, f"{way}, or set {key} to {local}")
    if source.state == "unknown":
        return warn(source.role, text, "make sure that stage 04 can reach the hub")
    return ok(source.role, text)


def _opened(finding: Finding) -> Row:
    """Return the row of an opened input; a refusal is told in stage 02's words."""
    error = finding.error
    if error is None and finding.fix:
        return warn(finding.role, finding.detail, finding.fix)
    if error is None:
        return ok(finding.role, finding.detail)
    found = f"{error.what}; expected: {error.expected}; found: {error.found}"
    return fail(finding.role, found, error.fix)
