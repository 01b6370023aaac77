"""examples/axolotl_lora.yaml on the small model: the loss of separate conversations, packed."""

import json
import subprocess

import pytest
import yaml
from transformers import AutoTokenizer

from sparselong.processes import process
from tests.conftest import ROOT, write_rows
from tests.examples.separate import MESSAGES, separate_loss

EXAMPLE = yaml.safe_load((ROOT / "examples/axolotl_lora.yaml").read_text(encoding="utf-8"))
CPU = {"bf16": False, "tf32": False, "optimizer": "adamw_torch", "torch_dtype": "float32"}
SMALL = {"max_steps": 2, "gradient_accumulation_steps": 1, "sequence_len": 1024}
RUN = "from axolotl.cli.main import cli; cli(standalone_mode=False)"


def axolotl(python: str, folder, document: dict) -> subprocess.CompletedProcess:
    path = folder / "axolotl.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    command = [python, "-c", RUN, "train", str(path), "--launcher", "python"]
    environment = process._environment()  # offline; as stage 03's, to share its imports
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)


def test_the_first_loss_is_that_of_separate_conversations(untrained_base, tmp_path, forked_python):
    tokenizer = AutoTokenizer.from_pretrained(untrained_base)
    rows = [tokenizer.apply_chat_template(row["messages"])["input_ids"] for row in MESSAGES]
    # Axolotl itself would predict a row's first token from the conversation before it.
    labels = [[-100, *row[1:]] for row in rows]
    tokens = [
        {"input_ids": row, "labels": label, "attention_mask": [1] * len(row)}
        for row, label in zip(rows, labels, strict=True)
    ]
    data = write_rows(tmp_path / "tokens.jsonl", tokens)
    document = EXAMPLE | CPU | SMALL | {
        "base_model": str(untrained_base),
        "datasets": [{"path": str(data), "ds_type": "json", "type": None}],
        "output_dir": str(tmp_path / "out"),
        "dataset_prepared_path": str(tmp_path / "prepared"),
    }  # fmt: skip
    done = axolotl(forked_python, tmp_path, document)
    told = done.stdout + done.stderr
    assert done.returncode == 0, told[-3000:]
    assert "sparselong: 4 layers' experts in 4 bits, attention sparselong, 4 fused layers" in told
    state = json.loads((tmp_path / "out/checkpoint-2/trainer_state.json").read_text())
    losses = [row["loss"] for row in state["log_history"] if "loss" in row]
    expected = separate_loss(untrained_base, rows, [[1] * len(row) for row in rows])
    assert losses[0] == pytest.approx(expected, rel=1e-5) and len(losses) == 2
    assert (tmp_path / "out/adapter_model.safetensors").is_file()


def test_axolotls_context_parallelism_is_refused_with_the_way_to_ours(tmp_path, forked_python):
    done = axolotl(forked_python, tmp_path, EXAMPLE | CPU | {"context_parallel_size": 2})
    assert done.returncode != 0
    assert "context_parallel_size: 2 cannot be used with gpt-oss" in done.stderr
    assert "python 03_finetune.py sequence_parallel_degree=2" in done.stderr


def test_ligers_kernels_are_refused_by_name(tmp_path, forked_python):
    liger = {"plugins": [*EXAMPLE["plugins"], "axolotl.integrations.liger.LigerPlugin"]}
    done = axolotl(forked_python, tmp_path, EXAMPLE | CPU | liger | {"liger_rms_norm": True})
    assert done.returncode != 0
    assert "liger_rms_norm would not be used" in done.stderr
    assert "remove liger_rms_norm" in done.stderr
