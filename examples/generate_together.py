"""Generate with a model that no single GPU can hold: each process holds a part of it.

    torchrun --standalone --nproc_per_node=4 examples/generate_together.py MODEL "a prompt"

The first process leads. The others compute their parts of its requests until `answer` returns.
"""

import argparse
import sys

from transformers import AutoTokenizer

import sparselong
from sparselong.errors import StageError


def answer(model) -> None:
    """Print the model's answer as it is generated; only the first process calls this."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    turns = [{"role": "user", "content": args.prompt}]
    prompt = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    stop = (tokenizer.eos_token_id,)
    for token in sparselong.generate(model, prompt["input_ids"], 256, stop=stop):
        print(tokenizer.decode([token]), end="", flush=True)
    print()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of a checkpoint, upstream's or a stage's")
    parser.add_argument("prompt", help="the user's message")
    args = parser.parse_args()
    try:
        sparselong.share_model(args.model, answer)
    except StageError as error:
        sys.exit(str(error))
