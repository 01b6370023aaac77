"""Sharded training of the small model by two processes on a CPU, compared with one process's."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Mxfp4Config

from tests.conftest import ROOT
from tests.distributed.pool import free_port
from tests.examples.forms import train
from tests.examples.separate import MESSAGES

PROCESSES = 2


def environment_of(path: Path) -> dict[str, str]:
    """Return what `accelerate launch --config_file` adds to the environment, in fp32."""
    words = ["--config_file", str(path), "--num_processes", str(PROCESSES)]
    words += ["--mixed_precision", "no", "script.py"]
    arguments, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        _, found = prepare_deepspeed_cmd_env(arguments)
    else:
        found = prepare_multi_gpu_env(arguments)
    added = {name: value for name, value in found.items() if name.startswith(("ACCEL", "FSDP"))}
    return added | {"ACCELERATE_TORCH_DEVICE": "cpu"}


def run(python: str, path: Path, cases: list, base: Path, data: Path, out: Path, fused: bool):
    """Train cases, (front, trained, form, steps) each, in two processes; return their results."""
    given = {
        **{"cases": cases, "base": str(base), "data": str(data), "out": str(out), "fused": fused},
        **{"environment": environment_of(path), "batch": len(MESSAGES) // PROCESSES},
    }
    out.mkdir()
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    where["WORLD_SIZE"] = str(PROCESSES)
    started = [
        subprocess.Popen(
            [python, "-m", "tests.examples.sharded_rank", json.dumps(given)],
            env=os.environ | where | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(PROCESSES)
    ]
    told = [each.communicate(timeout=500)[0] for each in started]
    assert all(each.returncode == 0 for each in started), told[0][-6000:]
    return {case[:3]: json.loads((out / f"{'-'.join(case[:3])}.json").read_text())
            for case in cases}  # fmt: skip


def check_case(
    case: tuple[str, str, str, int], base: Path, folder: Path, sharded: dict[Any, dict[str, Any]]
) -> None:
    """Compare a case that two processes trained with the same training in one process.

    Args:
        case: see `run`.
        base: the model.
        folder: has `data.jsonl`, and under `sharded` what the two processes saved.
        sharded: what `run` returned.
    """
    front, trained, form, _ = case
    out = folder / "alone" / f"{front}-{trained}-{form}"
    check_losses(sharded[front, trained, form], train_alone(case, base, folder / "data.jsonl", out))
    if front == "transformers" and trained != "lora" and form == "padding-free":
        check_saved(folder / "sharded" / out.name, out, base, trained)


def check_losses(found: dict[str, Any], alone: Any) -> None:
    """Raise unless losses and gradient norms of two processes are those of one's trainer."""
    rows = [row for row in alone.state.log_history if "loss" in row]
    assert found["losses"] == pytest.approx([row["loss"] for row in rows], rel=1e-5)
    assert found["norms"] == pytest.approx([row["grad_norm"] for row in rows], rel=1e-5)
    assert found["whole"] == 0


def train_alone(case: tuple[str, str, str, int], base: Path, data: Path, out: Path) -> Any:
    """Train in this process and return the trainer."""
    *words, steps = case
    return train(*words, base, data, out, steps, len(MESSAGES))


def check_saved(sharded: Path, alone: Path, base: Path, trained: str) -> None:
    """Raise unless two processes saved what one did, and the checkpoint opens as it is.

    Every trained tensor must have changed as in one process, sinks and routers included; packed
    experts must not.
    """
    found, expected = (load_file(path / "model.safetensors") for path in (sharded, alone))
    opened, info = AutoModelForCausalLM.from_pretrained(sharded, output_loading_info=True)
    assert not any(info.values()) and found.keys() == expected.keys()
    for name, tensor in opened.state_dict().items():
        assert torch.equal(tensor, found[name]), name
    unpacked = Mxfp4Config(dequantize=True)
    before = AutoModelForCausalLM.from_pretrained(base, quantization_config=unpacked)
    before = before.state_dict()
    assert any(name.endswith("self_attn.sinks") for name in found)
    for name, tensor in found.items():
        if not tensor.is_floating_point():
            assert trained == "dense" and torch.equal(tensor, expected[name]), name
            continue
        change, difference = expected[name] - before[name], tensor - expected[name]
        assert change.norm() > 0, name
        # Adam's first steps are of the gradient's sign, which rounding turns where it is near 0.
        assert difference.norm() < 0.03 * change.norm(), name
