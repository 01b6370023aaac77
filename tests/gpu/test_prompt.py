"""A decoder's prompt on a GPU: chunks give the same cache as the whole prompt."""

import copy

import pytest
import torch
from transformers import GptOssForCausalLM

from sparselong.generation import decoder as generation
from sparselong.generation.decoder import Decoder
from sparselong.model.fused import fuse
from sparselong.model.quantizer import replace_with_packed
from sparselong.packing.dense import DenseFormat
from tests.generation.test_decoder import CONFIG

WINDOW, DEVICE = 128, "cuda"


@pytest.fixture(scope="module")
def model() -> GptOssForCausalLM:
    """Return a small random model with a head_dim that the attention kernels support."""
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIG)
    config.head_dim, config.sliding_window = 64, WINDOW
    with torch.device(DEVICE):
        model = GptOssForCausalLM._from_config(
            config, dtype=torch.bfloat16, attn_implementation="sparselong"
        )
        replace_with_packed(model, DenseFormat(16, "none", 64))
    model.bfloat16()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("_blocks"):
            tensor.random_(0, 256)
        elif name.endswith("_scales"):
            tensor.random_(120, 123)
        elif tensor.is_floating_point() and "rotary" not in name and "norm" not in name:
            tensor.data.normal_(0.0, 0.2)
    fuse(model)
    return model.requires_grad_(False).eval()


def start(model: GptOssForCausalLM, prompt: torch.Tensor) -> Decoder:
    decoder = Decoder(model, prompt.shape[1] + 8, use_graph=False)
    assert not decoder.start(prompt).isnan().any()
    return decoder


@pytest.mark.parametrize("chunk", [1, 100, WINDOW, 300])
def test_a_chunked_prompt_fills_the_cache_like_a_whole_one(model, chunk, monkeypatch):
    """Rounding may change the routing of a few tokens; in each layer most must agree."""
    tokens = 64 if chunk == 1 else 700
    prompt = torch.randint(1, 96, (1, tokens), generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr(generation, "EXPERT_TOKENS", tokens)
    whole = start(model, prompt)
    monkeypatch.setattr(generation, "PROMPT_TOKENS", chunk)
    monkeypatch.setattr(generation, "EXPERT_TOKENS", 70)
    parts = start(model, prompt)
    for ours, theirs in zip(parts.caches, whole.caches, strict=True):
        for got, wanted in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            filled = min(tokens, got.shape[1])
            got, wanted = got[:, :filled].float(), wanted[:, :filled].float()
            errors = (got - wanted).norm(dim=(0, 2)) / wanted.norm(dim=(0, 2))
            assert errors.median() < 0.03


def test_chunks_bound_the_memory_of_a_long_prompt(model, monkeypatch):
    prompt = torch.randint(1, 96, (1, 8192), generator=torch.Generator().manual_seed(3))
    peaks = []
    for chunk in (8192, 512):
        monkeypatch.setattr(generation, "PROMPT_TOKENS", chunk)
        decoder = Decoder(model, 8200, use_graph=False)
        decoder.start(prompt)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        decoder.forget()
        decoder.start(prompt)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del decoder
    assert peaks[1] < peaks[0] / 3


@pytest.mark.parametrize("answer", [0, 20, 200])
def test_a_continued_prompt_is_bit_identical_to_the_same_chunks(model, answer, monkeypatch):
    """A turn after an answer that overwrote the rings, and a fresh decoder with equal chunks."""
    prompt = torch.randint(1, 96, (1, 700), generator=torch.Generator().manual_seed(4))
    first = prompt[:, :450]
    monkeypatch.setattr(generation, "PROMPT_TOKENS", 450)
    fresh = Decoder(model, 800, use_graph=False)
    logits = fresh.start(prompt)
    decoder = Decoder(model, 800, use_graph=False)
    decoder.start(first)
    for token in range(answer):
        decoder.put(1 + token % 90)
        decoder.advance()
    assert torch.equal(decoder.start(prompt), logits)
    assert decoder.reused == 450 and fresh.reused == 0
    assert torch.equal(decoder.start(prompt[:, :600]), fresh.start(prompt[:, :600]))
    assert decoder.reused == fresh.reused == 450
    for ours, theirs in zip(decoder.caches, fresh.caches, strict=True):
        held = min(600, ours.keys.shape[1])
        assert torch.equal(ours.keys[:, :held], theirs.keys[:, :held])
        assert torch.equal(ours.values[:, :held], theirs.values[:, :held])
