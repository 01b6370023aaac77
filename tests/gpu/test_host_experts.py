"""Experts in page-locked host memory on a GPU: the same bits, copies beside computation, direct
reads for a few tokens, and memory that is unlocked whatever ends a run."""

import gc
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
import torch

import sparselong
from sparselong.kernels import HostStack, PackedWeight
from sparselong.kernels.experts import expert_mlp
from sparselong.model import chunk_loss, describe_weights, find_host_experts, load_model
from sparselong.model.host_experts import HostExperts
from sparselong.runtime import checkpoint_contexts, using
from tests.conftest import ROOT

LAYERS = 4
IDS = torch.randint(9, 2000, (2, 60), generator=torch.Generator().manual_seed(3))
TRAINED = ("sinks", "router.weight", "q_proj.weight")


def open_model(base, where: str) -> Any:
    with using(expert_placement=where):
        model: Any = load_model(base, attn_implementation="sparselong")
    chunk_loss(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(TRAINED))
    return model


@pytest.mark.parametrize("keep_experts", [None, False, True])
def test_training_and_evaluation_are_the_same_bits(untrained_base, keep_experts):
    outcomes, ids = [], IDS.cuda()
    for where in ("gpu", "host"):
        model, results = open_model(untrained_base, where), []
        if keep_experts is not None:
            contexts = partial(checkpoint_contexts, False, keep_experts)
            arguments = {"use_reentrant": False, "context_fn": contexts}
            model.gradient_checkpointing_enable(arguments | {"preserve_rng_state": False})
            model.enable_input_require_grads()
        for _ in range(3):
            model.train()
            model(ids, labels=ids, use_cache=False).loss.backward()
            model.eval()
            with torch.no_grad():
                results.append(model(ids, use_cache=False).logits)
        results += [p.grad for p in model.parameters() if p.requires_grad]
        outcomes.append(results)
    assert len(outcomes[0]) == 3 + 3 * LAYERS
    for mine, theirs in zip(*outcomes, strict=True):
        assert torch.equal(mine, theirs) and bool(theirs.isfinite().all()) and bool(theirs.any())


