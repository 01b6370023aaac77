"""docs/combinations.md: each cell names a test that exists, each refusal what its test expects."""

import inspect
import re

import pytest
import torch
from transformers import GptOssForCausalLM

from benchmarks.shape_20b import config_20b
from tests.conftest import ROOT

PAGE = (ROOT / "docs/combinations.md").read_text(encoding="utf-8")
TESTS = dict(re.findall(r"^- (\w+): `(.+?)`", PAGE, re.M))
REASONS = dict(re.findall(r'^- (R\d): `.+?`:\n  "(.+)"$', PAGE, re.M))
GIB = 2**30


def list_cells() -> list[tuple[str, dict[str, str]]]:
    """Return each cell, and what the names of tests say in capital letters for it."""
    found, columns = [], []
    for line in re.findall(r"^\| (.+) \|$", PAGE.partition("## Memory")[0], re.M):
        head, *cells = line.split(" | ")
        if " process" in head:
            columns = [cell.rpartition(", ")[2] for cell in cells]
            continue
        trainer, trained = head.split(", ")
        for form, cell in zip(columns, cells, strict=True):
            row = {"TRAINER": trainer, "TRAINED": trained.replace("LoRA", "lora"), "FORM": form}
            found.append((cell, row))
    return found


CELLS = list_cells()


def test_a_cell_works_by_a_test_or_is_refused_for_a_reason():
    assert len(CELLS) == 7 * (3 + 3 + 6)
    for cell, _ in CELLS:
        assert re.fullmatch(r"works: [A-J]|refused: R\d|not shown", cell), cell
    named = re.findall(r"(?:works: |refused: |\()([A-J]|R\d)\b", PAGE)
    assert set(named) == TESTS.keys()
    assert REASONS.keys() == {key for key in TESTS if key.startswith("R")}


def test_each_named_test_exists(request):
    """Collected as pytest does, so that a test's parameters are compared too."""
    wanted = {(key, TESTS[key]) for key in REASONS}
    for cell, row in CELLS:
        if cell != "not shown":
            key = cell.partition(": ")[2]
            wanted.add(
                (key, re.sub("TRAINER|TRAINED|FORM", lambda m, row=row: row[m[0]], TESTS[key]))
            )
    for path in sorted({name.partition("::")[0] for _, name in wanted}):
        module = pytest.Module.from_parent(request.session, path=ROOT / path)
        functions = {item.name: item for item in request.session.genitems(module)}
        for key, name in wanted:
            file, _, test = name.partition("::")
            if file == path:
                assert test in functions, name
            if file == path and key in REASONS:
                assert REASONS[key] in inspect.getsource(inspect.getmodule(functions[test].obj))


def test_memory_is_that_of_the_counted_parameters():
    with torch.device("meta"):
        model = GptOssForCausalLM._from_config(config_20b())
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    experts = {name for name in sizes if re.search(r"experts\.\w+_proj$", name)}
    packed_bytes = sum(sizes[name] for name in experts) * 17 // 32  # 16 bytes of codes, one scale
    for row, frozen, added in (("full", set(), 0), ("dense", experts, packed_bytes)):
        trained = {name: size for name, size in sizes.items() if name not in frozen}
        layer = sum(size for name, size in trained.items() if name.startswith("model.layers.0."))
        largest = layer + sizes["lm_head.weight"]
        state, gathered = 16 * sum(trained.values()), 3 * 2 * largest + added
        wanted = [state, gathered, *(state / gpus + gathered for gpus in (2, 4, 8)), gathered]
        cells = [f"{size / GIB:.1f}" for size in wanted]
        assert f"\n| {row} | {' | '.join(cells)} |\n" in PAGE, cells
    assert f"{16_384 * 201_088 * 4 / GIB:.1f} GiB in fp32 at 16,384 tokens" in " ".join(
        PAGE.split()
    )
