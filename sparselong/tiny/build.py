"""A small gpt-oss, built and trained locally, for machines without a GPU and for tests.

It is transformers' own GptOssForCausalLM with every feature of gpt-oss: layers that alternate
between sliding-window and full attention, a learned sink per head, YaRN RoPE, biases, and a router
that sends each token to four experts. Only its dimensions are smaller. It is stored exactly like
openai/gpt-oss (`checkpoint.py`), so code that handles it also handles the published models.

An untrained model would not do: its perplexity cannot get worse, so no pruning error would show. A
minute of training on the standard library's documentation (`sparselong.data.corpus`) makes
attention matter: `measure` reports how much is lost without it, and under a random 2:4 mask. Some
of the text is rendered as harmony conversations, so that the model learns the special tokens and
turns. Training is in fp32; the measured model is the one rounded for storage.

Left out: dropout, a router loss, evaluation during training, devices other than the CPU.
"""

import json
import math
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GptOssConfig, GptOssForCausalLM, PreTrainedTokenizerFast

from sparselong.data import corpus, demo
from sparselong.errors import StageError
from sparselong.files import load_json, write_atomically
from sparselong.tiny.checkpoint import write_configs, write_weights
from sparselong.tiny.measure import measure
from sparselong.tiny.tokenizer import train_tokenizer

RECORD = "tiny.json"
_RECIPE = 1  # increment when the same spec and seed would give a different model
_CONVERSATION_SHARE = 0.12
_WARMUP_SHARE = 0.1
_WEIGHT_DECAY = 0.1
_MAX_POSITIONS = 131_072


@dataclass(frozen=True)
class TinySpec:
    """Architecture and training of the small model.

    Attributes:
        layers: decoder layers; odd ones use full attention, even ones the sliding window.
        hidden: width of the residual stream, divisible by 32.
        intermediate: width of an expert, divisible by 32.
        heads: query heads, with head_dim 64.
        kv_heads: KV heads, with head_dim 64.
        experts: experts per layer, at least 4; each token is routed to four.
        sliding_window: keys visible to a token in a sliding-window layer, including itself.
        vocab_size: tokens, including the nine special ones.
        steps: optimizer steps; 0 keeps the random initialization.
        batch_sequences: sequences per step.
        sequence_len: tokens per sequence.
        learning_rate: peak after a linear warm-up, before a cosine decay to a twentieth.
    """

    layers: int = 4
    hidden: int = 128
    intermediate: int = 128
    heads: int = 4
    kv_heads: int = 2
    experts: int = 8
    sliding_window: int = 64
    vocab_size: int = 2048
    steps: int = 600
    batch_sequences: int = 4
    sequence_len: int = 256
    learning_rate: float = 5e-3

    def __post_init__(self) -> None:
        for name, value, divisor in (
            ("hidden", self.hidden, 32),
            ("intermediate", self.intermediate, 32),
            ("heads", self.heads, self.kv_heads),
        ):
            if value <= 0 or value % divisor:
                raise ValueError(f"TinySpec.{name} must be divisible by {divisor}, not {value}")
        if self.layers < 1 or self.experts < 4 or self.steps < 0:
            raise ValueError(f"TinySpec needs layers >= 1, experts >= 4, steps >= 0: {self}")


