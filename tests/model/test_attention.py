"""Entry points: our attention against transformers' eager gpt-oss in fp32 on the CPU."""

import subprocess

import pytest
import torch
from transformers import AutoModelForCausalLM, Mxfp4Config

from sparselong.model import attention as entry_point
from sparselong.model.attention import _boundaries, find_boundaries
from sparselong.model.documents import document_masks
from sparselong.runtime.settings import current, using
from tests.conftest import ROOT

TOKENS = 90  # exceeds the small model's window of 64


def open_model(base, implementation: str):
    model = AutoModelForCausalLM.from_pretrained(
        base,
        quantization_config=Mxfp4Config(dequantize=True),
        attn_implementation=implementation,
    )
    return model.float().train()


@pytest.fixture(scope="module")
def models(untrained_base):
    import sparselong  # noqa: F401  registers the implementation

    return open_model(untrained_base, "eager"), open_model(untrained_base, "sparselong")


def padded(lengths: list[int], side: str) -> dict:
    ids = torch.randint(9, 2000, (len(lengths), TOKENS), generator=torch.Generator().manual_seed(1))
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    if side == "left":
        mask = mask.flip(1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def compare(models, inputs: list[dict], real: torch.Tensor) -> None:
    """Assert equal logits on real tokens and equal gradients of every parameter and sink."""
    outcomes = []
    for model, given in zip(models, inputs, strict=True):
        model.zero_grad()
        logits = model(**given, use_cache=False).logits[real]
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
        (logits * weights).sum().backward()
        outcomes.append((logits.detach(), {n: p.grad for n, p in model.named_parameters()}))
    (wanted, wanted_grads), (got, got_grads) = outcomes
    assert (got - wanted).norm() <= 1e-5 * wanted.norm()
    for name, gradient in wanted_grads.items():
        if gradient is not None:
            assert (got_grads[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name
    assert got_grads["model.layers.0.self_attn.sinks"].abs().sum() > 0


def test_without_padding(models):
    given = padded([TOKENS, TOKENS], "right")
    compare(models, [{"input_ids": given["input_ids"]}] * 2, given["attention_mask"].bool())


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(models, side):
    given = padded([TOKENS, 17, 71], side)
    compare(models, [given] * 2, given["attention_mask"].bool())


def test_packing_by_position_ids(models):
    """Ours needs only position ids; eager needs prepared masks, which ours also accepts."""
    eager, ours = models
    ids = padded([TOKENS], "right")["input_ids"]
    positions = torch.cat([torch.arange(n) for n in (1, 40, 1, 48)])[None]
    masks = document_masks(eager.config, positions, torch.float32)
    plain = {"input_ids": ids, "position_ids": positions}
    real = torch.ones_like(ids, dtype=torch.bool)
    compare(models, [{**plain, "attention_mask": masks}, plain], real)
    compare(models, [{**plain, "attention_mask": masks}] * 2, real)
    with torch.no_grad():  # the boundaries must matter
        apart, together = ours(**plain).logits, ours(ids).logits
    assert (apart - together).norm() > 1e-3 * together.norm()


@pytest.mark.parametrize("lengths", [[12], [12, 5]])
def test_generate_with_a_cache_gives_the_same_tokens(models, lengths):
    ids = torch.randint(9, 2000, (len(lengths), 12), generator=torch.Generator().manual_seed(3))
    mask = torch.stack([(torch.arange(12) >= 12 - n).long() for n in lengths])
    eager, ours = (
        model.eval().generate(
            ids, attention_mask=mask, max_new_tokens=80, do_sample=False, eos_token_id=[]
        )
        for model in models
    )
    assert eager.shape[1] == 92 and torch.equal(eager, ours)


def test_generate_with_beams_and_in_chunks(models):
    ids = torch.randint(9, 2000, (2, 12), generator=torch.Generator().manual_seed(3))
    mask = torch.stack([(torch.arange(12) >= n).long() for n in (0, 7)])
    for more in ({"num_beams": 2}, {"prefill_chunk_size": 5}):
        eager, ours = (
            model.eval().generate(
                ids, attention_mask=mask, max_new_tokens=10, do_sample=False, **more
            )
            for model in models
        )
        assert torch.equal(eager, ours), more


def test_static_caches_are_refused(models):
    """Their keys extend past the last query, and a 2-d mask does not say how far."""
    ids = torch.randint(9, 2000, (2, 12), generator=torch.Generator().manual_seed(3))
    settings = {"max_new_tokens": 2, "cache_implementation": "static", "disable_compile": True}
    with pytest.raises(ValueError, match="past_key_values: 13 keys, and the last query is number"):
        models[1].eval().generate(ids, **settings)


def test_positions_modified_in_place_are_read_again(models):
    ids = padded([TOKENS], "right")["input_ids"]
    positions = torch.arange(TOKENS)[None]
    with torch.no_grad():
        together = models[1](ids, position_ids=positions, use_cache=False).logits
        positions[:, 40:] -= 40
        apart = models[1](ids, position_ids=positions, use_cache=False).logits
        fresh = models[1](ids, position_ids=positions.clone(), use_cache=False).logits
    assert torch.equal(apart, fresh) and not torch.equal(apart, together)


def test_inference_mode(models):
    given = padded([TOKENS, 17], "left")
    real = given["attention_mask"].bool()
    with torch.inference_mode():
        wanted, got = (
            model(**{k: t.clone() for k, t in given.items()}).logits[real] for model in models
        )
    assert (got - wanted).norm() <= 1e-5 * wanted.norm()


def test_autocast(models):
    """Under autocast, rotary leaves queries and keys in fp32 while values are bf16."""
    ids = padded([TOKENS], "right")["input_ids"]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted, got = (model(ids, use_cache=False).logits.float() for model in models)
    assert (got - wanted).norm() <= 2e-2 * wanted.norm()


def test_all_layers_share_the_boundaries_unless_the_mask_holds_the_window():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0]])
    full, window = (_boundaries(None, positions, (1, 6, 6), size) for size in (None, 2))
    assert full is window and full.tolist() == [0, 3, 5, 6]
    banded = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril().triu(-1)
    assert _boundaries(banded, None, (1, 6, 6), 2) is None
    with pytest.raises(ValueError, match="a 4-d mask with another pattern"):
        _boundaries(banded, None, (1, 6, 6), None)


