#!/usr/bin/env python3
"""Fine-tune a compressed gpt-oss in one file: stage 03 without Axolotl and without a run directory.

    python 02_compress.py --config configs/tiny.yaml --run-dir runs/demo
    python examples/train_in_one_file.py runs/demo/02_compress runs/demo/data/train.jsonl --out mine

Read from `train` down. The model is gpt-oss with MXFP4 experts (4 bits a weight) and 4-bit 2:4
attention projections (two of every four weights kept). In a *masked LoRA*, the low-rank product is
added to stage 02's dense master weight, and the sum is masked and rounded before it multiplies, so
what is trained is what is stored. *Mask upkeep* reselects the 2:4 masks at regular intervals.

Each step's loss equals stage 03's with the same settings; tests/stages/test_example.py checks this.
Only stage 03 has checkpoints and resuming, evaluation and the choice of the best step, gradient
accumulation and checkpointing, adapters on experts and router, and several GPUs.

Shape suffixes of tensors: B packs in a batch, T tokens in a pack. `labels_BT[b, t]` is the token at
`t` itself if it is supervised, else IGNORED; the model predicts it from the tokens before `t`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from datetime import date
from itertools import count
from pathlib import Path

import numpy
import torch
from transformers import get_cosine_schedule_with_warmup

import sparselong
from sparselong.adapters import (
    Masters,
    add_masked_lora,
    bake_checkpoint,
    masked_layers,
    tuned_layers,
    update_steps,
)
from sparselong.data import conversations
from sparselong.finetune import EpochOrder, make_batches
from sparselong.model import NAME, document_masks, load_model, load_tokenizer

RANK, ALPHA, TARGETS = 16, 32.0, ("q_proj", "k_proj", "v_proj", "o_proj")
PACKS, LENGTH = 4, 256  # B and T
LEARNING_RATE, WARMUP, MAX_GRADIENT = 2e-3, 0.03, 1.0
UPDATE_FREQUENCY, SEED, IGNORED = 0.05, 42, -100  # reselect masks after every 5 % of the steps

Row = tuple[list[int], list[int]]  # a conversation's tokens and labels


def train(compressed: Path, data: Path, steps: int, out: Path | None = None) -> Iterator[float]:
    """Train for `steps` steps; yield each step's loss in nats per supervised token.

    Args:
        compressed: stage 02's folder: `model/` (packed), `masters/` (dense bf16), `manifest.json`.
        data: JSON lines of `{"messages": [...]}`.
        steps: optimizer steps; learning rate schedule and mask updates depend on their number.
        out: where to write the fine-tuned model, in the same compressed format.
    """
    attention = NAME if torch.cuda.is_available() else "eager"
    base = load_model(compressed / "model", attn_implementation=attention)
    tokenizer = load_tokenizer(compressed / "model")
    manifest = (compressed / "manifest.json").read_text(encoding="utf-8")
    today = date.fromisoformat(json.loads(manifest)["date"])
    sparselong.chunk_loss(base)  # never holds a whole batch's logits in memory
    master_of = Masters(compressed / "masters").read
    model, _ = add_masked_lora(
        base, targets=TARGETS, r=RANK, alpha=ALPHA, master_of=master_of, seed=SEED
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, int(WARMUP * steps), steps)
    updates = set(update_steps(steps, UPDATE_FREQUENCY))
    batches = make_epochs(read_rows(data, tokenizer, today), tokenizer.pad_token_id)

    model.train()
    for step in range(1, steps + 1):
        tokens_BT, labels_BT, positions_BT = (t.to(base.device) for t in next(batches))
        # Our attention separates packed conversations by their positions; eager needs masks.
        masks = None if attention == NAME else document_masks(base.config, positions_BT, base.dtype)
        loss = model(
            input_ids=tokens_BT,
            labels=labels_BT,
            position_ids=positions_BT,
            attention_mask=masks,
            num_items_in_batch=(labels_BT[:, 1:] != IGNORED).sum(),
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, MAX_GRADIENT)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step in updates:
            for layer in masked_layers(model).values():
                layer.update("hysteresis")
        yield loss.item()
    if out:
        bake_checkpoint(compressed / "model", tuned_layers(model), out)


def read_rows(path: Path, tokenizer, today: date) -> list[Row]:
    """Return the conversations that fit into a pack; only assistant tokens are supervised."""
    rows, found = [], conversations.read(path)
    for number in numpy.random.default_rng(SEED).permutation(len(found)):  # Axolotl's shuffle
        tokens, learned = conversations.tokenize(found[number], tokenizer, "assistant", today)
        if len(tokens) <= LENGTH:
            labels = [t if yes else IGNORED for t, yes in zip(tokens, learned, strict=True)]
            rows.append((tokens, labels))
    return rows


def make_epochs(rows: list[Row], padding: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield (tokens_BT, labels_BT, positions_BT) forever, each conversation once per epoch."""
    lengths = [len(tokens) for tokens, _ in rows]
    batches = make_batches(lengths, LENGTH, PACKS, SEED)
    order = EpochOrder(len(batches), SEED)
    for epoch in count():
        order.set_epoch(epoch)
        for (number,) in order:
            yield fill_batch([[rows[row] for row in pack] for pack in batches[number]], padding)


def fill_batch(packs: list[list[Row]], padding: int) -> tuple[torch.Tensor, ...]:
    """Return (tokens_BT, labels_BT, positions_BT); positions restart with each conversation."""
    tokens_BT = torch.full((len(packs), LENGTH), padding)
    labels_BT = torch.full_like(tokens_BT, IGNORED)
    positions_BT = torch.zeros_like(tokens_BT)
    for b, pack in enumerate(packs):
        start = 0
        for tokens, labels in pack:
            end = start + len(tokens)
            tokens_BT[b, start:end] = torch.tensor(tokens)
            labels_BT[b, start:end] = torch.tensor(labels)
            positions_BT[b, start:end] = torch.arange(len(tokens))
            start = end
    return tokens_BT, labels_BT, positions_BT


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("compressed", type=Path, help="stage 02's folder, runs/NAME/02_compress")
    parser.add_argument("data", type=Path, help="JSON lines of conversations")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, help="folder for the fine-tuned model")
    args = parser.parse_args()
    for number, loss in enumerate(train(**vars(args)), 1):
        print(f"step {number}/{args.steps}: loss {loss:.4f}", flush=True)
