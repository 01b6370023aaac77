"""llama.cpp itself opens the exported file, and computes the model that was exported.

`make test-llama` compiles llama-cpp-python and runs this; `make test` does not. The figures are
kept in benchmarks/results. llama.cpp rounds activations to 8 bits before it multiplies them with
MXFP4, keeps keys and values in f16, and rounds the bounds of YaRN's ramp to integers, so its logits
are not ours to the last digit.
"""

import itertools
import os
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from benchmarks.record import row, write
from sparselong.config import load
from sparselong.data import encode_files, select_usable
from sparselong.model import load_model, load_tokenizer
from tests.conftest import ROOT, load_script

llama_cpp = pytest.importorskip("llama_cpp", reason="make test-llama installs it")
from llama_cpp.llama_chat_format import Jinja2ChatFormatter  # noqa: E402

# Three minutes of training on one idle core.
pytestmark = pytest.mark.timeout(900)

CONFIG = ROOT / "configs/tiny.yaml"
POSITIONS = 500
AGREEMENT = {"bf16": 0.99, "q8_0": 0.98, "q4_k": 0.9}
"""Least fraction of next tokens that are ours, by type of the dense weights."""
QUESTIONS = (
    "What does str.split do?",
    "How do I open a file in Python?",
    "What does len return for a dict?",
    "Explain the difference between a list and a tuple.",
    "Was macht itertools.chain? 🙂",
)
ANSWER = 24
TEXTS = (
    "Don't\tWE'LL  camelCase 12345 ÉCOLE naïve 你好 🙂🙂\r\n\r\n  x = a/b//c  ",
    "<|start|>user<|message|>Hello<|end|>",
)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """The demo's stage 02: a trained base and its compressed form."""
    folder = tmp_path_factory.mktemp("llama") / "run"
    arguments = ["--config", str(CONFIG), "--run-dir", str(folder)]
    assert load_script("02_compress").main(arguments) == 0
    return folder


@pytest.fixture(scope="module")
def ours(run_dir):
    """The model that is exported: tokens → fp32 logits."""
    model = load_model(run_dir / "02_compress/model", device=torch.device("cpu"))

    @torch.no_grad()
    def compute(tokens: list[int]) -> torch.Tensor:
        return model(input_ids=torch.tensor([tokens])).logits[0].float()

    return compute


@pytest.fixture(scope="module")
def tokenizer(run_dir):
    return load_tokenizer(run_dir / "02_compress/model")


@pytest.fixture(scope="module")
def held_out(run_dir, tokenizer) -> list[list[int]]:
    """Held-out conversations with at least POSITIONS tokens in all."""
    config = load(CONFIG)
    encoded = encode_files(config, run_dir, tokenizer)
    chosen, count = [], 0
    for index in select_usable(encoded, config.sequence_len).validation:
        chosen.append([int(token) for token in encoded.validation[index][0]])
        count += len(chosen[-1])
        if count >= POSITIONS:
            return chosen
    raise AssertionError(f"{count} held-out tokens")


@pytest.fixture(scope="module")
def results(request):
    """Rows that are written if all tests pass."""
    rows = []
    yield rows
    if not request.session.testsfailed:
        print(write("llama_cpp", f"cpu{os.cpu_count()}", "make test-llama", rows))


def export(run_dir: Path, kind: str) -> Path:
    arguments = ["--config", str(CONFIG), "--run-dir", str(run_dir), "--from", "compressed"]
    more = ["--to", "gguf", "--dense-type", kind, "--force"]
    assert load_script("05_export").main([*arguments, *more]) == 0
    return run_dir / "05_export/gguf/model.gguf"


def open_file(path: Path):
    return llama_cpp.Llama(str(path), n_ctx=1024, logits_all=True, verbose=False)


def theirs(llm, tokens: list[int]) -> torch.Tensor:
    llm.reset()
    llm.eval(tokens)
    return torch.from_numpy(np.array(llm.scores[: len(tokens)]))


def answer(llm, prompt: list[int]) -> list[int]:
    """Return up to ANSWER greedy tokens of llama.cpp."""
    llm.reset()
    found = list(itertools.islice(llm.generate(prompt, temp=0.0), ANSWER))
    ends = [place for place, token in enumerate(found) if token == llm.token_eos()]
    return found[: ends[0] + 1] if ends else found


@pytest.mark.parametrize("kind", AGREEMENT)
def test_the_next_token_is_ours(run_dir, ours, tokenizer, held_out, results, kind):
    """On held-out conversations, and on llama.cpp's own greedy answers in the chat template."""
    path = export(run_dir, kind)
    llm = open_file(path)
    try:
        same, count, distances = 0, 0, []
        for tokens in held_out:
            wanted, found = ours(tokens), theirs(llm, tokens)
            same += int((wanted.argmax(-1) == found.argmax(-1)).sum())
            count += len(tokens)
            distances.append(float((found - wanted).norm() / wanted.norm()))
        assert count >= POSITIONS
        same_answers, count_answers = compare_answers(llm, ours, tokenizer)
    finally:
        llm.close()
    case = {"dense_type": kind, "llama_cpp_python": llama_cpp.__version__}
    figures = {
        "held_out_positions": count,
        "held_out_agreement": same / count,
        "answer_positions": count_answers,
        "answer_agreement": same_answers / count_answers,
        "relative_logit_difference": max(distances),
    }
    results += [row(case, "llama.cpp", name, value, "1") for name, value in figures.items()]
    print(case, figures)
    assert same / count >= AGREEMENT[kind], figures
    assert (same + same_answers) / (count + count_answers) >= AGREEMENT[kind], figures


def compare_answers(llm, ours, tokenizer) -> tuple[int, int]:
    """Return how many tokens of greedy answers are ours too, and how many there are."""
    template = llm.metadata["tokenizer.chat_template"]
    render = Jinja2ChatFormatter(template=template, eos_token="", bos_token="")
    same = count = 0
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        text = render(messages=messages).prompt
        assert text == tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        prompt = llm.tokenize(text.encode(), add_bos=False, special=True)
        assert prompt == tokenizer(text, add_special_tokens=False)["input_ids"]
        found = answer(llm, prompt)
        wanted = ours([*prompt, *found]).argmax(-1)[len(prompt) - 1 : -1].tolist()
        same += sum(a == b for a, b in zip(found, wanted, strict=True))
        count += len(found)
    return same, count


def test_text_becomes_our_tokens_and_the_end_is_the_end(run_dir, tokenizer, held_out):
    llm = open_file(export(run_dir, "bf16"))
    try:
        for text in (*TEXTS, *map(tokenizer.decode, held_out)):
            wanted = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert llm.tokenize(text.encode(), add_bos=False, special=True) == wanted
        assert llm.token_eos() == tokenizer.eos_token_id
        assert llm.token_bos() == tokenizer.bos_token_id
    finally:
        llm.close()


def test_k_quants_are_llama_cpps_and_short_rows_get_the_next_type(run_dir):
    path = export(run_dir, "q4_k")
    kinds = {one.name: one.tensor_type.name for one in gguf.GGUFReader(path).tensors}
    assert kinds["blk.0.attn_output.weight"] == "Q4_K"  # rows of 256
    assert kinds["blk.0.attn_q.weight"] == kinds["output.weight"] == "Q5_0"  # rows of 128
    assert kinds["blk.0.ffn_up_exps.weight"] == "MXFP4"
