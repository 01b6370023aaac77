"""torch.compile of a small model on a CPU: one graph, the loss and gradients of the direct calls.

`aot_eager` compiles graphs of both passes, with shapes, strides and gradients as the operators
describe them, and runs torch's own kernels; tests/gpu/test_compiled.py generates code.
"""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from sparselong.packing import DenseFormat
from sparselong.runtime import using
from tests.small_packed import add_lora, add_masked, build_packed, differentiate, draw_batch

CPU = ("cpu", torch.float32)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compile_whole(model, dynamic: bool | None = True, backend: str = "aot_eager"):
    return torch.compile(model, fullgraph=True, backend=backend, dynamic=dynamic)


def count_graphs() -> int:
    """Return how often a graph was compiled; recompilations count, and there are no breaks."""
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def compare(model, compiled, batch) -> None:
    direct, found = differentiate(model, model, batch), differentiate(model, compiled, batch)
    for name, wanted in direct.items():
        assert torch.equal(found[name], wanted), name
        assert torch.isfinite(wanted).all() and wanted.any(), name


def test_lora_is_one_graph_and_new_lengths_are_compiled_once():
    """The second length makes lengths variable; documents and settings are those of the step."""
    model = add_lora(build_packed(*CPU))
    compiled = compile_whole(model, dynamic=None)
    graphs = []
    for tokens in (24, 40, 56, 300):  # attention's chunks on a CPU have 256 queries
        compare(model, compiled, draw_batch(tokens, "cpu"))
        graphs.append(count_graphs())
    assert graphs == [1, 2, 2, 2]
    compare(model, compiled, draw_batch(72, "cpu", packed=False))
    refused = "backend: triton with cpu tensors"
    with using(attention_backend="triton"), pytest.raises(ValueError, match=refused):
        compiled(**draw_batch(24, "cpu"), use_cache=False)
    with using(sequence=object()), pytest.raises(ValueError, match="allowed: none, because the"):
        compiled(**draw_batch(24, "cpu"), use_cache=False)
    assert count_graphs() == 2


def test_masked_lora_and_adapters_of_experts_and_routers_are_one_graph():
    model = add_masked(build_packed(*CPU), router=True)
    compiled = compile_whole(model)
    for tokens in (24, 40):
        compare(model, compiled, draw_batch(tokens, "cpu"))
    assert count_graphs() == 1
    assert sum("lora" in name for name, _ in model.named_parameters()) == 28


def test_stored_weights_are_one_graph():
    model = build_packed(*CPU, DenseFormat(4, "2:4", 32))
    compiled = compile_whole(model)
    for tokens in (24, 40):
        compare(model, compiled, draw_batch(tokens, "cpu"))
    assert count_graphs() == 1


def test_padding_is_found_in_the_graph():
    """A mask without padding too, which is told apart outside of graphs."""
    model = build_packed(*CPU)
    compiled = compile_whole(model, backend="eager")
    batch = {key: t.repeat(2, 1) for key, t in draw_batch(24, "cpu", packed=False).items()}
    del batch["position_ids"]
    for padding in (7, 0):
        mask = torch.ones_like(batch["input_ids"])
        mask[1, :padding] = 0
        compare(model, compiled, {**batch, "attention_mask": mask})
    assert count_graphs() == 1


def test_experts_in_host_memory_are_refused_by_name_in_one_graph():
    model = build_packed(*CPU)
    for layer in model.model.layers:
        layer.mlp.experts.is_on_host = True
    with pytest.raises(torch._dynamo.exc.Unsupported, match="experts in host memory: layers are"):
        torch.compile(model, fullgraph=True, backend="eager")(**draw_batch(24, "cpu"))


def test_damaged_scales_are_refused_when_the_model_is_compiled():
    model = build_packed(*CPU)
    model.model.layers[1].mlp.experts.down_proj_scales[0, 0, 0] = 255
    with pytest.raises(Exception, match="down_proj_scales: contains 255"):
        torch.compile(model, fullgraph=True, backend="eager")(**draw_batch(24, "cpu"))