def test_a_step_copies_no_more_than_it_must(untrained_base):
    model, ids = open_model(untrained_base, "host"), IDS.cuda()
    host = find_host_experts(model)
    assert host is not None and "in host memory" in describe_weights(model)
    assert all(layer.is_pinned() for layer in host.layers)
    counts = [0]
    for _ in range(3):
        model(ids, labels=ids, use_cache=False).loss.backward()
        counts.append(host.copied_bytes // host.layer_bytes)
    assert [after - before for before, after in zip(counts, counts[1:], strict=False)] == [6, 4, 4]


def test_generated_tokens_are_the_same_and_copy_no_layers(untrained_base):
    """Decoding is captured in a graph, whose kernels read the chosen experts from host memory."""
    outcomes = []
    for where in ("gpu", "host"):
        model = open_model(untrained_base, where)
        host = find_host_experts(model)
        tokens = sparselong.generate(model, IDS[:1, :2], 24)
        outcomes.append([next(tokens)])
        before = host.copied_bytes if host else 0
        outcomes[-1] += tokens
        assert host is None or host.copied_bytes == before
    assert len(outcomes[0]) == 24 and outcomes[0] == outcomes[1]


def test_the_embedding_is_in_host_memory_and_stays_there_as_long_as_its_tensor(untrained_base):
    rows, taken = [], []
    for where in ("gpu", "host"):
        gc.collect()
        before = torch.cuda.memory_allocated()
        model = open_model(untrained_base, where)
        taken.append(torch.cuda.memory_allocated() - before)
        weight = model.get_input_embeddings().weight
        if where == "host":
            experts = find_host_experts(model).layer_bytes * (LAYERS - 2)
            assert abs(taken[0] - taken[1] - experts - weight.nbytes) < weight.nbytes // 10
        del model
        gc.collect()
        rows.append(torch.nn.functional.embedding(IDS.cuda(), weight))
    assert torch.equal(*rows) and bool(rows[0].any())


def draw_host(layers: int, experts: int, width: int) -> tuple[HostExperts, list[HostStack]]:
    """Return experts of `width` and `width` with random codes, and each layer's stack."""
    shapes = {
        "gate_up.blocks": (experts, 2 * width, width // 32, 16),
        "gate_up.scales": (experts, 2 * width, width // 32),
        "down.blocks": (experts, width, width // 32, 16),
        "down.scales": (experts, width, width // 32),
    }
    host = HostExperts(layers, shapes, locked=True)
    device = torch.device("cuda", torch.cuda.current_device())
    host.start(device)
    stacks = []
    for number in range(layers):
        parts = host.tensors(number)
        for name, part in parts.items():
            bounds = (0, 256) if name.endswith("blocks") else (120, 124)
            part.copy_(torch.randint(*bounds, part.shape, dtype=torch.uint8))
        blocks, scales, down_blocks, down_scales = parts.values()
        gate_up = PackedWeight(blocks, scales, torch.zeros(experts, 2 * width, device=device))
        down = PackedWeight(down_blocks, down_scales, torch.zeros(experts, width, device=device))
        stacks.append(HostStack(gate_up, down, device, partial(host.fetch, number)))
    return host, stacks


@pytest.mark.parametrize(("tokens", "copies"), [(1, 0), (4, 0), (40, 1)])
def test_a_few_tokens_read_their_experts_where_they_lie(tokens, copies):
    host, (stack,) = draw_host(1, 32, 512)
    x = torch.randn(tokens, 512, device="cuda", dtype=torch.bfloat16)
    indices = torch.stack([torch.randperm(32)[:4] for _ in range(tokens)]).cuda()
    weights = torch.rand(tokens, 4, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        found = expert_mlp(x, indices, weights, stack)
        assert host.copied_bytes == copies * host.layer_bytes
        assert torch.equal(found, expert_mlp(x, indices, weights, stack.fetch("inference")))


def test_copies_run_beside_the_computation():
    """Layers of 102 MB; products that take about as long as their copies."""
    layers = 12
    host, stacks = draw_host(layers, 32, 2048)
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)

    def seconds(run) -> float:
        run()
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000

    def copy() -> None:
        for stack in stacks:
            stack.fetch("inference")

    copying = seconds(copy)
    each = seconds(lambda: a @ a)
    products = max(1, round(copying / layers / each))

    def compute() -> None:
        for _ in range(layers * products):
            a @ a

    def both() -> None:
        for stack in stacks:
            stack.fetch("inference")
            for _ in range(products):
                a @ a

    computing, together = seconds(compute), seconds(both)
    assert together <= 1.3 * max(copying, computing), (copying, computing, together)


def test_a_layer_is_not_overwritten_while_it_is_read():
    """A slow reader of a layer, then three more layers, which need its buffer."""
    host, stacks = draw_host(6, 8, 1024)
    wanted = [int(layer.sum(dtype=torch.int64)) for layer in host.layers]
    a = torch.randn(8192, 8192, device="cuda")
    found = []
    for _ in range(3):
        for stack in stacks:
            parts = stack.copy("inference")
            for _ in range(2):
                a @ a  # the sum below runs long after the next copy could have begun
            found.append(torch.stack([p.sum(dtype=torch.int64) for p in parts]).sum())
    assert [int(each) for each in found] == 3 * wanted


def test_memory_is_unlocked_after_ctrl_c_while_layers_are_copied(untrained_base):
    model, ids = open_model(untrained_base, "host"), IDS.cuda()

    def interrupt(*_: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    hook = model.model.layers[2].mlp.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(ids, labels=ids, use_cache=False)
    hook.remove()
    kept = model.model.layers[3].mlp.experts.down_proj_blocks
    assert kept.is_pinned()
    with torch.no_grad():
        model(ids, use_cache=False)  # the interrupted pass left nothing that misleads the next
    del model, hook
    gc.collect()
    assert not kept.is_pinned()


SCRIPT = """
import sys, time, torch
from pathlib import Path
from sparselong.model import load_model
from sparselong.runtime import using
with using(expert_placement="host"):
    model = load_model(Path(sys.argv[1]), attn_implementation="sparselong")
ids = torch.arange(400, device="cuda")[None]
with torch.no_grad():
    while True:
        model(ids, use_cache=False)
        print("ran", flush=True)
"""


def test_a_process_that_is_interrupted_ends_cleanly(untrained_base):
    command = [sys.executable, "-c", SCRIPT, str(untrained_base)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "ran\n"
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    assert process.returncode in (1, -signal.SIGINT) and "KeyboardInterrupt" in told
    assert "cudaHostUnregister" not in told and "Exception ignored" not in told


def test_memory_that_cannot_be_locked_is_refused():
    """Registering the same memory twice fails."""
    from sparselong.errors import StageError
    from sparselong.model import host_experts

    host, _ = draw_host(1, 8, 512)
    with pytest.raises(StageError, match="cannot be page-locked"):
        host_experts._lock(host.layers[0], 0, 1)
    with suppress(RuntimeError):  # CUDA reports the error once more, at the next launch
        torch.zeros(1, device="cuda")
    assert int(torch.ones(1, device="cuda")) == 1
