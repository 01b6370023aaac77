"""Norms, rotary embedding, router and the loss on a GPU: outputs and every gradient against fp64.

The bound is a measured one: plain torch in the same dtype on the same inputs makes some error; our
kernels may make twice that, by largest deviation and by relative RMS. Memory that kernels are to
fill is filled with NaN first. Last, a small gpt-oss with everything fused against transformers'.
"""

import copy
import importlib.util

import pytest
import torch

from sparselong.kernels.layer import cross_entropy, rotary, router
from sparselong.kernels.layer import norm as rms_norm
from sparselong.kernels.layer.norm_torch import add_rms_norm_torch, rms_norm_torch
from sparselong.kernels.layer.rotary_torch import rotate_torch
from tests.poisoned import PoisonedTorch
from tests.references.cross_entropy import linear_cross_entropy_reference
from tests.references.norm import add_rms_norm_reference, rms_norm_reference
from tests.references.rotary import rotate_reference

HALVES = [torch.bfloat16, torch.float16]
DTYPES = [*HALVES, torch.float32]
EPS = 1e-5
needs_model = pytest.mark.skipif(
    importlib.util.find_spec("pydantic") is None, reason="not installed here: pydantic"
)


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    for module in (rms_norm, rotary, router, cross_entropy):
        monkeypatch.setattr(module, "torch", PoisonedTorch())


def draw(*size: int, dtype=torch.float32, scale=1.0) -> torch.Tensor:
    return (torch.randn(size, device="cuda") * scale).to(dtype)


