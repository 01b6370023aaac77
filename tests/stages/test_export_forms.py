"""Which tool opens which form: README's table names what tests open, and no more."""

import re
import subprocess

import torch
from safetensors.torch import load_file, save_file

from sparselong.export.formats import FORMATS
from sparselong.export.hub.loading import HOW
from sparselong.model import load_model
from tests.conftest import ROOT
from tests.stages import (
    test_export,
    test_export_adapter,
    test_export_gguf,
    test_export_hub,
)
from tests.stages.trained import CPU, TOKENS

MODELS = ("02_compress/model", "03_finetune/model")
OPEN_PACKED = """
import sys, torch
import sparselong
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
tokens = load_file(sys.argv[1])["tokens"]
found = {}
for folder in sys.argv[3:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        found[folder] = model(input_ids=tokens).logits
save_file(found, sys.argv[2])
"""


def test_packed_models_open_with_transformers_after_import_sparselong(
    trained_run, tmp_path, forked_python
):
    """transformers is imported first; in tests/model/test_loading.py sparselong is."""
    folders = [str(trained_run.run_dir / name) for name in MODELS]
    save_file({"tokens": TOKENS}, tmp_path / "tokens")
    command = [forked_python, "-c", OPEN_PACKED, tmp_path / "tokens", tmp_path / "logits"]
    done = subprocess.run([*command, *folders], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "logits")
    with torch.no_grad():
        compressed = load_model(folders[0], device=CPU)(input_ids=TOKENS).logits
    for folder, wanted in zip(folders, (compressed, trained_run.logits), strict=True):
        assert (found[folder] - wanted).norm() < 1e-5 * wanted.norm(), folder
    assert (compressed - trained_run.logits).norm() > 0.01 * compressed.norm()


OPENED = {
    **dict.fromkeys(
        MODELS,
        {
            "transformers after `import sparselong`": (
                test_packed_models_open_with_transformers_after_import_sparselong
            )
        },
    ),
    **dict.fromkeys(
        ("mxfp4", "hf-bf16"),
        {
            "transformers": (
                test_export.test_plain_transformers_gives_the_logits_of_the_model_in_memory
            )
        },
    ),
    "adapter": {"PEFT": test_export_adapter.test_peft_on_the_base_gives_the_unrounded_model},
    "gguf": {
        "gguf": (
            test_export_gguf.test_the_packages_reader_decodes_every_tensor_to_the_sources_values
        ),
        "llama.cpp": "test_llama_cpp.py::test_the_next_token_is_ours",
    },
    "ollama": {
        "gguf": test_export_gguf.test_ollama_has_the_same_file_once_and_a_template_of_harmony,
        "llama.cpp": "test_llama_cpp.py::test_the_next_token_is_ours",
    },
    "hub": {"a hub of the tests' own": test_export_hub.test_a_hub_gets_the_exports_and_the_card},
}
"""The test that opens a form with a tool, by form and tool. llama.cpp's is not imported here: it
needs llama-cpp-python, which `make test-llama` installs."""


def test_the_readmes_table_names_what_tests_open():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text[text.index("**Which tool opens which form.**") :].split("\n\n")[1]
    shown = {}
    for line in table.splitlines()[2:]:
        forms, tools, _ = (cell.strip() for cell in line.strip("|").split("|"))
        for name in re.findall(r"`([\w/-]+)(?: --repo OWNER/NAME)?`", forms):
            if name != "--dense-type":
                shown[name] = [tool.strip() for tool in tools.split(", ")]
    assert shown == {form: [*tools] for form, tools in OPENED.items()}
    names = {each.name for each in FORMATS}
    assert {*MODELS, *names} == shown.keys() and names - {"hub"} == HOW.keys()
    for test in (test for tools in OPENED.values() for test in tools.values()):
        if isinstance(test, str):
            file, _, name = test.partition("::")
            assert f"def {name}(" in (ROOT / "tests/stages" / file).read_text()
