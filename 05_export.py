#!/usr/bin/env python3
"""Stage 05: write the model in the forms that other tools open, each reloaded and compared.

Reads the fine-tuned model (or, with `--from compressed`, that of stage 02). Writes a directory for
each format, runs/NAME/05_export/FORMAT, with a manifest of its own:

    mxfp4     the published form of gpt-oss, for whatever opens openai/gpt-oss
    hf-bf16   everything in bf16, for transformers without any quantization
    adapter   LoRA for PEFT (and vLLM, if only attention has adapters), from runs without mask and
              rounding
    gguf      one file for llama.cpp; --dense-type is the type of all but the experts
    ollama    the same file, linked if it is there, and a Modelfile
    hub       the forms named beside it, or all that are finished, in a repository of the Hugging
              Face Hub (--repo OWNER/NAME) with a model card

    python 05_export.py --to mxfp4 gguf --run-dir runs/NAME

After an interruption, the same command keeps the files that are complete.
"""

import sys

from sparselong.data import check_tasks
from sparselong.export import CHOICE, check_formats, plan_export
from sparselong.memory import check_model, show_plan
from sparselong.processes import check_alone
from sparselong.report import write_page
from sparselong.run import Stage, run_parts

NAME = "05_export"


def execute(stage: Stage) -> None:
    """Export one format; torch is imported only after everything else is validated."""
    from sparselong.export import export

    export(stage)


def check(stages: list[Stage]) -> None:
    """Raise if several processes were started, or the config cannot give a format."""
    check_alone()
    check_formats(stages)
    check_model(stages[0].config)
    check_tasks(stages[0].config)


def main(argv: list[str] | None = None) -> int:
    """Export the formats; return the exit code."""
    text = "Export the model in the forms that other tools open."
    return run_parts(
        NAME, text, argv, execute, plan_export, show_plan, CHOICE, check, page=write_page
    )


if __name__ == "__main__":
    sys.exit(main())
