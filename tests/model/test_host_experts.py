"""Experts in host memory: order of copies, exact buffers, page-locking, results bit for bit."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any
from unittest import mock

import pytest
import torch

import sparselong
from sparselong.errors import StageError
from sparselong.model import describe_weights, load_model
from sparselong.model.host_experts import HostExperts, find_host_experts
from sparselong.runtime import using
from tests.distributed.expert_training import draw_adapters, open_model

CPU = torch.device("cpu")
LAYERS = 4
SHAPES = {"blocks": (2, 3, 16), "scales": (2, 3)}
IDS = torch.randint(9, 2000, (2, 60), generator=torch.Generator().manual_seed(3))
WHERE = ("gpu", "host")


def make(layers: int = LAYERS) -> HostExperts:
    """Return memory whose layers hold their number, on a CPU."""
    made = HostExperts(layers, SHAPES, locked=False)
    made.start(CPU)
    for number, layer in enumerate(made.layers):
        layer.fill_(number)
    return made


def run(host: HostExperts, order: list[tuple[int, str]]) -> int:
    """Fetch layers in order; return how many were copied."""
    before = host.copied_bytes
    for layer, passing in order:
        blocks, scales = host.fetch(layer, passing)  # pyright: ignore[reportArgumentType]
        assert blocks.shape == SHAPES["blocks"] and scales.shape == SHAPES["scales"]
        assert bool((blocks == layer).all()) and bool((scales == layer).all())
    copied, rest = divmod(host.copied_bytes - before, host.layer_bytes)
    assert rest == 0
    return copied


def forward(layers: int = LAYERS) -> list[tuple[int, str]]:
    return [(n, "forward") for n in range(layers)]


def backward(layers: int = LAYERS) -> list[tuple[int, str]]:
    return [(n, "backward") for n in reversed(range(layers))]


def inference(layers: int = LAYERS) -> list[tuple[int, str]]:
    return [(n, "inference") for n in range(layers)]


def test_a_step_copies_each_layer_once_a_pass():
    host = make()
    assert run(host, forward() + backward()) == 2 * LAYERS - 2
    assert run(host, forward() + backward()) == 2 * LAYERS - 4
    assert run(host, 3 * (forward() + backward())) == 3 * (2 * LAYERS - 4)  # accumulation


def test_an_evaluation_batch_copies_each_layer_once():
    host = make()
    assert run(host, inference()) == LAYERS + 1  # the first layer, for a next batch
    assert run(host, inference()) == LAYERS
    assert run(host, forward() + backward()) <= 2 * LAYERS - 2
    assert run(host, inference()) <= LAYERS
    assert run(host, forward() + backward()) <= 2 * LAYERS - 2


@pytest.mark.parametrize(
    "before",
    [
        forward() + backward()[:2],
        forward()[:2],
        forward(),
        inference()[:3],
        [(2, "inference")],
        [(1, "backward"), (3, "forward")],
    ],
)
def test_whatever_broke_off_before_the_right_layers_are_read(before):
    host = make()
    run(host, before)
    assert run(host, forward()) <= LAYERS
    assert run(host, backward()) == LAYERS - 2
    assert run(host, forward() + forward()) <= 2 * LAYERS


def test_chunks_of_a_layer_share_a_copy():
    host = make()
    twice = [each for each in forward() + backward() for _ in range(2)]
    assert run(host, twice) == 2 * LAYERS - 2


@pytest.mark.parametrize("layers", [1, 2])
def test_two_layers_are_copied_once(layers):
    host = make(layers)
    assert run(host, forward(layers) + backward(layers) + inference(layers)) == layers
    assert run(host, inference(layers) + forward(layers) + backward(layers)) == 0


def test_the_next_layer_is_copied_while_one_is_used():
    host = make()
    run(host, forward()[:2])
    assert host.copied_bytes == 3 * host.layer_bytes


def test_a_layer_that_is_written_to_is_copied_again():
    host = make()
    run(host, forward() + backward())
    for tensor in host.tensors(0).values():
        tensor.fill_(9)
    blocks, scales = host.fetch(0, "forward")
    assert bool((blocks == 9).all()) and bool((scales == 9).all())


def test_a_copy_that_breaks_off_leaves_no_false_layer():

    def break_off(target: torch.Tensor, *_: Any, **__: Any) -> None:
        target[:9].fill_(77)
        raise KeyboardInterrupt

    host = make()
    run(host, forward())  # the last two layers are there
    with mock.patch.object(torch.Tensor, "copy_", break_off):
        with pytest.raises(KeyboardInterrupt):
            host.fetch(0, "forward")
    run(host, backward())


def test_buffers_have_exactly_the_needed_size():
    host = make()
    size = 2 * 3 * 16 + 2 * 3
    assert host.layer_bytes == size
    assert [layer.untyped_storage().nbytes() for layer in host.layers] == [size] * LAYERS
    assert host._slots is not None
    assert [slot.whole.untyped_storage().nbytes() for slot in host._slots] == [size] * 2


class Code(Enum):
    """CUDA's results."""

    success, memory = 0, 2


