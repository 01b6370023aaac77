"""examples/axolotl_lora.yaml on the small model, by one or two processes on a CPU."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoTokenizer

from sparselong.processes import process
from tests.conftest import ROOT, write_rows
from tests.distributed.pool import free_port
from tests.examples.separate import MESSAGES

EXAMPLE = yaml.safe_load((ROOT / "examples/axolotl_lora.yaml").read_text(encoding="utf-8"))
CPU = {"bf16": False, "tf32": False, "optimizer": "adamw_torch", "torch_dtype": "float32"}
SMALL = {"max_steps": 2, "gradient_accumulation_steps": 1, "include_tkps": True}
RUN = """
from axolotl.cli.main import cli
from torch._dynamo.utils import counters
cli(standalone_mode=False)
print("graphs:", counters["stats"].get("unique_graphs", 0))
"""
SHARDED = """
import os
os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
from accelerate import PartialState
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DistributedType
from sparselong.model.fused import FusedDecoderLayer
PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
build = ParallelismConfig.build_device_mesh
ParallelismConfig.build_device_mesh = lambda self, _: build(self, "cpu")
FusedDecoderLayer.forward = FusedDecoderLayer._forward_fused
"""
"""accelerate and Axolotl shard on GPUs only, and are made to take this CPU for one; layers compute
as on a GPU too."""
FORMS = ("packing", "padding-free", "padding")


def keys_of(form: str, rows: int) -> dict[str, Any]:
    """Return the YAML's keys for batches of one of FORMS, with `rows` conversations a process."""
    if form == "packing":
        return {"sequence_len": 1024 if rows == len(MESSAGES) else 320}
    keys = {"sample_packing": False, "micro_batch_size": rows, "sequence_len": 1024}
    if form == "padding":
        return keys
    # Axolotl flattens batches for attention of its own list only; the plugin replaces the name.
    return keys | {"batch_flattening": True, "attn_implementation": "flash_attention_2"}


def tokenize(base: Path, length: int | None = None) -> list[list[int]]:
    """Return the tokens of MESSAGES, cut to one length or as they are."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = [tokenizer.apply_chat_template(row["messages"])["input_ids"] for row in MESSAGES]
    return [row[:length] for row in rows]


def document_of(base: Path, folder: Path, rows: list[list[int]], **keys: Any) -> dict[str, Any]:
    """Write rows as data, all tokens supervised, and return the example's YAML for them."""
    # Axolotl itself would predict a row's first token from the conversation before it.
    labels = [[-100, *row[1:]] for row in rows]
    tokens = [
        {"input_ids": row, "labels": label, "attention_mask": [1] * len(row)}
        for row, label in zip(rows, labels, strict=True)
    ]
    data = write_rows(folder / "tokens.jsonl", tokens)
    return EXAMPLE | CPU | SMALL | keys | {
        "base_model": str(base),
        "datasets": [{"path": str(data), "ds_type": "json", "type": None}],
        "output_dir": str(folder / "out"),
        "dataset_prepared_path": str(folder / "prepared"),
    }  # fmt: skip


def axolotl(
    python: str, folder: Path, document: dict[str, Any], processes: int = 1
) -> list[subprocess.CompletedProcess]:
    """Run `axolotl train` and return the processes."""
    path = folder / "axolotl.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    environment = process._environment()  # offline; as stage 03's, to share its imports
    code = RUN
    if processes > 1:
        code = SHARDED + RUN
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        environment |= where | {"WORLD_SIZE": str(processes)}
    started = [
        subprocess.Popen(
            [python, "-c", code, "train", str(path), "--launcher", "python"],
            env=environment | ({"RANK": str(n), "LOCAL_RANK": str(n)} if processes > 1 else {}),
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in range(processes)
    ]
    told = [each.communicate(timeout=500) for each in started]
    return [
        subprocess.CompletedProcess(each.args, each.returncode, *streams)
        for each, streams in zip(started, told, strict=True)
    ]


def train(
    python: str, folder: Path, document: dict[str, Any], processes: int = 1
) -> tuple[list[dict[str, Any]], str]:
    """Return the logged steps and the first process's output, once Axolotl has trained and saved.

    Raises AssertionError unless it did, with our experts, attention and layers.
    """
    done = axolotl(python, folder, document, processes)
    told = done[0].stdout + done[0].stderr
    assert all(each.returncode == 0 for each in done), told[-3000:]
    assert "sparselong: 2 layers' experts in 4 bits, attention sparselong, 2 fused layers" in told
    state = json.loads((folder / "out/checkpoint-2/trainer_state.json").read_text())
    steps = [row for row in state["log_history"] if "loss" in row]
    assert len(steps) == 2 and steps[1]["loss"] < steps[0]["loss"]
    assert (folder / "out/adapter_model.safetensors").is_file()
    return steps, told
