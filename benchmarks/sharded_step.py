"""A gpt-oss of which several processes train shards, for `sharded_full.py`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import GptOssConfig, GptOssForCausalLM

import sparselong
from benchmarks.shape_20b import config_20b

ATTENTION = {"ours": "sparselong", "eager": "eager", "flex": "flex_attention"}
Step = Callable[[torch.Tensor], tuple[float, float]]
"""Makes an optimizer step on this process's rows and returns (loss, gradient norm) of all."""


def config_of(args: argparse.Namespace) -> GptOssConfig:
    """Return the model's configuration."""
    if args.shape == "20b":
        return config_20b(args.layers)
    return GptOssConfig(
        **{"num_hidden_layers": args.layers, "hidden_size": 128, "intermediate_size": 128},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64},
        **{"num_local_experts": 4, "vocab_size": 512, "sliding_window": 16},
    )


def open_model(args: argparse.Namespace, device: torch.device) -> Any:
    """Return the model in fp32; every process draws the same weights."""
    torch.manual_seed(0)
    with device:
        model = GptOssForCausalLM._from_config(
            config_of(args), attn_implementation=ATTENTION[args.attention]
        )
    if args.attention == "ours":
        sparselong.fuse(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def make_step(args: argparse.Namespace, device: torch.device) -> Step:
    """Return the step of a new model, which is sharded in the way that `args` names."""
    model, size = open_model(args, device), dist.get_world_size()
    is_bf16 = args.shape == "20b"
    if args.way == "zero3":
        return _zero3_step(model, args, is_bf16)
    dtype = torch.bfloat16 if is_bf16 else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    mesh = init_device_mesh(device.type, (size,))
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0)

    def step(rows: torch.Tensor) -> tuple[float, float]:
        total = torch.zeros((), device=device)
        for tokens in rows.split(1):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss / len(rows)
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        optimizer.step()
        optimizer.zero_grad()
        return _mean(total), float(norm)

    return step


def _zero3_step(model: Any, args: argparse.Namespace, is_bf16: bool) -> Step:
    import deepspeed

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0)
    batch = args.rows // dist.get_world_size()
    settings = {
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": is_bf16},
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": batch,
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)

    def step(rows: torch.Tensor) -> tuple[float, float]:
        losses = []
        for tokens in rows.split(1):
            losses.append(engine(input_ids=tokens, labels=tokens, use_cache=False).loss)
            engine.backward(losses[-1])
            engine.step()
        return _mean(torch.stack(losses).mean().detach()), float(engine.get_global_grad_norm())

    return step


def _mean(value: torch.Tensor) -> float:
    """Return the mean over processes."""
    dist.all_reduce(value := value.float().clone())
    return float(value / dist.get_world_size())
