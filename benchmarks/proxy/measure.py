#!/usr/bin/env python3
"""What the trained proxy can do, measured with stage 04's own functions.

    python3 benchmarks/proxy/measure.py --model CHECKPOINT --prepared FOLDER --machine NAME

Perplexity of held-out documents, by kind and by position up to 4K tokens; the same under a random
2:4 mask of q, k, v and o, and without attention, which must be worse, or the proxy would not show
what compression does; accuracy on the hellaswag items; RULER's score of each task and length; and
how evenly experts are used. FOLDER is `prepare.py`'s; its corpus file is not read.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
from transformers import AutoTokenizer

from benchmarks.command_line import add_result, command_of, machine_of
from benchmarks.proxy.shape import POSITIONS
from benchmarks.record import row, write
from sparselong.data import answer_tokens, score_answer
from sparselong.evaluate import perplexity
from sparselong.evaluate.answering import continue_prompts
from sparselong.evaluate.scoring import score
from sparselong.evaluate.spread import Spread
from sparselong.evaluate.work import Prompt, Request
from sparselong.model import load_model
from sparselong.tiny.measure import mask_attention_at_random, no_attention

_BATCH = 32
Rows = list[dict[str, Any]]


def main() -> None:
    """Measure the checkpoint and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint with its tokenizer")
    parser.add_argument("--prepared", type=Path, required=True, help="prepare.py's folder")
    parser.add_argument("--limit", type=int, help="most documents, items, and items of a task")
    add_result(parser)
    args = parser.parse_args()
    machine, command = machine_of(args), command_of(__file__, args)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = load_model(args.model, attn_implementation="sparselong")
    documents = read_rows(args.prepared / "held_out.jsonl", args.limit)
    rows = list(measure_text(model, tokenizer, documents))
    rows += measure_items(
        model, tokenizer, read_rows(args.prepared / "hellaswag.jsonl", args.limit)
    )
    rows += measure_tasks(model, tokenizer, read_rows(args.prepared / "ruler.jsonl"), args.limit)
    rows += list(measure_damage(model, tokenizer, documents))
    for each in rows:
        print(json.dumps(each))
    print(write("proxy", machine, command, rows, args.folder))


def measure_text(model: Any, tokenizer: Any, documents: Rows) -> Iterator[dict[str, Any]]:
    """Yield perplexities of documents of at most 4K tokens, and the routing meanwhile."""
    samples = _samples(tokenizer, documents)
    with _counted_routing(model) as counts:
        found = perplexity.measure(model, samples, _BATCH)
    yield row({"text": "all"}, "base", "perplexity", found["all"]["perplexity"], "")
    for each in found["by_position"]:
        case = {"text": "all", "first": each["first"], "last": each["last"]}
        yield row(case, "base", "perplexity", each["perplexity"], "")
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for document, (nll, tokens) in zip(documents, found["conversations"], strict=True):
        for kind in (document["kind"], f"{document['kind']} {document['language']}"):
            sums[kind][0] += nll
            sums[kind][1] += tokens
    for kind, (nll, tokens) in sorted(sums.items()):
        yield row({"text": kind}, "base", "perplexity", math.exp(nll / tokens), "")
    for layer, chosen in enumerate(counts):
        shares = chosen.double() / chosen.sum()
        entropy = -(shares * shares.clamp(min=1e-12).log()).sum().item() / math.log(len(shares))
        case = {"layer": layer}
        yield row(case, "base", "routing_entropy", entropy, "of its maximum")
        yield row(case, "base", "least_used_expert", shares.min().item(), "share")
        yield row(case, "base", "most_used_expert", shares.max().item(), "share")