def test_boundaries_by_hand():
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    assert find_boundaries(None, None, 2, 6, 6) is None
    assert find_boundaries(torch.ones(2, 6), None, 2, 6, 6) is None
    assert find_boundaries(mask, None, 1, 6, 6).tolist() == [0, 2, 6]
    positions = torch.tensor([[0, 1, 2, 0, 1, 0]])
    assert find_boundaries(None, positions, 1, 6, 6).tolist() == [0, 3, 5, 6]
    assert find_boundaries(None, torch.arange(6)[None], 1, 6, 6) is None
    assert find_boundaries(mask, torch.tensor([[1, 1, 0, 1, 0, 1]]), 1, 6, 6).tolist() == [
        0,
        2,
        4,
        6,
    ]
    assert find_boundaries(mask, torch.tensor([[9]]), 1, 1, 6).tolist() == [0, 2, 6]
    square = torch.tril(torch.ones(4, 4)).bool()
    square[2:, :2] = False
    assert find_boundaries(square[None, None], None, 1, 4, 4).tolist() == [0, 2, 4]
    additive = torch.where(square, 0.0, -1e9)[None, None]
    assert find_boundaries(additive, None, 1, 4, 4).tolist() == [0, 2, 4]
    last = torch.tensor([[False, False, True, True]])[None, None]
    assert find_boundaries(last, None, 1, 1, 4).tolist() == [0, 2, 4]


def refused_masks():
    causal = torch.tril(torch.ones(6, 6)).bool()
    prefix = causal.clone()
    prefix[:3, :3] = True
    hole = causal.clone()
    hole[5, 2] = False
    itself = causal.clone()
    itself[3, 3] = False
    distance = (torch.arange(6)[:, None] - torch.arange(6)).clamp(min=0).float()
    slopes = torch.where(causal, -0.5 * distance, -1e9)
    static = torch.tensor([[True, True, True, False, False, False]])
    return {
        "bidirectional": (torch.ones(6, 6).bool(), "another pattern"),
        "prefix": (prefix, "another pattern"),
        "hole": (hole, "another pattern"),
        "itself": (itself, "another pattern"),
        "slopes": (slopes, "adds values"),
        "static": (static, "another pattern"),
        "heads": (causal.expand(2, 6, 6), r"shape \[1, 2, 6, 6\]"),
    }