def build_tiny(
    out_dir: Path,
    spec: TinySpec | None = None,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Build the checkpoint unless `out_dir` already contains it, and return its folder.

    It is built next to `out_dir` and then renamed, so a folder of that name is always complete. The
    same spec, seed, machine, thread count and Python give bit-identical weights. `tiny.json` in the
    folder records the spec, the seed, the training and, after training, the results of `measure`.

    Args:
        out_dir: the checkpoint's folder; a different small model in it is replaced.
        spec: architecture and training; the default takes one to two minutes on two cores.
        seed: decides initialization, order of the text and conversations.
        progress: called with occasional lines of text; None prints to stderr.

    Raises:
        StageError: `out_dir` contains something else, or there is no text to train on.
    """
    spec = spec or TinySpec()
    say = progress or (lambda message: print(message, file=sys.stderr))
    if is_built(out_dir, spec, seed):
        return out_dir
    wanted = _identity(spec, seed)
    record = read_record(out_dir)
    if record is None and out_dir.exists() and any(out_dir.iterdir()):
        raise StageError(
            f"the small model cannot be written to {out_dir}",
            "a folder that does not exist, is empty, or contains an earlier small model",
            "files without a readable tiny.json",
            "choose another folder, or remove this one if it is not needed",
        )
    building = out_dir.with_name(out_dir.name + ".building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    training = _build(building, spec, seed, say)
    metrics = measure(building) if spec.steps else None
    record = {**wanted, "training": training, "metrics": metrics}
    write_atomically(building / RECORD, json.dumps(record, indent=2) + "\n")
    if out_dir.exists():
        shutil.rmtree(out_dir)
    building.rename(out_dir)
    return out_dir


def build_tokenizer(spec: TinySpec) -> PreTrainedTokenizerFast:
    """Return the small model's tokenizer, which needs no trained model and takes seconds.

    Raises:
        StageError: there is no text to train on.
    """
    return train_tokenizer(corpus.texts("train"), spec.vocab_size, _MAX_POSITIONS)


def is_built(folder: Path, spec: TinySpec, seed: int) -> bool:
    """Return whether the folder contains the small model of this spec and seed."""
    record, wanted = read_record(folder), _identity(spec, seed)
    return record is not None and {key: record.get(key) for key in wanted} == wanted


def _identity(spec: TinySpec, seed: int) -> dict[str, Any]:
    return {"recipe": _RECIPE, "spec": asdict(spec), "seed": seed}


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return the content of the folder's tiny.json, or None if it is missing or damaged."""
    try:
        return load_json(folder / RECORD)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def _build(folder: Path, spec: TinySpec, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Train and write tokenizer and model; return what to record about the training."""
    training_texts = corpus.texts("train")
    tokenizer = build_tokenizer(spec)
    with torch.random.fork_rng(devices=[]), _deterministic_algorithms():
        torch.manual_seed(seed)
        model = _initialise(spec, tokenizer)
        started_wall, started_cpu = time.monotonic(), time.process_time()
        losses: list[float] = []
        if spec.steps:
            tokens = encode_corpus(tokenizer, training_texts, seed)
            losses = _train(model, tokens, spec, say)
    write_weights(model, folder)
    write_configs(model, folder)
    tokenizer.save_pretrained(folder)
    return {
        "tokens": spec.steps * spec.batch_sequences * spec.sequence_len,
        "final_loss": sum(losses[-20:]) / len(losses[-20:]) if losses else None,
        "seconds": round(time.monotonic() - started_wall, 1),
        "cpu_seconds": round(time.process_time() - started_cpu, 1),
    }


@contextmanager
def _deterministic_algorithms() -> Iterator[None]:
    """Make sums of gathered rows' gradients independent of thread timing inside the block."""
    before = torch.are_deterministic_algorithms_enabled()
    fill_before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill_before


def _initialise(spec: TinySpec, tokenizer: Any) -> GptOssForCausalLM:
    config = GptOssConfig(
        num_hidden_layers=spec.layers,
        hidden_size=spec.hidden,
        intermediate_size=spec.intermediate,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        head_dim=64,
        num_local_experts=spec.experts,
        num_experts_per_tok=4,
        sliding_window=spec.sliding_window,
        vocab_size=spec.vocab_size,
        max_position_embeddings=_MAX_POSITIONS,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config._attn_implementation = "eager"
    model = GptOssForCausalLM(config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            _initialise_parameter(name, value, spec.layers)
    return model


def _initialise_parameter(name: str, value: torch.Tensor, layers: int) -> None:
    """Initialize with fan-in scaling, wide sinks and nonzero biases; norms stay one."""
    if "norm" in name:
        return
    if name.endswith("sinks"):
        std = 1.0
    elif name.endswith("bias"):
        std = 0.05
    elif "embed_tokens" in name:
        std = 0.5
    else:  # experts [E, in, out], others [out, in]
        std = value.shape[1] ** -0.5
    if name.endswith(("o_proj.weight", "experts.down_proj")):
        std /= math.sqrt(2 * layers)
    value.normal_(0.0, std)


def encode_corpus(
    tokenizer: PreTrainedTokenizerFast, training_texts: list[str], seed: int
) -> torch.Tensor:
    """Return documents and harmony conversations, shuffled, as one token stream, int64 [T]."""
    shuffled = random.Random(seed)
    plain = [f"{text}<|endoftext|>" for text in training_texts]
    share = _CONVERSATION_SHARE / (1 - _CONVERSATION_SHARE)
    conversations, room_bytes = [], share * sum(len(text) for text in plain)
    for messages in demo.continuation_conversations(seed):
        rendered = tokenizer.apply_chat_template(messages, tokenize=False)
        conversations.append(rendered)
        room_bytes -= len(rendered)
        if room_bytes < 0:
            break
    pieces = plain + conversations
    shuffled.shuffle(pieces)
    encoded = tokenizer(pieces, add_special_tokens=False)["input_ids"]
    return torch.tensor([token for ids in encoded for token in ids])


def _train(
    model: GptOssForCausalLM, tokens: torch.Tensor, spec: TinySpec, say: Callable[[str], None]
) -> list[float]:
    """Train for `spec.steps` and return the loss of every step in nats per token."""
    sequences = tokens[: len(tokens) // spec.sequence_len * spec.sequence_len]
    sequences = sequences.view(-1, spec.sequence_len)
    needed = spec.steps * spec.batch_sequences
    passes = math.ceil(needed / len(sequences))
    order = torch.cat([torch.randperm(len(sequences)) for _ in range(passes)])
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=spec.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=_WEIGHT_DECAY,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _learning_rate_factor(step, spec.steps)
    )
    model.train()
    losses, started = [], time.monotonic()
    for step in range(spec.steps):
        batch = sequences[order[step * spec.batch_sequences : (step + 1) * spec.batch_sequences]]
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 50 == 0 or step + 1 == spec.steps:
            recent = sum(losses[-50:]) / len(losses[-50:])
            seconds = time.monotonic() - started
            say(f"small model: step {step + 1}/{spec.steps}  loss {recent:.3f}  {seconds:.0f} s")
    model.eval()
    return losses


def _learning_rate_factor(step: int, steps: int) -> float:
    warmup = max(1, round(_WARMUP_SHARE * steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))
