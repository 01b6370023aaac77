"""Fine-tuning a compressed model, with the modules and the step of stage 03.

All arms train the same rows in the same order for the same number of steps, with LoRA of the same
rank on the same projections; only masks and loss differ:

    dense      the uncompressed attention: the ceiling
    static     masks stay those of stage 02
    dynamic    masks are updated after each 5 % of the steps, as stage 03 does
    learned    masks are updated after each step, and gradients also reach dropped weights
               (straight-through), so that they can win

With distillation a part of the loss is the divergence of the model's next tokens from those of a
teacher that reads the same conversations, over the supervised tokens: the base, which knows nothing
of the new data, or the fine-tuned ceiling, which takes another fine-tuning.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

import torch
from torch.nn import functional
from transformers import get_cosine_schedule_with_warmup

from benchmarks.compared.compressing import Compressed
from sparselong.adapters import (
    MaskedLoraLinear,
    Masters,
    add_masked_lora,
    masked_layers,
    update_steps,
)
from sparselong.evaluate.perplexity import Sample
from sparselong.finetune import EpochOrder, make_batches
from sparselong.kernels.dense import sum_weight
from sparselong.model import NAME, FusedAttention, document_masks, load_model
from sparselong.model.fused import causal_loss
from sparselong.parallel import shift_labels

IGNORED, MAX_GRADIENT, WARMUP = -100, 1.0, 0.03
Masks = Literal["dense", "static", "dynamic", "learned"]
FREQUENCY: dict[Masks, float] = {"dense": 0.0, "static": 0.0, "dynamic": 0.05}
"""Interval between mask updates as a fraction of the steps; learned masks: every step."""


@dataclass(frozen=True)
class Settings:
    """What all arms share.

    Attributes:
        steps: optimizer steps.
        packs: packs of a step.
        length: tokens of a pack.
        rate: peak learning rate.
        rank: of the adapters; alpha is twice that.
    """

    steps: int
    packs: int
    length: int
    rate: float
    rank: int = 16


@dataclass(frozen=True)
class Arm:
    """One way of fine-tuning.

    Attributes:
        masks: what becomes of the masks.
        distilled: weight of the divergence from the teacher; the rest is the labels'.
        teacher: who that is.
    """

    masks: Masks
    distilled: float = 0.0
    teacher: Literal["base", "ceiling"] = "base"


def attention() -> str:
    """Return the name of the attention with which models are opened on this machine."""
    return NAME if torch.cuda.is_available() else "eager"


def tune(
    start: Compressed,
    rows: Sequence[Sample],
    arm: Arm,
    settings: Settings,
    seed: int,
    teacher: Any,
) -> tuple[Any, list[float]]:
    """Return the fine-tuned model, and the loss of each step.

    Args:
        start: stage 02's result.
        rows: conversations.
        arm: masks and loss.
        settings: steps and sizes.
        seed: order of the rows, and the adapters' initial values.
        teacher: a GptOssForCausalLM with the same vocabulary.
    """
    base = load_model(start.model, attn_implementation=attention())
    model, _ = add_masked_lora(
        base,
        targets=("q_proj", "k_proj", "v_proj", "o_proj"),
        r=settings.rank,
        alpha=2.0 * settings.rank,
        master_of=Masters(start.masters).read,
        seed=seed,
    )
    if arm.masks == "learned":
        learn_masks(base)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.rate, weight_decay=0.0)
    steps = settings.steps
    schedule = get_cosine_schedule_with_warmup(optimizer, int(WARMUP * steps), steps)
    updates = set(update_steps(steps, FREQUENCY.get(arm.masks, 1 / steps)))
    batches = make_batches_of(rows, settings, seed, int(base.config.pad_token_id))  # type: ignore[arg-type]
    losses = []
    model.train()
    for step in range(1, steps + 1):
        batch = [tensor.to(base.device) for tensor in next(batches)]
        loss = find_loss(base, teacher, batch, arm.distilled)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, MAX_GRADIENT)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step in updates:
            for layer in masked_layers(model).values():
                layer.update("hysteresis")
        losses.append(loss.detach())
    return base.eval(), torch.stack(losses).tolist()


def find_loss(
    student: Any, teacher: Any, batch: Sequence[torch.Tensor], distilled: float
) -> torch.Tensor:
    """Return the loss of a batch: tokens, labels and positions, int64 [packs, length] each."""
    tokens, labels, positions = batch
    masks = None
    if student.config._attn_implementation != NAME:
        masks = document_masks(student.config, positions, student.dtype)
    given = {"position_ids": positions, "attention_mask": masks, "use_cache": False}
    hidden = student.model(tokens, **given).last_hidden_state
    loss = causal_loss(hidden, student.lm_head, labels)
    if not distilled:
        return loss
    with torch.no_grad():
        reference = teacher.model(tokens, **given).last_hidden_state
    counted = shift_labels(labels) != IGNORED
    logits = functional.linear(hidden[counted], student.lm_head.weight)
    expected = functional.linear(reference[counted], teacher.lm_head.weight)
    return (1 - distilled) * loss + distilled * divergence(expected, logits)


def divergence(expected: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Return the mean divergence from the teacher in nats; logits [tokens, vocabulary]."""
    theirs, ours = (each.float().log_softmax(-1) for each in (expected, logits))
    return functional.kl_div(ours, theirs, log_target=True, reduction="batchmean")


def make_batches_of(
    rows: Sequence[Sample], settings: Settings, seed: int, padding: int
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield tokens, labels and positions forever; each row once per epoch, in stage 03's order."""
    lengths = [len(row.input_ids) for row in rows]
    batches = make_batches(lengths, settings.length, settings.packs, seed)
    order = EpochOrder(len(batches), seed)
    for epoch in count():
        order.set_epoch(epoch)
        for (number,) in order:
            packs = [[rows[row] for row in pack] for pack in batches[number]]
            yield fill_batch(packs, settings.length, padding)


def fill_batch(
    packs: Sequence[Sequence[Sample]], length: int, padding: int
) -> tuple[torch.Tensor, ...]:
    """Return tokens, labels and positions, int64 [packs, length]; positions restart with a row."""
    tokens = torch.full((len(packs), length), padding)
    labels, positions = torch.full_like(tokens, IGNORED), torch.zeros_like(tokens)
    for number, pack in enumerate(packs):
        start = 0
        for row in pack:
            place = (number, slice(start, start + len(row.input_ids)))
            tokens[place] = torch.tensor(row.input_ids)
            labels[place] = torch.where(torch.tensor(row.supervised), tokens[place], IGNORED)
            positions[place] = torch.arange(len(row.input_ids))
            start = place[1].stop
    return tokens, labels, positions


def learn_masks(model: torch.nn.Module) -> None:
    """Make gradients of a model's masked layers reach dropped weights too."""
    for module in model.modules():
        if isinstance(module, FusedAttention):
            module.joined = None  # its one product has the gradients of kept weights alone
        if isinstance(module, MaskedLoraLinear):
            module.forward = types.MethodType(_forward_straight, module)


def _forward_straight(layer: MaskedLoraLinear, x: torch.Tensor) -> torch.Tensor:
    """Apply the layer's rounded weight; its gradient is that of the sum M + s·B·A, unchanged."""
    weight = sum_weight(layer.master, *layer.adapter())
    weight = weight + (layer.effective_weight().float() - weight).detach()
    bias: Any = layer.base_layer.bias
    return functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
