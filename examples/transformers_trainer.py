#!/usr/bin/env python3
"""Fine-tune gpt-oss with transformers' Trainer on this project's attention, layers and loss.

    python examples/transformers_trainer.py MODEL DATA --out DIR           LoRA, 4-bit experts
    python examples/transformers_trainer.py MODEL DATA --out DIR --full    all parameters, bf16

MODEL is a directory or a name on the hub, such as openai/gpt-oss-20b; DATA has a line of JSON for
each conversation, {"messages": [...]}. All tokens are supervised. The conversations of a batch are
laid end to end without padding; their position ids restart, by which the attention separates them.
tests/examples/test_transformers_trainer.py compares the loss with that of separate conversations.
With --full, experts, routers, sinks, embedding and lm_head are trained too: 16 bytes a parameter
with AdamW, so several GPUs and examples/accelerate/ for the 20b model.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import sparselong

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32


def open_model(name: str, full: bool):
    """Return the model to train: unpacked with --full, else frozen with LoRA on attention."""
    options = {"attn_implementation": "sparselong", "dtype": DTYPE}
    if full:
        unpacked = transformers.Mxfp4Config(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(name, quantization_config=unpacked, **options)
        sparselong.fuse(model)  # not chunk_loss, which needs a frozen lm_head
        model._weight_conversions = []  # or all layers' experts are saved as one: docs/upstream.md
        return model.to(DTYPE)  # transformers unpacks to bf16 whatever dtype it is given
    config = sparselong.packed_config(name)
    model = AutoModelForCausalLM.from_pretrained(name, config=config, **options)
    sparselong.chunk_loss(model)  # packed models are fused already
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS))


def train(
    model: str, data: Path, out: Path, full: bool, steps: int, batch: int
) -> transformers.Trainer:
    """Train for `steps` steps of `batch` conversations a GPU, and save the result."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [json.loads(line)["messages"] for line in data.read_bytes().splitlines()]
    tokens = tokenizer.apply_chat_template(rows)["input_ids"]
    arguments = transformers.TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=1e-5 if full else 2e-4,
        gradient_checkpointing=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    dataset = [{"input_ids": each} for each in tokens]
    flatten = transformers.DataCollatorWithFlattening()
    trainer = transformers.Trainer(open_model(model, full), arguments, flatten, dataset)  # type: ignore
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=4)
    train(**vars(parser.parse_args()))
