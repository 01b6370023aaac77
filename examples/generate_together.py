"""Generate with a model that no single GPU can hold: each process holds a part of it.

    torchrun --standalone --nproc_per_node=4 examples/generate_together.py MODEL "a prompt"

The first process leads. The others compute their parts of its requests until `answer` returns.
"""

import sys

from transformers import AutoTokenizer

import sparselong

MODEL, PROMPT = sys.argv[1], sys.argv[2]


def answer(model) -> None:
    """Print the model's answer as it is generated; only the first process calls this."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    turns = [{"role": "user", "content": PROMPT}]
    prompt = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    stop = (tokenizer.eos_token_id,)
    for token in sparselong.generate(model, prompt["input_ids"], 256, stop=stop):
        print(tokenizer.decode([token]), end="", flush=True)
    print()


if __name__ == "__main__":
    sparselong.share_model(MODEL, answer)