@pytest.mark.parametrize("name", refused_masks())
def test_masks_that_describe_no_documents_are_refused(name):
    mask, message = refused_masks()[name]
    mask = mask[None] if mask.ndim == 3 else mask[None, None]
    with pytest.raises(ValueError, match=f"attention_mask: .*{message}"):
        find_boundaries(mask, None, 1, mask.shape[2], 6)


def test_a_4d_mask_must_contain_the_layers_window():
    distance = torch.arange(6)[:, None] - torch.arange(6)
    near = (distance >= 0) & (distance < 3)
    assert find_boundaries(near[None, None], None, 1, 6, 6, 3) is None
    for window in (None, 2, 4):
        with pytest.raises(ValueError, match=f"attention_mask: .* window {window}"):
            find_boundaries(near[None, None], None, 1, 6, 6, window)


def test_tokens_after_padding_are_a_document_or_refused():
    mask = torch.tensor([[1, 1, 0, 0, 1, 1]])
    resets = torch.tensor([[0, 1, 0, 0, 0, 1]])
    assert find_boundaries(mask, resets, 1, 6, 6).tolist() == [0, 2, 4, 6]
    for positions, queries in ((None, 6), (torch.tensor([[0, 1, 1, 1, 2, 3]]), 6), (resets, 1)):
        with pytest.raises(ValueError, match="attention_mask: tokens on both sides of padding"):
            find_boundaries(mask, positions, 1, queries, 6)
    with pytest.raises(ValueError, match=r"attention_mask: shape \[1, 6\] for 7 keys"):
        find_boundaries(mask, None, 1, 7, 7)


def test_a_model_without_sinks_is_refused():
    q = torch.zeros(1, 2, 3, 8)
    with pytest.raises(ValueError, match="module: Identity without sinks; allowed: gpt-oss's"):
        entry_point.attention_forward(torch.nn.Identity(), q, q, q, None)


def test_one_line_patches(untrained_base, forked_python):
    """Our function is called with eager's own masks and gives the same logits."""
    script = f"""
import torch, sparselong
from transformers import AutoModelForCausalLM
from transformers.models.gpt_oss import modeling_gpt_oss as m
from sparselong.model.loading import load_model
from pathlib import Path
model = load_model(Path({str(untrained_base)!r}))
ids = torch.arange(10, 100)[None].repeat(2, 1)
mask = torch.ones_like(ids); mask[1, :30] = 0
before = model(ids, attention_mask=mask).logits
original, theirs = sparselong.attention_forward, m.eager_attention_forward
for line in (
    "sparselong.patch_attention()", "m.eager_attention_forward = sparselong.attention_forward"
):
    calls = []
    m.eager_attention_forward = theirs
    exec(line)
    patched = m.eager_attention_forward
    assert patched is original, line
    m.eager_attention_forward = lambda *a, **k: calls.append(1) or patched(*a, **k)
    after = model(ids, attention_mask=mask).logits
    assert len(calls) == 4, line
    assert (after - before)[mask.bool()].norm() <= 1e-5 * before[mask.bool()].norm(), line
"""
    subprocess.run([forked_python, "-c", script], cwd=ROOT, check=True)


def test_attention_uses_the_chosen_backend(models, monkeypatch):
    """Set through the runtime, as in the stages; an unsuitable backend raises."""
    asked = []
    original = entry_point.attention

    def watched(*tensors, **arguments):
        asked.append((arguments["backend"], current().deterministic))
        return original(*tensors, **arguments)

    monkeypatch.setattr(entry_point, "attention", watched)
    ids = torch.tensor([[1, 2, 3]])
    models[1](ids)
    with using(attention_backend="torch", deterministic=True):
        models[1](ids)
    assert set(asked[:4]) == {(None, False)} and set(asked[4:]) == {("torch", True)}
    for name, message in (
        ("torch_flash", "backend: torch_flash with cpu tensors"),
        ("flash", "backend: 'flash'; allowed: "),
    ):
        with pytest.raises(ValueError, match=message), using(attention_backend=name):
            models[1](ids)


def test_dropout_is_refused(models):
    model = models[1]
    model.config.attention_dropout = 0.1
    layer = model.model.layers[0].self_attn
    before, layer.attention_dropout = layer.attention_dropout, 0.1
    try:
        with pytest.raises(ValueError, match="dropout"):
            model.train()(torch.tensor([[1, 2, 3]]))
    finally:
        layer.attention_dropout = before