def measure_items(model: Any, tokenizer: Any, items: Rows) -> Rows:
    """Return accuracies of hellaswag's kind, by likelihood and by likelihood per character."""
    requests = []
    for item in items:
        context = f"{item['activity_label']}: {item['ctx']}"
        before = tokenizer(context, add_special_tokens=False)["input_ids"]
        for ending in item["endings"]:
            after = tokenizer(f" {ending}", add_special_tokens=False)["input_ids"]
            requests.append(Request([*before, *after], len(after)))
    likelihoods = [each for each, _ in score(model, requests, _BATCH, Spread())]
    right: dict[str, list[bool]] = {"acc": [], "acc_norm": []}
    for number, item in enumerate(items):
        own = likelihoods[4 * number : 4 * number + 4]
        lengths = [len(ending) for ending in item["endings"]]
        per_character = [each / length for each, length in zip(own, lengths, strict=True)]
        right["acc"].append(own.index(max(own)) == item["label"])
        best = per_character.index(max(per_character))
        right["acc_norm"].append(best == item["label"])
    found = []
    for metric, each in right.items():
        mean = sum(each) / len(each)
        stderr = math.sqrt(mean * (1 - mean) / max(1, len(each) - 1))
        case = {"items": len(each)}
        found.append(row(case, "base", metric, mean, ""))
        found.append(row(case, "base", f"{metric}_stderr", stderr, ""))
    return found


def measure_tasks(model: Any, tokenizer: Any, items: Rows, limit: int | None) -> Rows:
    """Return the mean score of each of RULER's tasks and lengths."""
    groups: dict[tuple[str, int], Rows] = defaultdict(list)
    for item in items:
        groups[item["task"], item["length"]].append(item)
    chosen = [item for group in groups.values() for item in group[:limit]]
    prompts = [
        Prompt(item["prompt"], item["tokens"], answer_tokens(item["task"]), []) for item in chosen
    ]
    continued = continue_prompts(model, prompts, tokenizer, Spread())
    scores: dict[tuple[str, int], list[float]] = defaultdict(list)
    for item, answer in zip(chosen, continued, strict=True):
        scores[item["task"], item["length"]].append(score_answer(answer.text, item["answers"]))
    return [
        row({"task": task, "tokens": length}, "base", "score", sum(each) / len(each), "")
        for (task, length), each in scores.items()
    ]


def measure_damage(model: Any, tokenizer: Any, documents: Rows) -> Iterator[dict[str, Any]]:
    """Yield the perplexity without attention, and with a random 2:4 mask, which stays."""
    samples = _samples(tokenizer, documents)
    with no_attention(model):
        worst = perplexity.measure(model, samples, _BATCH)["all"]["perplexity"]
    yield row({"text": "all"}, "no attention", "perplexity", worst, "")
    mask_attention_at_random(model)
    masked = perplexity.measure(model, samples, _BATCH)["all"]["perplexity"]
    yield row({"text": "all"}, "random 2:4", "perplexity", masked, "")


def read_rows(path: Path, limit: int | None = None) -> Rows:
    """Return the first rows of a JSON-lines file."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for _, line in zip(range(limit or 2**31), file, strict=False)]


def _samples(tokenizer: Any, documents: Rows) -> list[perplexity.Sample]:
    found = []
    for document in documents:
        ids = tokenizer(document["text"], add_special_tokens=False)["input_ids"][:POSITIONS]
        found.append(perplexity.Sample(ids, [True] * len(ids)))
    return found


@contextmanager
def _counted_routing(model: Any) -> Iterator[list[torch.Tensor]]:
    """Count inside the block how often each layer's experts are chosen, padding included."""
    layers = model.model.layers
    experts = model.config.num_local_experts
    counts = [torch.zeros(experts, dtype=torch.long) for _ in layers]

    def hook(layer: int) -> Any:
        def count(module: Any, arguments: Any, output: Any) -> None:
            counts[layer] += torch.bincount(output[2].flatten(), minlength=experts).cpu()

        return count

    hooks = [each.mlp.router.register_forward_hook(hook(i)) for i, each in enumerate(layers)]
    try:
        yield counts
    finally:
        for each in hooks:
            each.remove()


if __name__ == "__main__":
    main()