def differentiate(function, inputs, upstream) -> list[torch.Tensor]:
    """Outputs and the gradients of every input, with random upstream gradients."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = torch.autograd.grad(outputs, leaves, [u.to(outputs[0].dtype) for u in upstream])
    return [*(output.detach() for output in outputs), *grads]


def compare(got, plain, exact, roundings=2) -> None:
    """Each result: at most twice plain torch's error, or one rounding.

    In fp32 `roundings`, two: all of a single row hangs on one number, which torch may get exactly.
    """
    for place, (ours, theirs, true) in enumerate(zip(got, plain, exact, strict=True)):
        rounding = torch.finfo(ours.dtype).eps / 2
        rounding *= roundings if ours.dtype == torch.float32 else 1
        assert ours.dtype == theirs.dtype and torch.isfinite(ours).all(), place
        error, yardstick = ((t.double() - true) for t in (ours, theirs))
        largest = max(2 * yardstick.abs().max().item(), rounding * true.abs().max().item())
        assert error.abs().max().item() <= largest, place
        assert error.norm() <= max(2 * yardstick.norm(), rounding * true.norm()), place


def exactly(inputs):
    return [t.double() for t in inputs]


LAYOUTS = {
    "one_row": lambda hidden: (1, hidden),
    "rows_129": lambda hidden: (129, hidden),
    "more_rows_than_blocks": lambda hidden: (1300, hidden),
    "batch": lambda hidden: (3, 43, hidden),
}


def lay_out(shape: tuple[int, ...], dtype, strided: bool) -> torch.Tensor:
    if not strided:
        return draw(*shape, dtype=dtype)
    return draw(*shape[:-1], 2 * shape[-1], dtype=dtype)[..., : shape[-1]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [2880, 128, 100])
@pytest.mark.parametrize("shape", LAYOUTS)
@pytest.mark.parametrize("strided", [False, True])
def test_norms(shape, hidden, dtype, strided):
    torch.manual_seed(hidden)
    size = LAYOUTS[shape](hidden)
    x, residual = (lay_out(size, dtype, strided) for _ in range(2))
    # The model's own norms are in bf16 beside bf16 states; fp32 weights happen too.
    weight = draw(hidden, dtype=torch.float32 if strided else dtype) + 1
    upstream = [draw(*size, dtype=dtype) for _ in range(2)]
    for ours, plain, reference, inputs in (
        (rms_norm.rms_norm, rms_norm_torch, rms_norm_reference, (x, weight)),
        (
            *(rms_norm.add_rms_norm, add_rms_norm_torch, add_rms_norm_reference),
            (x, residual, weight),
        ),
    ):
        given = upstream[: len(inputs) - 1]
        results = [
            differentiate(lambda *t, f=f: f(*t, EPS), i, given)
            for f, i in ((ours, inputs), (plain, inputs))
        ]
        true = exactly(inputs)
        if len(inputs) == 3:  # the sum is rounded: its norm is compared with that of what is stored
            true[0] = (x + residual).double() - true[1]
        exact = differentiate(lambda *t, r=reference: r(*t, EPS), true, exactly(given))
        compare(*results, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("hidden", "experts"), [(2880, 32), (2880, 128), (100, 5)])
@pytest.mark.parametrize("tokens", [1, 129, 4096])
def test_router(tokens, hidden, experts, dtype):
    """Weights and dx, given the experts that our kernel chose, which are the k largest."""
    torch.manual_seed(0)
    x, bias = draw(tokens, hidden, dtype=dtype), draw(experts, dtype=dtype)
    weight = draw(experts, hidden, dtype=dtype, scale=hidden**-0.5)
    broken = torch.zeros(1, dtype=torch.bool, device="cuda")
    layer = router.Router(weight, bias, 4, broken)
    indices = router.route(x, layer)[2].long()

    def weigh(x, weight, bias):
        logits = torch.nn.functional.linear(x, weight, bias)
        return x * 1, logits.gather(1, indices).softmax(1)

    logits = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    least = logits.gather(1, indices).min(1).values
    others = logits.scatter(1, indices, float("-inf")).max(1).values
    assert (others - least).max() <= 2 * torch.finfo(dtype).eps * logits.abs().max()
    assert not broken
    upstream = [draw(tokens, hidden, dtype=dtype), draw(tokens, 4, dtype=dtype)]
    got = differentiate(lambda x: router.route(x, layer)[:2], [x], upstream)
    plain = differentiate(lambda x: weigh(x, weight, bias), [x], upstream)
    exact = differentiate(
        lambda x: weigh(x, weight.double(), bias.double()), exactly([x]), exactly(upstream)
    )
    # A logit in fp32 is a sum of `hidden` products in order, whose errors are a random walk.
    compare(got, plain, exact, roundings=2 * hidden**0.5)


def test_rows_of_a_router_do_not_depend_on_the_others():
    torch.manual_seed(0)
    x = draw(200, 2880, dtype=torch.bfloat16)
    weight, bias = draw(128, 2880, dtype=torch.bfloat16), draw(128, dtype=torch.bfloat16)
    layer = router.Router(weight, bias, 4)
    whole = router.route(x, layer)
    for first, last in ((0, 1), (7, 150), (199, 200)):
        part = router.route(x[first:last], layer)
        assert all(torch.equal(a, b[first:last]) for a, b in zip(part, whole, strict=True))


def test_norms_of_tiny_large_and_zero_rows():
    x = torch.stack([draw(2880), draw(2880) * 1e-4, draw(2880) * 1e4, torch.zeros(2880).cuda()])
    weight, upstream = draw(2880) + 1, [draw(4, 2880)]
    for dtype in DTYPES:
        results = [
            differentiate(lambda *t, f=f: f(*t, EPS), (x.to(dtype), weight), upstream)
            for f in (rms_norm.rms_norm, rms_norm_torch)
        ]
        inputs = exactly((x.to(dtype), weight))
        exact = differentiate(lambda *t: rms_norm_reference(*t, EPS), inputs, exactly(upstream))
        compare(*results, exact)


def test_an_output_that_nobody_uses_has_no_gradient():
    x, residual, weight = draw(5, 64), draw(5, 64), draw(64)
    for place in (0, 1):
        grads = []
        for function in (rms_norm.add_rms_norm, add_rms_norm_torch):
            leaves = [t.clone().requires_grad_() for t in (x, residual, weight)]
            output = function(*leaves, EPS)[place]
            grads.append(torch.autograd.grad(output.square().sum(), leaves, allow_unused=True))
        for ours, theirs in zip(*grads, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_residual_of_a_wider_type():
    x, residual = draw(7, 2880, dtype=torch.bfloat16), draw(7, 2880)
    got = rms_norm.add_rms_norm(x, residual, draw(2880), EPS)
    assert got[0].dtype == got[1].dtype == torch.float32
    assert torch.equal(got[1], x + residual)


def test_the_weights_gradient_repeats_to_the_bit():
    x, weight = draw(4000, 2880, dtype=torch.bfloat16), draw(2880)
    runs = [differentiate(lambda *t: rms_norm.rms_norm(*t, EPS), (x, weight), [x]) for _ in "123"]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


ROTARY = {
    "gpt_oss": (1, 1000, 64, 8, 64),
    "one_token": (1, 1, 64, 8, 64),
    "tail": (1, 129, 64, 8, 64),
    "batch": (3, 50, 16, 2, 64),
    "heads_not_a_tile": (2, 33, 5, 3, 64),
    "small_dim": (2, 33, 4, 2, 16),
    "odd_half": (1, 20, 4, 2, 12),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ROTARY)
@pytest.mark.parametrize("layout", ["token", "head", "strided", "dims"])
def test_rotary(case, dtype, layout):
    torch.manual_seed(len(case))
    batch, tokens, heads, kv_heads, dim = ROTARY[case]

    def make(n: int) -> torch.Tensor:
        if layout == "head":
            return draw(batch, n, tokens, dim, dtype=dtype)
        if layout == "strided":
            return draw(batch, 2 * tokens, n, dim, dtype=dtype)[:, ::2].transpose(1, 2)
        if layout == "dims":
            return draw(batch, n, dim, tokens, dtype=dtype).mT
        return draw(batch, tokens, n, dim, dtype=dtype).transpose(1, 2)

    rows = batch if layout == "head" else 1  # positions of their own, or shared
    angle = torch.rand(rows, tokens, dim // 2, device="cuda", dtype=torch.float64) * 1000
    cos, sin = ((1.3 * f(angle)).to(dtype) for f in (torch.cos, torch.sin))
    inputs = make(heads), make(kv_heads)
    upstream = make(heads), make(kv_heads)
    ours, plain, exact = (
        differentiate(lambda q, k, f=f, c=c: f(q, k, *c), i, u)
        for f, i, u, c in (
            (rotary.rotate, inputs, upstream, (cos, sin)),
            (rotate_torch, inputs, upstream, (cos, sin)),
            (rotate_reference, exactly(inputs), exactly(upstream), (cos.double(), sin.double())),
        )
    )
    compare(ours, plain, exact)
    for result in ours:
        assert result.transpose(1, 2).is_contiguous(), "attention and projections would copy it"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ROTARY)
def test_projections_are_rotated_and_copied_to_the_bit(case, dtype):
    """The bits of `rotate` and of copies, with cos and sin laid out as by transformers too."""
    torch.manual_seed(len(case))
    batch, tokens, heads, kv_heads, dim = ROTARY[case]
    sizes = [heads * dim, kv_heads * dim, kv_heads * dim]

    def split(joint: torch.Tensor):
        parts = joint.split(sizes, -1)
        return tuple(part.view(batch, tokens, -1, dim).transpose(1, 2) for part in parts)

    made = split(draw(batch, tokens, sum(sizes), dtype=dtype))
    cos, sin = draw(2, 1, dim // 2, tokens, dtype=dtype).mT
    upstream = tuple(draw(*part.mT.shape, dtype=dtype).mT for part in made)
    expected = differentiate(
        lambda q, k: rotary.rotate(q, k, cos.contiguous(), sin.contiguous()), made[:2], upstream[:2]
    )
    results = rotary.rotate_projections(*made, cos, sin)
    joint = torch.full((batch, tokens, sum(sizes)), float("nan"), device="cuda", dtype=dtype)
    rotary.rotate_back(upstream, cos, sin, split(joint))
    wanted = (*expected[:2], made[2], *expected[2:], upstream[2])
    for place, (got, true) in enumerate(zip((*results, *split(joint)), wanted, strict=True)):
        assert torch.equal(got, true), place
    for result in results:
        assert result.transpose(1, 2).is_contiguous(), "attention and projections would copy it"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "vocab", "width", "chunk", "supervised"),
    [
        (1, 1000, 128, 1024, 1.0),
        (129, 201_088, 2880, 50, 0.7),
        (300, 4097, 100, 128, 1.0),
        (700, 50_000, 512, 1024, 0.1),
        (2048, 201_088, 2880, 1024, 1.0),
    ],
)
def test_cross_entropy(rows, vocab, width, chunk, supervised, dtype):
    torch.manual_seed(rows)
    hidden = draw(rows, width, dtype=dtype)
    weight = draw(vocab, width, dtype=dtype, scale=3 * width**-0.5)
    labels = torch.randint(0, vocab, (rows,), device="cuda")
    labels[torch.rand(rows, device="cuda") >= supervised] = -100
    labels[0] = vocab - 1
    count = int((labels != -100).sum())
    leaves = [hidden.clone().requires_grad_() for _ in "12"]
    losses = (
        cross_entropy.linear_cross_entropy(leaves[0], weight, labels, chunk),
        linear_cross_entropy_reference(leaves[1], weight, labels),
    )
    results = [
        (loss.detach(), *torch.autograd.grad(loss, leaf, loss.new_tensor(1 / count)))
        for loss, leaf in zip(losses, leaves, strict=True)
    ]
    compare(*results, exact_in_pieces(hidden.double(), weight.double(), labels))
    assert not results[0][1][labels == -100].any()
    with torch.no_grad():
        again = cross_entropy.linear_cross_entropy(hidden, weight, labels, chunk)
    assert torch.equal(again, results[0][0]), "the loss without gradients is the loss"


def exact_in_pieces(hidden, weight, labels) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference over a few rows at a time, its gradient scaled as the test scales."""
    count, loss, gradients = int((labels != -100).sum()), hidden.new_zeros(()), []
    for part, wanted in zip(hidden.split(256), labels.split(256), strict=True):
        leaf = part.clone().requires_grad_()
        piece = linear_cross_entropy_reference(leaf, weight, wanted)
        gradients.append(torch.autograd.grad(piece / count, leaf)[0])
        loss = loss + piece.detach()
    return loss, torch.cat(gradients)


