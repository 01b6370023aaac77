"""Generation with a static cache on the CPU gives the tokens of transformers' generate."""

from typing import Any

import pytest
import torch
from transformers import GptOssConfig, GptOssForCausalLM

from sparselong.errors import StageError
from sparselong.generation import decoder as generation
from sparselong.generation.decoder import Decoder, generate
from sparselong.generation.prompt_cache import make_prompt_cache
from sparselong.generation.step import KernelStep
from sparselong.model.packed_linear import PackedLinear
from sparselong.model.quantizer import replace_with_packed
from sparselong.packing import dense, integer
from sparselong.packing.dense import DenseFormat
from sparselong.runtime.settings import current

WINDOW = 8
CONFIG = GptOssConfig(
    num_hidden_layers=4,
    hidden_size=64,
    intermediate_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    num_local_experts=4,
    num_experts_per_tok=2,
    sliding_window=WINDOW,
    vocab_size=96,
    layer_types=["sliding_attention", "full_attention"] * 2,
    eos_token_id=None,
    pad_token_id=0,
)


@pytest.fixture(scope="module")
def model() -> GptOssForCausalLM:
    """A random model with weights large enough that a wrong key changes tokens."""
    torch.manual_seed(0)
    model = GptOssForCausalLM._from_config(CONFIG, dtype=torch.float32, attn_implementation="eager")
    fmt = DenseFormat(4, "2:4", 32)
    replace_with_packed(model, fmt)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("_blocks"):
            tensor.random_(0, 256)
        elif name.endswith("_scales"):
            tensor.random_(123, 127)
        elif tensor.is_floating_point() and "rotary" not in name and "norm" not in name:
            tensor.data.normal_(0.0, 0.5)
    for module in model.modules():
        if isinstance(module, PackedLinear):
            shape = (module.out_features, module.in_features)
            mask = (torch.rand(*shape).view(shape[0], -1, 4).argsort(-1) < 2).view(shape)
            scale = (0.1 + 0.1 * torch.rand(shape[0], shape[1] // 32)).bfloat16()
            codes = integer.quantize(torch.randn(shape) * 0.5, scale, 4)
            for name, tensor in dense.pack(fmt, codes, mask, scale).items():
                getattr(module, name).copy_(tensor)
    return model.requires_grad_(False).eval()


def generate_with_transformers(model: Any, prompt: torch.Tensor, count: int) -> list[int]:
    out = model.generate(
        prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False, use_cache=True
    )
    return out[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("prompt_tokens", [1, WINDOW - 1, WINDOW, 3 * WINDOW + 1])
def test_tokens_match_transformers_beyond_the_window(model, prompt_tokens):
    prompt = torch.randint(1, 96, (1, prompt_tokens), generator=torch.Generator().manual_seed(3))
    expected = generate_with_transformers(model, prompt, 3 * WINDOW)
    assert list(generate(model, prompt, 3 * WINDOW)) == expected
    assert len(set(expected)) > 6, "too few distinct tokens for a meaningful comparison"


def test_a_window_without_its_ring_gives_different_tokens(model):
    """Proves that the test above can fail: if sliding layers keep every key, tokens differ."""
    prompt = torch.randint(1, 96, (1, 3 * WINDOW), generator=torch.Generator().manual_seed(3))
    expected = generate_with_transformers(model, prompt, 2 * WINDOW)
    decoder = Decoder(model, 64)
    longer = Decoder(model, 64)
    model.config.sliding_window = 32
    try:
        longer = Decoder(model, 64)
    finally:
        model.config.sliding_window = WINDOW
    assert list(generate(model, prompt, 2 * WINDOW, decoder=decoder)) == expected
    assert list(generate(model, prompt, 2 * WINDOW, decoder=longer)) != expected


@pytest.mark.parametrize("attention", ["eager", "sparselong"])
@pytest.mark.parametrize("chunk", [1, WINDOW - 1, WINDOW, WINDOW + 3])
def test_a_chunked_prompt_leaves_the_same_state_as_a_whole_one(
    model, chunk, attention, monkeypatch
):
    monkeypatch.setattr(model.config, "_attn_implementation", attention)
    prompt = torch.randint(1, 96, (1, 3 * WINDOW + 1), generator=torch.Generator().manual_seed(3))
    whole, parts = Decoder(model, 40), Decoder(model, 40)
    expected = whole.start(prompt)
    monkeypatch.setattr(generation, "PROMPT_TOKENS", chunk)
    torch.testing.assert_close(parts.start(prompt), expected, rtol=1e-3, atol=1e-3)
    for ours, theirs in zip(parts.caches, whole.caches, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(ours.values, theirs.values, rtol=1e-3, atol=1e-3)
    assert parts.step.position == whole.step.position


def test_keys_of_a_prompt_are_stored_once(model, monkeypatch):
    """No layer of the cache passed to transformers holds tensors other than the decoder's."""
    made = []

    def make(caches, begin):
        made.append(make_prompt_cache(caches, begin))
        return made[-1]

    monkeypatch.setattr(generation, "make_prompt_cache", make)
    monkeypatch.setattr(generation, "PROMPT_TOKENS", 2 * WINDOW)
    decoder = Decoder(model, 64)
    decoder.start(torch.ones(1, 5 * WINDOW, dtype=torch.int64))
    assert [layer.get_seq_length() for layer in made[0].layers] == [5 * WINDOW] * 4
    ours = {id(tensor) for cache in decoder.caches for tensor in (cache.keys, cache.values)}
    for layer in made[0].layers:
        held = [v for v in vars(layer).values() if isinstance(v, torch.Tensor) and v.numel() > 1]
        assert all(id(tensor) in ours for tensor in held)


def test_an_interrupted_prompt_leaves_no_state(model, monkeypatch):
    """Experts are sliced only during the prompt, and the next prompt is unaffected."""
    monkeypatch.setattr(generation, "PROMPT_TOKENS", WINDOW + 3)
    limits = []

    def break_off(*_):
        limits.append(current().inference_tokens)
        if len(limits) == 2:
            raise InterruptedError

    decoder = Decoder(model, 40)
    hook = model.model.layers[2].register_forward_hook(break_off)
    with hook, pytest.raises(InterruptedError):
        decoder.start(torch.full((1, 39), 7))
    assert limits == [generation.EXPERT_TOKENS] * 2
    assert current().inference_tokens is None
    prompt = torch.randint(1, 96, (1, WINDOW + 4), generator=torch.Generator().manual_seed(3))
    assert torch.equal(decoder.start(prompt), Decoder(model, 40).start(prompt))


def test_only_the_last_hidden_state_of_a_chunk_is_kept(model):
    sizes, decoder = [], Decoder(model, 40)
    with model.lm_head.register_forward_pre_hook(
        lambda _, args: sizes.append(args[0].untyped_storage().nbytes())
    ):
        decoder.start(torch.full((1, 3 * WINDOW), 7))
    assert sizes == [CONFIG.hidden_size * 4]


@pytest.mark.parametrize("chunk", [WINDOW, 3 * WINDOW, 1024])
def test_a_prompt_may_fill_all_positions_but_one(model, chunk, monkeypatch):
    monkeypatch.setattr(generation, "PROMPT_TOKENS", chunk)
    prompt = torch.randint(1, 96, (1, 39), generator=torch.Generator().manual_seed(3))
    decoder = Decoder(model, 40)
    list(generate(model, torch.full((1, 30), 7), 10, decoder=decoder))
    expected = generate_with_transformers(model, prompt, 1)
    assert list(generate(model, prompt, 1, decoder=decoder)) == expected


def test_a_decoder_serves_several_prompts(model):
    decoder = Decoder(model, 48)
    for seed in range(3):
        prompt = torch.randint(1, 96, (1, 9), generator=torch.Generator().manual_seed(seed))
        expected = generate_with_transformers(model, prompt, 12)
        assert list(generate(model, prompt, 12, decoder=decoder)) == expected


def test_sampling_follows_seed_and_temperature(model):
    prompt = torch.tensor([[5, 6, 7]])
    draw = lambda **options: list(generate(model, prompt, 16, **options))  # noqa: E731
    assert draw(temperature=1.0, seed=1) == draw(temperature=1.0, seed=1)
    assert draw(temperature=5.0, seed=1) != draw(temperature=5.0, seed=2)
    assert draw(temperature=5.0, top_p=1e-6, seed=1) == draw()


def test_generation_ends_after_a_stop_token(model):
    prompt = torch.tensor([[5, 6, 7]])
    tokens = list(generate(model, prompt, 16))
    stop = tokens[5]
    assert list(generate(model, prompt, 16, stop=(stop,))) == tokens[: tokens.index(stop) + 1]


def test_nan_logits_name_the_token(model):
    decoder = Decoder(model, 32)
    tokens = generate(model, torch.tensor([[5, 6]]), 8, decoder=decoder)
    next(tokens)
    decoder.caches[1].values[:, 0] = float("nan")
    with pytest.raises(StageError, match="generated token"):
        list(tokens)


@pytest.mark.parametrize("is_late", [False, True])
def test_infinite_logits_name_the_token(model, is_late):
    tokens = generate(model, torch.tensor([[5, 6]]), 8)
    if is_late:
        next(tokens)
    kept = model.lm_head.weight.detach().clone()
    model.lm_head.weight.detach()[7, 0] = torch.inf
    try:
        with pytest.raises(StageError, match=r"token [02] .*not finite"):
            list(tokens)
    finally:
        model.lm_head.weight.detach().copy_(kept)


def test_prompts_that_do_not_fit_are_refused(model):
    with pytest.raises(ValueError, match="input_ids"):
        list(generate(model, torch.ones(2, 3, dtype=torch.int64), 4))
    with pytest.raises(ValueError, match="room for 6"):
        list(generate(model, torch.ones(1, 3, dtype=torch.int64), 4, decoder=Decoder(model, 6)))
    with pytest.raises(ValueError, match="temperature"):
        list(generate(model, torch.ones(1, 3, dtype=torch.int64), 4, temperature=-1.0))
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="temperature"):
            list(generate(model, torch.ones(1, 3, dtype=torch.int64), 4, temperature=wrong))
    most = model.config.max_position_embeddings
    with pytest.raises(ValueError, match=f"{most + 1}; allowed: the model's {most}"):
        next(generate(model, torch.ones(1, 3, dtype=torch.int64), most - 2))
    with pytest.raises(ValueError, match=r"torch.float32; allowed: torch.int64"):
        next(generate(model, torch.ones(1, 3), 4))
    for wrong, told in ((96, "1 to 96"), (-1, "-1 to 1")):
        with pytest.raises(ValueError, match=f"tokens from {told}; allowed: 0 to 95"):
            next(generate(model, torch.tensor([[1, wrong]]), 4))


def test_a_step_refuses_more_heads_than_its_kernel_takes(model):
    assert KernelStep(model, [], 8).layers
    model.config.num_attention_heads = 34
    try:
        with pytest.raises(ValueError, match="num_attention_heads: 34 of 2 KV heads"):
            KernelStep(model, [], 8)
    finally:
        model.config.num_attention_heads = 4


def test_a_model_on_another_gpu_is_refused():
    generation._check_current(1, 1)
    with pytest.raises(ValueError, match="on cuda:1, the current device is cuda:0"):
        generation._check_current(1, 0)
