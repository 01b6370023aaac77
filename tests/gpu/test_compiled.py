"""torch.compile of a small model on a GPU, code generated: the loss and gradients of direct calls.

The operators run the kernels of the direct calls. What is between them, such as sums of gradients
and projections, is torch's, and may round elsewhere.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch._dynamo.utils import counters

from sparselong.packing.dense import DenseFormat
from sparselong.runtime import using
from tests.small_packed import add_lora, add_masked, build_packed, differentiate, draw_batch

GPU = ("cuda", torch.bfloat16)
EXACT = ("cuda", torch.float32)
"""In bf16, another rounding may route a token to another expert; in fp32 it does not."""
LENGTHS = (96, 160, 224, 512)
needs_peft = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="not installed here: peft"
)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def build(kind: str):
    if kind == "packed linear":
        return build_packed(*EXACT, DenseFormat(4, "2:4", 32))
    model = build_packed(*EXACT)
    if kind == "lora":
        return add_lora(model)
    return add_masked(model, router=False) if kind == "masked" else model


def compare(model, compiled, batch, limit: float = 1e-3) -> None:
    direct, found = differentiate(model, model, batch), differentiate(model, compiled, batch)
    assert abs(found["loss"] - direct["loss"]) <= limit / 10 * direct["loss"].abs()
    for name, wanted in direct.items():
        assert torch.isfinite(found[name]).all() and wanted.any(), name
        error = (found[name].float() - wanted.float()).norm() / wanted.float().norm()
        assert error <= limit, (name, error)


@pytest.mark.parametrize(
    "kind",
    [
        "sinks",
        "packed linear",
        pytest.param("lora", marks=needs_peft),
        pytest.param("masked", marks=needs_peft),
    ],
)
def test_one_graph_that_new_lengths_do_not_recompile(kind):
    model = build(kind)
    compiled = torch.compile(model, fullgraph=True)
    graphs = []
    for tokens in LENGTHS:
        compare(model, compiled, draw_batch(tokens, "cuda"))
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [1, 2, 2, 2] and not counters["graph_break"]


@pytest.mark.parametrize("backend", ["triton", "torch_flash", "torch_cudnn"])
def test_a_backend_is_that_of_the_step(backend):
    """The operator keeps no state of torch's random generators, which theirs take backward.

    cuDNN takes neither documents nor windows: only the full layers' attention, without packing.
    """
    model = build_packed(*GPU)
    batch = draw_batch(256, "cuda", packed=False)
    if backend == "torch_cudnn":
        for layer in model.model.layers:
            layer.self_attn.sliding_window = None
    compiled = torch.compile(model, fullgraph=True)
    compare(model, compiled, batch, 0.1)  # the compiled graph then serves every backend
    graphs = counters["stats"]["unique_graphs"]
    with using(attention_backend=backend):
        compare(model, compiled, batch, 0.1)
    assert counters["stats"]["unique_graphs"] == graphs


def test_the_compilers_recomputation_of_layers_is_one_graph():
    model = build("sinks")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.disable_input_require_grads()
    compare(model, torch.compile(model, fullgraph=True), draw_batch(96, "cuda"))


def test_watched_routers_report_logits_that_are_not_finite():
    from sparselong.model import watch_routers

    model = build("sinks")
    _, flags = watch_routers(model)
    compiled = torch.compile(model, fullgraph=True)
    batch = draw_batch(96, "cuda")
    compiled(**batch, use_cache=False)
    assert not flags.any()
    with torch.no_grad():
        model.model.layers[1].mlp.router.bias[0] = float("nan")
    compiled(**batch, use_cache=False)
    assert flags.tolist() == [False, True]


def test_a_pass_without_gradients_gives_the_logits_of_direct_calls():
    model = build("sinks").eval()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        for tokens in (96, 160):
            ids = draw_batch(tokens, "cuda")["input_ids"]
            wanted, found = (run(input_ids=ids).logits.float() for run in (model, compiled))
            assert (found - wanted).norm() <= 1e-3 * wanted.norm()
