"""Tokens are sampled on the device from the distribution of transformers' logits processors."""

from typing import Any

import pytest
import torch
from scipy import stats
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from sparselong.errors import StageError
from sparselong.generation import decoder as decoding
from sparselong.generation.decoder import Decoder, generate
from sparselong.generation.sampling import SETTINGS, UNITS, Sampler, Sampling
from tests.generation.small import VOCAB, as_prompt, draw_tokens, make_small

DRAWS = 10_000
NOTHING: Any = torch.empty((1, 0), dtype=torch.int64)


@pytest.fixture(scope="module")
def model():
    return make_small()


def probabilities_of(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Return each token's probability by transformers' processors, in fp64."""
    scores: Any = logits[None].double()
    scores = TemperatureLogitsWarper(sampling.temperature)(NOTHING, scores)
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(NOTHING, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(NOTHING, scores)
    return scores.softmax(-1)[0]


def draw(logits: torch.Tensor, sampling: Sampling, count: int = DRAWS) -> torch.Tensor:
    sampler = Sampler(len(logits), count, logits.device)
    sampler.load(sampling.draw(count), 0)
    return sampler.pick(logits, torch.arange(count))


def check(tokens: torch.Tensor, wanted: torch.Tensor) -> None:
    """Fail if tokens are improbable under the probabilities by a chi-square test."""
    found = torch.bincount(tokens, minlength=len(wanted)).double()
    expected = wanted * len(tokens)
    assert found[wanted == 0].sum() == 0
    common = expected >= 5
    pairs = [(found[common], expected[common])]
    if not common.all():
        pairs.append((found[~common].sum()[None], expected[~common].sum()[None]))
    observed, hoped = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    observed, hoped = observed[hoped > 0], hoped[hoped > 0]
    if len(hoped) > 1:
        assert stats.chisquare(observed, hoped * observed.sum() / hoped.sum()).pvalue > 1e-3
    assert found.sum() == len(tokens)


SETTINGS_TRIED = [
    Sampling(1.0),
    Sampling(3.0),
    Sampling(3.0, top_k=7),
    Sampling(2.0, top_p=0.8),
    Sampling(4.0, top_k=30, top_p=0.6),
    Sampling(2.0, top_k=VOCAB + 9, top_p=0.99),
    Sampling(3.0, top_p=1e-9),
]


@pytest.mark.parametrize("sampling", SETTINGS_TRIED, ids=str)
def test_the_distribution_is_transformers_s(model, sampling):
    decoder = Decoder(model, DRAWS + 20)
    logits = decoder.start(as_prompt(draw_tokens(9, 0)))
    decoder.set_sampling(sampling.draw(DRAWS))
    assert decoder._sampler is not None
    positions = int(decoder.step.position) + torch.arange(DRAWS)
    wanted = probabilities_of(logits, sampling)
    check(decoder._sampler.pick(logits, positions), wanted)


def test_other_settings_differ_by_the_same_test(model):
    """Proves that the test above can fail for each setting."""
    logits = Decoder(model, 20).start(as_prompt(draw_tokens(9, 0)))
    wanted = probabilities_of(logits, Sampling(4.0, top_k=30, top_p=0.6))
    check(draw(logits, Sampling(4.0, 30, 0.6)), wanted)
    for other in (Sampling(4.0, 30, 0.66), Sampling(4.0, 24, 0.6), Sampling(3.0, 30, 0.6)):
        with pytest.raises(AssertionError):
            check(draw(logits, other), wanted)


def test_each_token_of_a_generation_is_the_one_its_random_number_selects(model):
    """Compare with an inverse CDF over transformers' probabilities of one forward pass."""
    prompt, sampling = as_prompt(draw_tokens(11, 1)), Sampling(3.0, 40, 0.9, seed=4)
    settings = {"temperature": 3.0, "top_k": 40, "top_p": 0.9, "seed": 4}
    tokens = list(generate(model, prompt, 24, **settings))
    logits = model(torch.cat([prompt, as_prompt(tokens)], 1)).logits[0, prompt.shape[1] - 1 : -1]
    uniforms = sampling.draw(24)[SETTINGS:]
    for row, uniform, token in zip(logits, uniforms, tokens, strict=True):
        wanted, order = probabilities_of(row, sampling).sort(descending=True, stable=True)
        assert token == order[int((wanted.cumsum(0) > uniform).nonzero()[0])]
    assert len(set(tokens)) > 12


def test_tokens_follow_the_seed(model):
    prompt, decoder = as_prompt([5, 6, 7]), Decoder(model, 40)

    def sample(count: int = 12, **options: Any) -> list[int]:
        return list(generate(model, prompt, count, decoder=decoder, **options))

    greedy = sample()
    first = sample(temperature=3.0, seed=1)
    assert sample(temperature=3.0, seed=2) != first
    assert sample(temperature=3.0, seed=1) == first, "other settings in between"
    assert sample(20, temperature=3.0, seed=1)[:12] == first
    assert sample(temperature=3.0, top_k=1, seed=3) == greedy
    assert sample(temperature=3.0, top_p=1e-9, seed=3) == greedy
    assert sample() == greedy
    assert list(generate(model, prompt, 12, temperature=3.0, seed=1)) == first
    stop = first[4]
    ended = sample(temperature=3.0, seed=1, stop=(stop,))
    assert ended == first[: first.index(stop) + 1]


def test_a_captured_step_is_followed_by_one_capture_of_sampling(model, monkeypatch):
    """With stand-ins for graphs: greedy steps replay the first alone, sampled ones both."""
    replayed = []

    class Graph:
        def __init__(self, name: str, run: Any):
            self.name, self.run = name, run

        def replay(self) -> None:
            replayed.append(self.name)
            self.run()

    def capture(run: Any, warm_up: Any) -> Any:
        replayed.append("captured")
        warm_up()
        return Graph("sampling", run)

    monkeypatch.setattr(decoding, "capture_graph", capture)
    prompt, plain, decoder = as_prompt([5, 6, 7]), Decoder(model, 40), Decoder(model, 40)
    graph: Any = Graph("step", decoder.step.run)
    decoder._graph = graph
    tried: list[dict[str, Any]] = [{}, {"temperature": 3.0}, {"temperature": 2.0, "top_k": 9}, {}]
    for settings in tried:
        tokens = list(generate(model, prompt, 9, decoder=decoder, **settings))
        assert tokens == list(generate(model, prompt, 9, decoder=plain, **settings))
    sampled = ["step", "sampling"] * 8
    assert replayed == ["step"] * 8 + ["captured"] + sampled * 2 + ["step"] * 8


def test_settings_change_no_buffer():
    """A captured graph reads the same addresses for every setting."""
    sampler = Sampler(VOCAB, 40, torch.device("cpu"))
    buffers = [each for each in vars(sampler).values() if isinstance(each, torch.Tensor)]
    places = [each.data_ptr() for each in buffers]
    sampler.load(Sampling(2.0, 3, 0.5, 6).draw(9), 4)
    now = [each for each in vars(sampler).values() if isinstance(each, torch.Tensor)]
    assert [each.data_ptr() for each in now] == places and len(places) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_of_equal_logits_are_equally_likely(dtype):
    """As with transformers, top-k keeps all that equal the last; of the last by top-p one stays."""
    logits = torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0, 2.0, 0.0], dtype=dtype)
    for sampling in (Sampling(1.0, top_k=1), Sampling(1.0, top_k=3), Sampling(3.0, top_k=6)):
        check(draw(logits, sampling), probabilities_of(logits, sampling))
    kept = probabilities_of(logits, Sampling(1.0, top_p=0.7))
    drawn = draw(logits, Sampling(1.0, top_p=0.7))
    assert drawn.unique().tolist() == [1, 2, 3], "the lowest of equal tokens"
    check(logits[drawn].long(), torch.stack([kept[logits == n].sum() for n in range(4)]))


