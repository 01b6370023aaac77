#!/usr/bin/env python3
"""Fine-tune gpt-oss with transformers' Trainer on this project's attention, layers and loss.

    python examples/transformers_trainer.py MODEL DATA --out DIR --trained lora|dense|full

MODEL is a directory or a name on the hub, such as openai/gpt-oss-20b; DATA has a line of JSON for
each conversation, {"messages": [...]}. All tokens are supervised. The conversations of a batch are
laid end to end without padding; position ids, which restart, separate them for the attention.
lora   adapters on attention; all else is frozen
dense  all parameters but the experts' weights, which are frozen in 4 bits, as with lora
full   all parameters: several GPUs and examples/accelerate/ for the 20b model
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


def open_model(name: str, trained: str):
    """Return the model to train, whose parameters require gradients if they are trained."""
    options = {"attn_implementation": "sparselong", "dtype": DTYPE}
    if trained == "full":
        unpacked = transformers.Mxfp4Config(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(name, quantization_config=unpacked, **options)
        sparselong.fuse(model)  # not chunk_loss, which needs a frozen lm_head
        model._weight_conversions = []  # or all layers' experts are saved as one: docs/upstream.md
        return model.to(DTYPE)  # transformers unpacks to bf16 whatever dtype it is given
    options["config"] = sparselong.packed_config(name)
    model = AutoModelForCausalLM.from_pretrained(name, **options)  # fused already
    if trained == "dense":
        return model
    sparselong.chunk_loss(model)
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS))


def train(model: str, data: Path, out: Path, trained: str, steps: int, batch: int):
    """Train for `steps` steps of `batch` conversations a GPU, and save; return the trainer."""
    rows = [json.loads(line)["messages"] for line in data.read_bytes().splitlines()]
    tokens = AutoTokenizer.from_pretrained(model).apply_chat_template(rows)["input_ids"]
    arguments = transformers.TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=2e-4 if trained == "lora" else 1e-5,
        gradient_checkpointing=True,
        bf16=DTYPE == torch.bfloat16,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    dataset = [{"input_ids": each} for each in tokens]
    flatten = transformers.DataCollatorWithFlattening()
    trainer = transformers.Trainer(open_model(model, trained), arguments, flatten, dataset)
    trainer.train()
    trainer.model.hf_quantizer = None  # it discards gathered weights: docs/upstream.md
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--trained", choices=("lora", "dense", "full"), default="lora")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=4)
    train(**vars(parser.parse_args()))
