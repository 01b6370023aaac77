"""Counts the memory that a training step of gpt-oss-20b's shape allocates, without a device.

Runs as a script in its own process, because it patches torch and Triton. Tensors are on the meta
device, so they have sizes but no contents; kernel launches do nothing; every storage is counted
from allocation to release. The code that runs is the code that trains on a GPU: checkpointing,
recomputation, autograd, and the launchers with their buffers.

    python tests/memory/simulated_step.py '[{"tokens": 4096, "layers": 4, "kept": true}]'

prints, for each case, [bytes of the weights, peak bytes once the weights are allocated].
"""

from __future__ import annotations

import contextlib
import gc
import json
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import triton
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GptOssForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

from benchmarks import shape_20b
from sparselong.adapters.lora import MaskedLoraLinear
from sparselong.checkpoint.format import PROJECTIONS
from sparselong.kernels import gpu
from sparselong.kernels.attention import op as attention
from sparselong.kernels.experts import choice
from sparselong.kernels.experts import op as experts_op
from sparselong.kernels.layer import cross_entropy
from sparselong.model import attention as door
from sparselong.model import fused
from sparselong.model.packed_experts import PackedExperts
from sparselong.model.quantizer import replace_with_packed
from sparselong.model.row_slices import slice_rows
from sparselong.packing import dense
from sparselong.runtime import DeviceInputs, HostInputs
from sparselong.runtime.recompute import checkpoint_layers
from sparselong.runtime.settings import using

ROUNDED_TO = 512


class UncountedHost(HostInputs):
    """Inputs in host memory that takes no bytes, and is not copied to."""

    def _copy(self, *_: object) -> None:
        pass

    def _host_memory(self, like: torch.Tensor) -> torch.Tensor:
        return like.new_empty(1).as_strided(like.shape, [0] * like.dim())


class Counter(TorchDispatchMode):
    """Counts bytes of live storages; replaces operators without a meta implementation."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.bytes, self.peak_bytes = 0, 0

    def note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.live:
            self.live[key] = -(-storage.nbytes() // ROUNDED_TO) * ROUNDED_TO
            self.bytes += self.live[key]
            self.peak_bytes = max(self.peak_bytes, self.bytes)
            weakref.finalize(storage, self.forget, key)

    def forget(self, key: int) -> None:
        self.bytes -= self.live.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if name == "aten::nonzero":  # of the labels: the last token has none
            out = torch.empty(args[0].numel() - 1, 1, dtype=torch.int64, device="meta")
        elif name.startswith("aten::mm.dtype"):
            out = args[0].new_empty(args[0].shape[0], args[1].shape[1], dtype=args[2])
        else:
            out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.note(leaf)
        return out


def pretend() -> None:
    """Patch torch, Triton and the package so that the GPU code runs without a GPU."""
    parts: list[tuple[Any, str, Any]] = [
        (torch.Tensor, "is_cuda", property(lambda _: True)),
        (torch, "is_autocast_enabled", lambda *_: False),
        (torch, "get_autocast_dtype", lambda *_: torch.bfloat16),
        (torch, "autocast", lambda *_, **__: contextlib.nullcontext()),
        (torch, "equal", lambda *_: True),
        (torch.cuda, "device_of", lambda _: contextlib.nullcontext()),
        (torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0)),
        (triton.runtime.JITFunction, "__getitem__", lambda *_: lambda *__, **___: None),
        (experts_op, "choose", choose),
        (gpu, "tiles_of", lambda _: "sm_80"),
        (gpu, "multiprocessors_of", lambda _: 132),
        (attention, "_require_backend", lambda name, *_: name),
        (door, "_boundaries", lambda *_: None),
        (PackedExperts, "_check_scales", lambda _: None),
        (cross_entropy, "_check_labels", lambda *_: None),
        (MaskedLoraLinear, "codes", lambda _: None),
        (dense, "unpack_values", lambda *_: None),
    ]
    for owner, name, value in parts:
        if not hasattr(owner, name):
            sys.exit(f"{owner} no longer has {name}: update this simulation")
        setattr(owner, name, value)


def choose(x: torch.Tensor, entries: int, experts: int, backend: str | None) -> str:
    return choice.choose_backend("sm_90", entries, experts).backend


def build(layers: int, kept: bool, r: int, experts: int) -> nn.Module:
    """Build `shape_20b.build("masked", ...)` on the meta device."""
    config = shape_20b.config_20b(layers)
    model: Any = GptOssForCausalLM._from_config(
        config, dtype=torch.bfloat16, attn_implementation=door.NAME
    )
    replace_with_packed(model, shape_20b.COMPRESSED)
    model.bfloat16()
    model.model.rotary_emb = GptOssRotaryEmbedding(config)
    model.requires_grad_(False)
    fused.fuse(model)
    fused.chunk_loss(model)
    checkpoint_layers(model, kept, experts)
    model.enable_input_require_grads()

    def master_of(name: str) -> torch.Tensor:
        layer = model.get_submodule(name)
        return torch.empty(layer.out_features, layer.in_features, dtype=torch.bfloat16)

    tuned, _ = shape_20b.add_masked_lora(
        model, targets=PROJECTIONS, r=r, alpha=32, master_of=master_of, seed=0
    )
    return tuned.train()


def count_step(
    tokens: int,
    layers: int,
    kept: bool,
    batch: int = 1,
    r: int = 16,
    experts: int = 0,
    rows: int | None = None,
    host: bool = False,
    evaluates: bool = False,
) -> tuple[int, int]:
    """Return (bytes of the weights, peak bytes in forward and backward pass).

    The last `experts` layers keep their experts' gate_up output.
    With `rows`, layers compute in slices, their inputs on the device or, uncounted, on the host.
    With `evaluates`, the pass is that of an evaluation between such steps.
    """
    counter = Counter()
    with torch.device("meta"):
        model = build(layers, kept, r, experts)
        for tensor in (*model.parameters(), *model.buffers()):
            counter.note(tensor.detach())
        gc.collect()
        weights = counter.bytes
        if rows is not None:
            inputs = UncountedHost() if host else DeviceInputs()
            slice_rows(model.get_base_model(), rows, inputs, kept)  # pyright: ignore[reportCallIssue]
        with counter:
            ids = torch.empty(batch, tokens, dtype=torch.int64)
            if evaluates:
                with torch.no_grad(), using(inference_tokens=rows):
                    model.eval()(input_ids=ids, labels=ids, use_cache=False)
            else:
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return weights, counter.peak_bytes


if __name__ == "__main__":
    pretend()
    gc.freeze()  # each case collects garbage, but not in what was imported
    with using(attention_backend="triton"):
        print(json.dumps([count_step(**case) for case in json.loads(sys.argv[1])]))
