"""Joint projections give what the three layers give, and their buffers stay the layers' own."""

import copy
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from sparselong.adapters import joined as joined_module
from sparselong.adapters.joined import JoinedProjections, join_projections
from sparselong.kernels.dense import TILE_ROWS
from sparselong.kernels.layer import rotate
from sparselong.model import FusedAttention
from sparselong.packing.dense import DenseFormat
from sparselong.runtime import checkpoint_contexts
from tests.adapters.test_lora import FORMATS, IN, OUT, make_layer

DIM, TOKENS = 8, 11
ANGLES = torch.rand(1, TOKENS, DIM // 2, generator=torch.Generator().manual_seed(4))
COS, SIN = ANGLES.cos(), ANGLES.sin()


def make_layers(fmt: DenseFormat) -> list:
    layers = [make_layer(fmt, trained=True) for _ in range(3)]
    generator = torch.Generator().manual_seed(9)
    for layer in layers:  # the same master, other adapters and biases
        for tensor in (*layer.adapter()[:2], layer.base_layer.bias):
            tensor.data.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    return layers


def run(project, layers, contexts=None) -> list[torch.Tensor]:
    """Return outputs and gradients for x and all factors."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, TOKENS, IN, generator=generator, requires_grad=True)
    given = [torch.randn(2, OUT // DIM, TOKENS, DIM, generator=generator) for _ in range(3)]
    factors = [factor for layer in layers for factor in layer.adapter()[:2]]
    if contexts is None:
        made = project(x)
    else:
        made = checkpoint(project, x, use_reentrant=False, context_fn=contexts)
    return [*made, *torch.autograd.grad(made, [x, *factors], given)]


def one_by_one(layers):
    def project(x):
        q, k, v = (layer(x).view(*x.shape[:2], -1, DIM).transpose(1, 2) for layer in layers)
        return *rotate(q, k, COS, SIN), v

    return project


def together(layers):
    joined = JoinedProjections(layers, DIM)
    return lambda x: joined(x, COS, SIN)


def assert_same(got, expected):
    for one, other in zip(got, expected, strict=True):
        assert one.shape == other.shape
        assert (one - other).norm() <= 1e-6 * other.norm() and other.norm() > 0


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("contexts", [None, partial(checkpoint_contexts, False)])
def test_outputs_and_gradients_are_those_of_three_layers(fmt, contexts):
    layers = make_layers(fmt)
    expected = run(one_by_one(layers), layers, contexts)
    assert_same(run(together(layers), layers, contexts), expected)


def test_changed_adapters_masks_scales_and_devices_are_seen():
    layers = make_layers(DenseFormat(4, "2:4", 32))
    joined = JoinedProjections(layers, DIM)

    def agree():
        assert_same(run(lambda x: joined(x, COS, SIN), layers), run(one_by_one(layers), layers))

    agree()
    for layer in layers:
        layer.adapter()[1].data.mul_(-3)  # in ways that autograd does not count
        assert layer.update("hysteresis") > 0
    agree()
    for layer in layers:  # as when a model moves to another device
        layer.master, layer.scale = layer.master.clone(), layer.scale.clone()
        layer.patterns = layer.patterns.clone()
    agree()
    assert layers[1].master.data_ptr() == joined.buffers["master"][OUT:].data_ptr()


def test_layers_that_differ_are_not_joined(monkeypatch):
    assert OUT % TILE_ROWS

    def attention(q, k, v):
        made = FusedAttention.__new__(FusedAttention)
        torch.nn.Module.__init__(made)
        made.q_proj, made.k_proj, made.v_proj, made.head_dim = q, k, v, DIM
        return made

    alike = make_layers(DenseFormat(4, "2:4", 32))
    assert join_projections(attention(*alike)) == 0  # rows of two layers in a tile
    monkeypatch.setattr(joined_module, "TILE_ROWS", 8)
    other = make_layers(DenseFormat(8, "2:4", 32))
    assert join_projections(attention(*alike)) == 1
    assert join_projections(attention(*copy.deepcopy(alike[:2]), other[0])) == 0
    assert join_projections(attention(*copy.deepcopy(alike[:2]), torch.nn.Linear(IN, OUT))) == 0


def test_adapters_that_are_off_are_left_out():
    layers = make_layers(DenseFormat(4, "2:4", 32))
    joined = JoinedProjections(layers, DIM)
    assert joined.is_usable
    layers[2]._disable_adapters = True
    assert not joined.is_usable
