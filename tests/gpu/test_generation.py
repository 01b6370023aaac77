"""Compiled generation kernels: accuracy against fp64, and tokens from the CUDA graph."""

import copy
from typing import Any

import pytest
import torch
from transformers import GptOssForCausalLM

from sparselong.errors import StageError
from sparselong.generation import decoder as decoding
from sparselong.generation.decoder import Decoder, generate
from sparselong.generation.sampling import Sampler, Sampling
from sparselong.generation.step import KernelStep, TorchStep
from sparselong.kernels.decode.gemv import packed_gemv
from sparselong.kernels.dense.unpack import unpack_weight
from sparselong.model.packed_linear import PackedLinear
from sparselong.model.quantizer import replace_with_packed
from sparselong.packing import dense, integer
from sparselong.packing.dense import DenseFormat
from tests.generation.test_decoder import CONFIG, WINDOW
from tests.references.packed_gemv import packed_gemv_reference

FORMATS = [DenseFormat(4, "2:4", 64), DenseFormat(4, "2:4", 32), DenseFormat(4, "none", 64)]


def draw(fmt: DenseFormat, rows: int, width: int) -> dict[str, torch.Tensor]:
    """Draw a random weight in a format, on the GPU."""
    mask = (torch.rand(rows, width // 4, 4).argsort(-1) < 2).view(rows, width)
    scale = (0.01 + 0.01 * torch.rand(rows, width // fmt.group_size)).bfloat16()
    codes = integer.quantize(0.05 * torch.randn(rows, width), scale, 4)
    packed = dense.pack(fmt, codes, mask if fmt.is_sparse else None, scale)
    return {name: tensor.cuda() for name, tensor in packed.items()}


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("shape", [(1, 4096, 2880), (1, 2880, 4096), (3, 77, 128), (8, 512, 2880)])
def test_a_product_is_rounded_once(fmt, shape):
    torch.manual_seed(0)
    tokens, rows, width = shape
    tensors, bias = draw(fmt, rows, width), torch.randn(rows, device="cuda").bfloat16()
    x = torch.randn(tokens, width, device="cuda").bfloat16()
    exact = packed_gemv_reference(x, fmt, tensors, bias)
    got = packed_gemv(x, fmt, tensors, bias)
    assert torch.equal(got, packed_gemv(x, fmt, tensors, bias))
    plain = torch.nn.functional.linear(x, dense.unpack(fmt, tensors), bias)
    assert ((got - exact).abs() <= 2.0**-8 * exact.abs() + 1e-5 * exact.abs().max()).all()
    assert (got - exact).norm() <= 1.05 * (plain - exact).norm()


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_unpacked_weights_match_plain_torch(fmt):
    tensors = draw(fmt, 517, 2880 if fmt.group_size == 64 else 2848)
    assert torch.equal(unpack_weight(fmt, tensors), dense.unpack(fmt, tensors))


def make_model(packed: bool) -> GptOssForCausalLM:
    """Return a small random bf16 model, prepared as for generation on a GPU."""
    torch.manual_seed(0)
    fmt = DenseFormat(4, "2:4", 32) if packed else DenseFormat(16, "none", 64)
    with torch.device("cuda"):
        model = GptOssForCausalLM._from_config(
            CONFIG, dtype=torch.bfloat16, attn_implementation="eager"
        )
        replace_with_packed(model, fmt)
    model.bfloat16()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("_blocks"):
            tensor.random_(0, 256)
        elif name.endswith("_scales"):
            tensor.random_(122, 125)
        elif "norm" in name:
            tensor.data.uniform_(0.5, 1.5)
        elif tensor.is_floating_point() and "rotary" not in name:
            tensor.data.normal_(0.0, 0.2)
    for module in model.modules():
        if isinstance(module, PackedLinear):
            for name, tensor in draw(fmt, module.out_features, module.in_features).items():
                getattr(module, name).copy_(tensor)
            module.get_buffer("weight_scale").mul_(8)
    return model.requires_grad_(False).eval()


@pytest.fixture(scope="module", params=[True, False], ids=["packed", "bf16"])
def model(request) -> GptOssForCausalLM:
    return make_model(request.param)


PROMPT = torch.tensor([[5, 6, 7, 50, 8, 21, 13, 44, 2, 3, 9]])


def test_the_graph_gives_the_same_tokens_as_its_kernels(model):
    count = 3 * WINDOW
    graph, kernels = Decoder(model, 64), Decoder(model, 64, use_graph=False)
    tokens = list(generate(model, PROMPT, count, decoder=graph))
    assert tokens == list(generate(model, PROMPT, count, decoder=kernels))
    graph.forget()
    assert tokens == list(generate(model, PROMPT, count, decoder=graph)), "differs on reuse"
    assert len(set(tokens)) > 4, "too few distinct tokens to tell"
    for ours, theirs in zip(graph.caches, kernels.caches, strict=True):
        assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)


def test_logits_are_as_accurate_as_plain_torch_in_bf16(model):
    """Compare each step on the same tokens, past the window's length."""
    tokens = [*PROMPT[0].tolist(), *range(20, 20 + 2 * WINDOW)]
    exact_model = decode_to_double(model)
    steps: dict[str, Any] = {"ours": Decoder(model, 64), "torch": Decoder(model, 64)}
    steps["torch"].step = TorchStep(model, steps["torch"].caches, 64)
    steps["torch"]._graph = None
    errors: dict[str, list[float]] = {"ours": [], "torch": []}
    for name in errors:
        steps[name].start(PROMPT.cuda())
    for n in range(PROMPT.shape[1], len(tokens)):
        ids = torch.tensor([tokens[: n + 1]])
        exact = exact_model(ids, use_cache=False).logits[0, -1].cuda()
        for name, found in errors.items():
            steps[name].put(tokens[n])
            steps[name].advance()
            found.append(((steps[name].step.logits.double() - exact).norm() / exact.norm()).item())
    ours, theirs = (sorted(found)[len(found) // 2] for found in errors.values())
    print(f"median relative error of logits: ours {ours:.2e}, torch {theirs:.2e}")
    assert ours <= 2 * theirs and ours < 0.1


def decode_to_double(model: GptOssForCausalLM) -> GptOssForCausalLM:
    """Return the same weights in fp64 on a CPU, which supports every product in fp64."""
    return copy.deepcopy(model).cpu().double().requires_grad_(False)


def test_other_modules_are_refused(model):
    layer: Any = model.model.layers[0]
    kept, layer.mlp.experts = layer.mlp.experts, torch.nn.Identity()
    try:
        with pytest.raises(ValueError, match="allowed: PackedExperts"):
            Decoder(model, 64)
    finally:
        layer.mlp.experts = kept


def test_the_step_uses_the_kernels(model):
    assert isinstance(Decoder(model, 64, use_graph=False).step, KernelStep)


def sample(model: GptOssForCausalLM, decoder: Decoder, seed: int, **settings: Any) -> list[int]:
    decoder.forget()  # a part of the prompt read alone would be rounded otherwise
    return list(generate(model, PROMPT, 3 * WINDOW, decoder=decoder, seed=seed, **settings))


def test_one_graph_samples_with_all_settings_and_seeds(model, monkeypatch):
    """Sampled tokens are those of kernels launched one by one; greedy ones stay what they were."""
    captured = []

    def capture(*callables: Any) -> Any:
        captured.append(callables)
        return capture_graph(*callables)

    capture_graph = decoding.capture_graph
    monkeypatch.setattr(decoding, "capture_graph", capture)
    graph, kernels = Decoder(model, 64), Decoder(model, 64, use_graph=False)
    greedy = list(generate(model, PROMPT, 3 * WINDOW, decoder=graph))
    seen = set()
    for seed in range(3):
        for settings in (
            {"temperature": 1.0},
            {"temperature": 3.0, "top_k": 9},
            {"temperature": 2.0, "top_p": 0.7},
            {"temperature": 4.0, "top_k": 40, "top_p": 0.9},
        ):
            tokens = sample(model, graph, seed, **settings)
            assert tokens == sample(model, kernels, seed, **settings)
            seen.add(tuple(tokens))
    assert len(seen) == 12 and len(captured) == 2
    assert sample(model, graph, 1, temperature=1e-3, top_p=1e-9)[0] == greedy[0]
    assert sample(model, graph, 0) == greedy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_draws_the_tokens_of_a_cpu(dtype):
    """The random numbers are the same; only `exp` may round differently, at a few boundaries."""
    torch.manual_seed(0)
    logits = (3 * torch.randn(201_088)).to(dtype)
    for sampling in (
        Sampling(1.0),
        Sampling(0.7, 50),
        Sampling(1.2, 0, 0.9),
        Sampling(2, 900, 0.5),
    ):
        drawn = []
        for device in ("cpu", "cuda", "cuda"):
            sampler = Sampler(len(logits), 10_000, torch.device(device))
            sampler.load(sampling.draw(10_000), 0)
            positions = torch.arange(10_000, device=device)
            drawn.append(sampler.pick(logits.to(device), positions).cpu())
        assert (drawn[0] == drawn[1]).float().mean() > 0.98
        assert torch.equal(drawn[1], drawn[2])


def test_nan_logits_stop_sampling_in_the_graph(model):
    decoder = Decoder(model, 64)
    tokens = generate(model, PROMPT, 9, decoder=decoder, temperature=2.0)
    next(tokens)
    decoder.caches[1].values[:, 0] = float("nan")
    with pytest.raises(StageError, match="generated token"):
        list(tokens)


def test_a_second_turn_continues_and_its_capture_leaves_the_cache(model):
    """The first sampled turn captures its graph while the cache holds the turn before."""
    decoder, fresh = Decoder(model, 96), Decoder(model, 96)
    spoken = list(generate(model, PROMPT, 2 * WINDOW, decoder=decoder))
    follow_up = torch.cat([PROMPT, torch.tensor([[spoken[0], 60, 61, 62]])], 1)
    fresh.start(PROMPT)
    expected = list(generate(model, follow_up, WINDOW, decoder=fresh, temperature=2.0))
    assert list(generate(model, follow_up, WINDOW, decoder=decoder, temperature=2.0)) == expected
    assert decoder.reused == fresh.reused == PROMPT.shape[1]
    list(generate(model, PROMPT, 3, decoder=decoder))
    assert decoder.reused == PROMPT.shape[1] - 1
