"""How each form is opened from the hub: text of the model card. No torch.

`{repo}` and `{base}` are names on the hub. What is said here of a form is also in README.md's table
of forms, which says what was run.
"""

from __future__ import annotations

HOW = {
    "mxfp4": """At the root of this repository, in openai/gpt-oss's published form, for whatever
opens that:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo}")
model = AutoModelForCausalLM.from_pretrained("{repo}", device_map="auto")
```""",
    "hf-bf16": """All weights in bf16, for transformers without any quantization:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo}", subfolder="hf-bf16")
model = AutoModelForCausalLM.from_pretrained("{repo}", subfolder="hf-bf16", device_map="auto")
```""",
    "adapter": """LoRA on the base, for PEFT. vLLM scales all adapters by one alpha / rank: open it
there only if attention alone has adapters. PEFT warns of the key `sparselong_base`, which has the
sha256 of the base's files and which it does not need.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "{repo}", subfolder="adapter")
```""",
    "gguf": """One file for llama.cpp:

```bash
llama-server --hf-repo {repo} --hf-file gguf/model.gguf
```""",
    "ollama": """The same kind of file with a Modelfile:

```bash
hf download {repo} --include "ollama/*" --local-dir .
ollama create {name} -f ollama/Modelfile
```""",
}
"""Markdown by form; `{name}` is the repository's name without its owner."""