def test_large_logits_and_no_labels():
    hidden, weight = draw(40, 64, scale=30), draw(3000, 64, scale=3)
    labels = torch.randint(0, 3000, (40,), device="cuda")
    leaf = hidden.clone().requires_grad_()
    exact = linear_cross_entropy_reference(hidden.double(), weight.double(), labels)
    got = cross_entropy.linear_cross_entropy(leaf, weight, labels, 16)
    assert abs(got.item() - exact.item()) <= 1e-6 * exact.item()
    none = cross_entropy.linear_cross_entropy(leaf, weight, torch.full_like(labels, -100))
    none.backward()
    assert none.item() == 0 and not leaf.grad.any()


def test_the_losss_memory_is_that_of_a_chunk():
    hidden, weight = draw(8192, 512, dtype=torch.bfloat16), draw(50_000, 512, dtype=torch.bfloat16)
    labels = torch.randint(0, 50_000, (8192,), device="cuda")
    leaf = hidden.requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    cross_entropy.linear_cross_entropy(leaf, weight, labels, 512).backward()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 1.3 * 512 * 50_000 * 2 + 5 * hidden.numel() * 2


def make_models(dtype=torch.float32):
    """transformers' small gpt-oss, and the same with everything fused."""
    from transformers import GptOssConfig, GptOssForCausalLM

    from sparselong.model.fused import chunk_loss, fuse

    torch.manual_seed(0)
    config = GptOssConfig(
        num_hidden_layers=4, hidden_size=96, intermediate_size=64, num_local_experts=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, vocab_size=500,
        num_experts_per_tok=2, sliding_window=16, pad_token_id=0, attn_implementation="eager",
        layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    theirs = GptOssForCausalLM(config).to("cuda", dtype).train()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim == 1:  # norms, sinks, biases: nothing at its initial value
                parameter += torch.randn_like(parameter) * 0.3
    theirs.lm_head.requires_grad_(False)
    for layer in theirs.model.layers:
        layer.mlp.router.requires_grad_(False)  # a trained router runs in plain torch
    ours = copy.deepcopy(theirs)
    ours.set_attn_implementation("sparselong")
    fuse(ours)
    chunk_loss(ours)
    return theirs, ours


@needs_model
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_fused_model_is_the_model(checkpointing):
    theirs, ours = make_models()
    ids = torch.randint(1, 500, (2, 70), device="cuda")
    labels = ids.masked_fill(torch.rand(ids.shape, device="cuda") < 0.3, -100)
    mask = torch.ones_like(ids)
    mask[1, 50:] = 0
    labels[1, 50:] = -100
    outcomes = []
    for model in (theirs, ours):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        logits = model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
        given = {"input_ids": ids, "attention_mask": mask, "labels": labels, "use_cache": False}
        output = model(**given, num_items_in_batch=torch.tensor(37))
        output.loss.backward()
        outcomes.append([logits, output.loss, {n: p.grad for n, p in model.named_parameters()}])
    (logits, loss, grads), (our_logits, our_loss, our_grads) = outcomes
    assert output.logits is None
    assert (our_logits - logits).norm() <= 1e-5 * logits.norm()
    assert abs(our_loss - loss) <= 1e-5 * loss
    for name, gradient in grads.items():
        if gradient is not None:
            assert (our_grads[name] - gradient).norm() <= 2e-4 * gradient.norm() + 1e-8, name


@needs_model
def test_bf16_errs_no_more_than_twice_transformers():
    exact, _ = make_models()
    theirs, ours = make_models(torch.bfloat16)
    exact.load_state_dict(theirs.state_dict())
    ids = torch.randint(1, 500, (2, 70), device="cuda")
    outcomes = []
    for model in (exact, theirs, ours):
        model.zero_grad()
        output = model(ids, labels=ids, use_cache=False)
        output.loss.backward()
        outcomes.append(
            {n: p.grad.double() for n, p in model.named_parameters() if "layernorm" in n}
        )
    true, plain, fused = (torch.cat(list(o.values())) for o in outcomes)
    assert (fused - true).norm() <= 2 * (plain - true).norm()


@needs_model
def test_generate_gives_the_same_tokens():
    theirs, ours = make_models()
    ids = torch.randint(1, 500, (2, 9), device="cuda")
    tokens = [
        m.eval().generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=[])
        for m in (theirs, ours)
    ]
    assert torch.equal(*tokens)