def test_a_large_vocabulary_keeps_its_tail():
    """Sums over a vocabulary as large as gpt-oss's are exact, and no index is out of range."""
    logits = torch.zeros(201_088)
    drawn = draw(logits, Sampling(1.0))
    assert drawn.max() < len(logits) and drawn.unique().numel() > 0.97 * DRAWS
    check(drawn // 20_109, torch.full((10,), 0.1, dtype=torch.float64))
    sampler = Sampler(len(logits), 3, logits.device)
    sampler.load(Sampling(1.0).draw(3), 0)
    sampler.uniforms.copy_(torch.tensor([0.0, 0.5, 1 - 2.0**-53]))
    assert sampler.pick(logits, torch.arange(3)).tolist() == [0, 100_544, 201_087]
    assert len(logits) * UNITS < 2**63


INFINITY, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("logits", "temperature", "allowed"),
    [
        ([1.0, 2.0, 1.5], 1e-300, {1}),
        ([1.0, 2.0, 2.0], 5e-324, {1, 2}),
        ([-1e38, 1e38, 0.0], 1e-30, {1}),
        ([1.0, 2.0, -INFINITY], 1e300, {0, 1}),
        ([1.0, INFINITY, 3.0], 1.0, {1}),
        ([-INFINITY, -INFINITY, 3.0], 1.0, {2}),
        ([NAN, 2.0, 3.0], 1.0, {0, 1, 2}),
        ([-NAN, NAN, INFINITY], 1.0, {0, 1, 2}),
    ],
)
def test_extremes_draw_a_token_that_exists(logits, temperature, allowed):
    drawn = draw(torch.tensor(logits), Sampling(temperature), 200)
    assert set(drawn.tolist()) <= allowed


def test_nan_logits_name_the_token(model):
    decoder = Decoder(model, 32)
    tokens = generate(model, as_prompt([5, 6]), 8, decoder=decoder, temperature=3.0, seed=1)
    next(tokens)
    decoder.caches[1].values[:, 0] = NAN
    with pytest.raises(StageError, match="generated token"):
        list(tokens)
    wanted = list(generate(model, as_prompt([5, 6]), 4))
    assert list(generate(model, as_prompt([5, 6]), 4, decoder=decoder)) == wanted
    assert decoder.reused == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": NAN},
        {"top_k": -1},
        {"top_k": 2.5},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": NAN},
        {"seed": 2**64},
        {"seed": 1.5},
    ],
)
def test_settings_out_of_range_are_refused(model, wrong):
    name, value = next(iter(wrong.items()))
    with pytest.raises(ValueError, match=rf"(?s){name}.*{value}.*allowed"):
        next(generate(model, as_prompt([5, 6]), 4, **wrong))
    assert len(Sampling(seed=2**64 - 1).draw(3)) == len(Sampling(seed=-(2**63)).draw(3))
