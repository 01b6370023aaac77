#!/usr/bin/env python3
"""Fine-tune gpt-oss with TRL's SFTTrainer, LoRA and experts in 4 bits, on assistant tokens only.

    python examples/trl_sft.py MODEL DATA --out DIR                   conversations packed (bfd)
    python examples/trl_sft.py MODEL DATA --out DIR --padding-free    a batch laid end to end

MODEL and DATA are as for examples/transformers_trainer.py. TRL passes position ids that restart
with each conversation, by which the attention separates them; TRL warns that it does not know this
attention. tests/examples/test_trl_sft.py compares the loss with that of separate conversations.
TRL recognizes the published chat template and marks the assistant's tokens in it; it refuses
another one that has no {% generation %}. The loss is TRL's own chunked one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

import sparselong

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
IS_GPU = torch.cuda.is_available()


def train(
    model: str, data: Path, out: Path, padding_free: bool, steps: int, batch: int, length: int
) -> SFTTrainer:
    """Train for `steps` steps of `batch` conversations a GPU, or packed rows; save the adapter.

    A packed row has `length` tokens; longer conversations are cut.
    """
    opened = AutoModelForCausalLM.from_pretrained(
        model,
        config=sparselong.packed_config(model),
        attn_implementation="sparselong",
        dtype=torch.bfloat16 if IS_GPU else torch.float32,
    )
    arguments = SFTConfig(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=2e-4,
        packing=not padding_free,
        padding_free=padding_free,
        max_length=None if padding_free else length,
        assistant_only_loss=True,
        router_aux_loss_coef=0.0,  # by default TRL adds the routers' loss, but they are frozen
        bf16=IS_GPU,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    trainer = SFTTrainer(
        opened,
        arguments,
        train_dataset=load_dataset("json", data_files=str(data), split="train"),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS),
    )
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--padding-free", action="store_true")
    for name, default in (("steps", 60), ("batch", 1), ("length", 4096)):
        parser.add_argument(f"--{name}", type=int, default=default)
    train(**vars(parser.parse_args()))
