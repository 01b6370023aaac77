"""examples/accelerate/: FSDP2 over the small model, two processes as one; files are readable."""

import json
import os
import socket
import subprocess

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from transformers import GptOssForCausalLM

from tests.conftest import ROOT, write_rows
from tests.examples.separate import MESSAGES

PATH = ROOT / "examples/accelerate/fsdp2.yaml"
RANK = """
import json, os, runpy, sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer, DataCollatorWithFlattening

example, base, data = sys.argv[1:]
dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
model = runpy.run_path(example)["open_model"](base, True)
if size > 1:
    mesh = torch.distributed.init_device_mesh("cpu", (size,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert {type(parameter) for parameter in model.parameters()} == {DTensor}
rows = [json.loads(line)["messages"] for line in open(data)]
tokens = AutoTokenizer.from_pretrained(base).apply_chat_template(rows)["input_ids"]
count = sum(map(len, tokens)) - len(tokens)
batch = DataCollatorWithFlattening()([{"input_ids": each} for each in tokens[rank::size]])
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
found = []
for step in range(3):
    loss = model(**batch, num_items_in_batch=count / size).loss  # FSDP averages over ranks
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    optimizer.step()
    optimizer.zero_grad()
    total = loss.detach().clone()
    dist.all_reduce(total)
    found += [(total / size).item(), norm.item()]
if rank == 0:
    print(json.dumps(found))
dist.destroy_process_group()
"""


def train(python: str, words: list[str], size: int) -> list[float]:
    """Return loss and gradient norm of three steps, by `size` processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        where = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    started = [
        subprocess.Popen(
            [python, "-c", RANK, *words],
            env=os.environ | where | {"RANK": str(rank), "WORLD_SIZE": str(size)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    told = [each.communicate(timeout=240) for each in started]
    assert all(each.returncode == 0 for each in started), told[0][1][-3000:]
    return json.loads(told[0][0].splitlines()[-1])


def test_two_processes_train_as_one(untrained_base, tmp_path, forked_python):
    data = write_rows(tmp_path / "data.jsonl", MESSAGES)
    words = [str(ROOT / "examples/transformers_trainer.py"), str(untrained_base), str(data)]
    one = train(forked_python, words, 1)
    assert one[4] < one[0]
    assert train(forked_python, words, 2) == pytest.approx(one, rel=1e-4)


def test_accelerate_reads_the_files_and_the_model_has_the_layer():
    zero = load_config_from_file(str(PATH.with_name("zero3.yaml")))
    assert (zero.distributed_type, zero.deepspeed_config["zero_stage"]) == ("DEEPSPEED", 3)
    config = load_config_from_file(str(PATH))
    assert (config.distributed_type, config.fsdp_config["fsdp_version"]) == ("FSDP", 2)
    layer = config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"]
    assert layer in GptOssForCausalLM._no_split_modules
