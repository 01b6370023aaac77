"""Likelihoods and perplexity measured in several processes are those of one."""

import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparselong.evaluate.spread import Spread
from sparselong.processes.failure import read_failure
from tests.distributed.evaluation import (
    BATCH_SIZE,
    compare,
    continue_all,
    draw,
    draw_prompts,
    measure,
    measure_with,
    prefer,
    run_out_of_memory,
)
from tests.distributed.pool import Pool

COUNT = 9  # not a multiple of any number of rows in a batch
RELATIVE = 1e-6


@pytest.fixture(scope="module")
def model(untrained_base):
    from sparselong.model.loading import load_model

    return load_model(untrained_base)


@pytest.fixture(scope="module")
def texts(model):
    """Requests, of which every second one is greedy, and conversations."""
    requests, samples = draw(COUNT)
    return prefer(model, requests), samples


@pytest.fixture(scope="module")
def wanted(model, texts) -> dict:
    """One process's figures."""
    return measure_with(model, *texts, Spread())


def assert_equal(found: dict, wanted: dict) -> None:
    for (score, greedy), (right, right_greedy) in zip(
        found["answers"], wanted["answers"], strict=True
    ):
        assert score == pytest.approx(right, rel=RELATIVE) and greedy == right_greedy
    for key in ("supervised", "all"):
        mine, theirs = found["perplexity"][key], wanted["perplexity"][key]
        assert mine["tokens"] == theirs["tokens"]
        assert mine["perplexity"] == pytest.approx(theirs["perplexity"], rel=RELATIVE)
    for mine, theirs in zip(
        found["perplexity"]["by_position"], wanted["perplexity"]["by_position"], strict=True
    ):
        assert (mine["first"], mine["tokens"]) == (theirs["first"], theirs["tokens"])
        assert mine["nll"] == pytest.approx(theirs["nll"], rel=RELATIVE)
    pairs = zip(
        found["perplexity"]["conversations"], wanted["perplexity"]["conversations"], strict=True
    )
    for (mine, tokens), (theirs, right_tokens) in pairs:
        assert tokens == right_tokens and mine == pytest.approx(theirs, rel=RELATIVE)


def test_one_process_s_answers_are_those_of_the_logits(model, texts, wanted):
    for number, (request, (score, greedy)) in enumerate(
        zip(texts[0], wanted["answers"], strict=True)
    ):
        with torch.no_grad():
            logits = model(torch.tensor([request.tokens]), use_cache=False).logits[0].double()
        ends = torch.tensor(request.tokens[-request.scored :])
        picked = logits[-request.scored - 1 : -1].log_softmax(-1).gather(1, ends[:, None])
        assert score == pytest.approx(float(picked.sum()), rel=RELATIVE)
        assert greedy == bool(number % 2)


@pytest.mark.parametrize(("size", "expert_size"), [(2, 2), (4, 1), (4, 2), (4, 4)])
def test_figures_of_several_processes_are_one_process_s(
    pools, untrained_base, texts, wanted, size, expert_size
):
    found = pools[size].run(measure, untrained_base, *texts, expert_size)
    for each in found:
        assert_equal(each, wanted)
    passes = [shape for each in found for shape in each["passes"] if shape != (1, 1)]
    assert sorted(passes) == sorted(wanted["passes"]), "the passes are not one process's, divided"
    longest = max(len(each["passes"]) for each in found)
    assert longest == 2 * math.ceil(math.ceil(COUNT / BATCH_SIZE) / size)


@pytest.mark.parametrize(("size", "expert_size"), [(2, 2), (4, 1), (4, 2)])
def test_prompts_are_continued_with_one_process_s_tokens(
    pools, model, untrained_base, size, expert_size
):
    """Each prompt is read once, by the processes that share one model."""
    from sparselong.evaluate.answering import continue_prompts
    from sparselong.model.tokenizer import load_tokenizer

    prompts = draw_prompts(5)
    wanted = continue_prompts(model, prompts, load_tokenizer(untrained_base), Spread())
    found = pools[size].run(continue_all, untrained_base, prompts, expert_size)
    for each in found:
        assert each["tokens"] == [one.tokens for one in wanted]
    read = [tokens for each in found[::expert_size] for tokens in each["read"]]
    assert sorted(read) == sorted(prompt.tokens for prompt in prompts)


@pytest.fixture(scope="module")
def other(untrained_base, tmp_path_factory):
    """The base with other routers."""
    folder = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(untrained_base, folder)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name in tensors:
            if "router.weight" in name:
                tensors[name] = -tensors[name]
        save_file(tensors, path, {"format": "pt"})
    return folder


@pytest.mark.parametrize(("size", "expert_size"), [(2, 2), (4, 1), (4, 2)])
def test_divergence_is_one_process_s(
    pools, model, untrained_base, other, texts, tmp_path, size, expert_size
):
    from sparselong.evaluate import divergence
    from sparselong.model.loading import load_model

    samples, alone = texts[1], tmp_path / "alone"
    divergence.save_states(model, samples, BATCH_SIZE, Spread(), alone)
    wanted = divergence.measure(load_model(other), samples, BATCH_SIZE, Spread(), alone)
    assert wanted["all"]["kl"] > 1e-3 and 0 < wanted["all"]["agreement"] < 1
    folder = tmp_path / "together"
    for found in pools[size].run(compare, untrained_base, other, samples, folder, expert_size):
        for key in ("all", "supervised"):
            assert found[key] == pytest.approx(wanted[key], rel=1e-4)
        pairs = zip(found["by_position"], wanted["by_position"], strict=True)
        assert all(mine == pytest.approx(theirs, rel=1e-3, abs=1e-6) for mine, theirs in pairs)
    if expert_size == 1:
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
            path.name: path.read_bytes() for path in alone.iterdir()
        }


@pytest.mark.parametrize("expert_size", [1, 4])
def test_fewer_rows_than_processes(pools, model, untrained_base, texts, expert_size):
    few = [rows[:2] for rows in texts]
    for each in pools[4].run(measure, untrained_base, *few, expert_size):
        assert_equal(each, measure_with(model, *few, Spread()))


def test_every_piece_is_needed(pools, untrained_base, texts, wanted):
    run = (measure, untrained_base, *texts, 2)
    for outcome, error in pools[2].try_run(*run, "results of others"):
        assert outcome == "raised" and "KeyError" in error
    found = pools[2].run(*run, "best token of all")
    with pytest.raises(AssertionError):
        assert_equal(found[1], wanted)


def test_a_rank_out_of_memory_ends_all_with_its_plan_and_use(untrained_base, texts, tmp_path):
    pool = Pool(2, timeout_seconds=60)
    outcomes = pool.try_run(run_out_of_memory, untrained_base, *texts, tmp_path)
    pool.close()
    kind, own = outcomes[1]
    assert kind == "raised" and "the GPU ran out of memory while base was measured" in own
    assert "19.00 GiB by the plan, of at least 23.00 GiB available" in own
    assert "(plan: 19.00 GiB)" in own and "evaluation.batch_size" in own
    assert outcomes[0] == ("died", 1)
    told = read_failure(tmp_path, 0)
    assert told is not None and told.consequence
    assert "rank 0 stops because rank 1 of 2 failed" in told.what
    wanted = (
        "rank 1: OutOfMemory: CUDA out of memory. Tried to allocate 2.00 GiB. (plan: 19.00 GiB)"
    )
    assert told.found == wanted