@dataclass
class Runtime:
    """Stands for CUDA's runtime; registering fails for the layer `fails_at`."""

    fails_at: int | None = None
    locked: dict[int, int] = field(default_factory=dict)
    cudaError: Any = Code

    def cudaHostRegister(self, address: int, size: int, flags: int) -> Code:
        if len(self.locked) == self.fails_at:
            return Code.memory
        self.locked[address] = size
        return Code.success

    def cudaHostUnregister(self, address: int) -> Code:
        del self.locked[address]
        return Code.success

    def cudaGetErrorString(self, code: Code) -> str:
        return "out of memory"


def test_memory_is_locked_while_the_model_lives():
    runtime = Runtime()
    with mock.patch.object(torch.cuda, "cudart", lambda: runtime):
        host = HostExperts(LAYERS, SHAPES, locked=True)
        assert list(runtime.locked.values()) == [host.layer_bytes] * LAYERS
        kept = host.tensors(1)["scales"]
        del host
        gc.collect()
        assert runtime.locked == {}
    kept.fill_(1)  # still memory


def test_a_failed_registration_is_refused_and_leaves_nothing_locked():
    runtime = Runtime(fails_at=2)
    with mock.patch.object(torch.cuda, "cudart", lambda: runtime):
        with pytest.raises(StageError, match="cannot be page-locked") as caught:
            HostExperts(LAYERS, SHAPES, locked=True)
        assert caught.value.expected == "408 B, 102 B for each of 4 layers"
        assert caught.value.found == "204 B page-locked, then: out of memory"
        del caught
        gc.collect()
        assert runtime.locked == {}


def test_memory_that_cannot_be_had_is_refused():
    huge = {"blocks": (1 << 20, 1 << 20, 1 << 10)}
    with pytest.raises(StageError, match="cannot be allocated"):
        HostExperts(2, huge, locked=False)


def test_one_changed_byte_changes_one_hash():
    host = make()
    before = host.hash_tensors()
    assert len(before) == LAYERS * len(SHAPES) and host.hash_tensors() == before
    host.tensors(2)["scales"][1, 2] += 1
    after = host.hash_tensors()
    assert {name for name in before if before[name] != after[name]} == {"2.scales"}


@pytest.fixture(scope="module")
def adapters(untrained_base, tmp_path_factory):
    path = tmp_path_factory.mktemp("adapters") / "adapters.pt"
    draw_adapters(untrained_base, path)
    return path


def train(base, adapters, where: str) -> tuple[list[torch.Tensor], list[float]]:
    """Train two steps of two micro-batches with an evaluation between; return losses, gradients and
    logits, and how many layers each pass copied."""
    with using(expert_placement=where):
        model: Any = open_model(base)
    model.load_state_dict(torch.load(adapters), strict=False)
    host = find_host_experts(model)
    results: list[torch.Tensor] = []
    copies: list[float] = []
    trained = [p for p in model.parameters() if p.requires_grad]

    @contextmanager
    def counted() -> Iterator[None]:
        before = host.copied_bytes if host else 0
        yield
        if host is not None:
            copies.append((host.copied_bytes - before) / host.layer_bytes)

    for _ in range(2):
        for _ in range(2):
            with counted():
                loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
                loss.backward()
            results.append(loss.detach())
        results += [p.grad.clone() for p in trained]
        model.eval()
        with counted(), torch.no_grad():
            results.append(model(IDS, use_cache=False).logits)
        model.train()
    return results, copies


def test_training_and_evaluation_are_the_same_bits(untrained_base, adapters):
    """Checkpointed, with adapters on attention, router and experts."""
    (expected, none), (found, copies) = (train(untrained_base, adapters, w) for w in WHERE)
    assert none == [] and len(found) > 2 * 20
    assert all(bool(t.any()) for t in expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)
    assert max(copies[:2] + copies[3:5]) <= 2 * LAYERS - 2
    assert copies[2] <= LAYERS and copies[5] <= LAYERS


def test_generated_tokens_are_the_same_and_copy_no_layers(untrained_base):
    outcomes = []
    for where in WHERE:
        with using(expert_placement=where):
            model = load_model(untrained_base, attn_implementation="sparselong")
        host = find_host_experts(model)
        tokens = sparselong.generate(model, IDS[:1, :2], 12)
        outcomes.append([next(tokens)])
        before = host.copied_bytes if host else 0
        outcomes[-1] += tokens
        assert host is None or host.copied_bytes == before == 0
    assert len(outcomes[0]) == 12 and outcomes[0] == outcomes[1]


def test_a_model_that_moves_leaves_its_experts(untrained_base):
    with using(expert_placement="host"):
        model: Any = load_model(untrained_base)
    assert "experts: MXFP4, packed, in host memory 816.00 KiB" in describe_weights(model)
    experts = model.model.layers[1].mlp.experts
    kept = experts.down_proj_blocks
    names = list(model.state_dict())
    model.to(torch.bfloat16).to("meta")
    assert experts.down_proj_bias.is_meta and experts.down_proj_blocks is kept
    assert list(model.state_dict()) == names
    call = (torch.zeros(1, 128, device="meta"), torch.zeros(1, 1, dtype=torch.int64, device="meta"))
    with pytest.raises(ValueError, match="x: on meta; allowed: cpu, for which the model was open"):
        experts(*call, torch.ones(1, 1, device="meta"))
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained("never-written")
