#!/usr/bin/env python3
"""Generation in gpt-oss-20b's shape at batch 1: first token, tokens per second, GPU memory.

Weights are random and made on the GPU, in the formats of stage 02's output: experts in MXFP4,
attention in int4 2:4. Every arm runs in its own process on the same prompt:

| arm      | what                                                                             |
|----------|----------------------------------------------------------------------------------|
| graph    | this project's `generate`: one captured step per token                           |
| kernels  | the same step, its kernels launched one by one                                   |
| packed   | transformers' `generate` over this project's packed model                        |
| eager    | transformers' `generate` over bf16 weights and its own attention                 |

The bound is the rate at which the GPU's memory, at the bandwidth on its data sheet, can read once
every weight that a token needs: packed attention, top-4 of 32 experts, routers, norms, biases and
lm_head, but neither cache nor activations. `load_seconds` is the time for building the model and
capturing the step.

`device_bytes` is the peak GPU memory of the process after the weights have been made: the peak that
torch's allocator has reserved since then (caches, capture, prompts, steps, unused blocks) plus
`context_bytes`, all other memory in use when generation ends (CUDA context, loaded kernels,
streams, the graph). The latter is read for the whole GPU, so no other process may use it.
`weights_bytes` is the size of all tensors before the first prompt, without the decoder, and
`allocated_bytes` the peak size of all tensors. Needs a CUDA device.

All these are of greedy generation, with prompts read whole. `graph` also measures, afterwards:
`sampled_throughput`, with the settings of SAMPLED; `turn_first_token_seconds`, of a prompt of
TURN_PREFIX tokens that were read before an answer and TURN_TAIL new ones; and
`tail_first_token_seconds`, of a prompt of the new ones alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import GptOssForCausalLM

from benchmarks.command_line import add_result, command_of, has_device, machine_of
from benchmarks.record import row, write
from benchmarks.shape_20b import build_baseline, build_packed, config_20b
from sparselong.generation.decoder import Decoder, generate
from sparselong.model.fused import fuse
from sparselong.model.packed_linear import PackedLinear

ARMS = ("graph", "kernels", "packed", "eager")
SHEET_BANDWIDTH = {"H200": 4.8e12, "H100": 3.35e12}
"""Bytes per second according to the vendor's data sheets, SXM versions."""
REPEATS = 3
SAMPLED = {"temperature": 1.0, "top_p": 0.95, "seed": 1}
TURN_PREFIX, TURN_TAIL, TURN_ANSWER = 4096, 256, 16


def sheet_bandwidth() -> float:
    """Return the bandwidth of this GPU; exit if it is not listed."""
    name = torch.cuda.get_device_name()
    for part, bandwidth in SHEET_BANDWIDTH.items():
        if part in name:
            return bandwidth
    sys.exit(f"no data sheet bandwidth for {name}: add it to SHEET_BANDWIDTH")


def active_bytes(model: GptOssForCausalLM) -> int:
    """Return bytes of the weights that one token reads, including one row of the embedding."""
    config: Any = model.config
    share = config.num_experts_per_tok / config.num_local_experts
    total = 0.0
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "rotary" in name:
            continue
        size = tensor.numel() * tensor.element_size()
        if ".experts." in name:
            size *= share
        elif "embed_tokens" in name:
            size /= config.vocab_size
        total += size
    return round(total)


def context_bytes() -> int:
    """Return device memory in use that torch has not reserved: CUDA context and libraries."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def make_model(arm: str, layers: int) -> GptOssForCausalLM:
    """Return the arm's model in eval mode."""
    config = config_20b(layers)
    if arm == "eager":
        return build_baseline(config, "eager").eval()
    model = build_packed(config, "masked")
    for module in model.modules():
        if isinstance(module, PackedLinear):
            del module.drawn  # the masters, which only training needs
    fuse(model)
    return model.eval()


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure one arm in this process and return its rows."""
    torch.manual_seed(0)
    begin = time.perf_counter()
    model = make_model(args.arm, args.layers)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    weights = torch.cuda.memory_allocated()
    decoder = None
    if args.arm in ("graph", "kernels"):
        decoder = Decoder(model, args.prompt + args.tokens, use_graph=args.arm == "graph")
    torch.cuda.synchronize()
    load_seconds = time.perf_counter() - begin
    prompt = torch.randint(model.config.vocab_size, (1, args.prompt), device="cuda")

    def follow(count: int, **settings: Any) -> list[int]:
        if decoder is None:
            out: Any = model.generate(
                prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False
            )
            return out[0, args.prompt :].tolist()
        decoder.forget()
        return list(generate(model, prompt, count, decoder=decoder, **settings))

    firsts, rates = time_generation(follow, args.tokens)
    case = {"prompt": args.prompt, "tokens": args.tokens, "layers": args.layers}
    reserved, context = torch.cuda.max_memory_reserved(), context_bytes()
    rows = [
        row(case, args.arm, "load_seconds", load_seconds, "s"),
        row(case, args.arm, "first_token_seconds", statistics.median(firsts), "s"),
        row(case, args.arm, "throughput", statistics.median(rates), "tokens/s"),
        row(case, args.arm, "device_bytes", reserved + context, "bytes"),
        row(case, args.arm, "context_bytes", context, "bytes"),
        row(case, args.arm, "allocated_bytes", torch.cuda.max_memory_allocated(), "bytes"),
        row(case, args.arm, "weights_bytes", weights, "bytes"),
    ]
    if args.arm != "eager":
        rows += compare_with_bound(model, args.arm, case, statistics.median(rates))
    if args.arm == "graph" and decoder is not None:
        _, sampled = time_generation(partial(follow, **SAMPLED), args.tokens)
        rate = statistics.median(sampled)
        rows.append(row(case, "graph", "sampled_throughput", rate, "tokens/s"))
        rows += time_turns(model, case)
        rows += time_steps(decoder, case)
    for entry in rows:
        print(f"{args.arm:8} {entry['metric']:22} {entry['value']:16.6g}", file=sys.stderr)
    return rows


def time_generation(follow: Any, tokens: int) -> tuple[list[float], list[float]]:
    """Return seconds to the first token and tokens per second after it, of several runs.

    Args:
        follow: generates as many tokens after the prompt as it is told.
        tokens: number of tokens.
    """
    follow(3)  # compiles the kernels for prompts
    firsts, rates = [], []
    for _ in range(REPEATS):
        firsts.append(time_call(lambda: follow(1)))
        seconds = time_call(lambda: follow(tokens))
        rates.append((tokens - 1) / (seconds - statistics.median(firsts)))
    return firsts, rates


def time_turns(model: GptOssForCausalLM, case: dict[str, Any]) -> list[dict[str, Any]]:
    """Return rows of the first token of a second turn, and of its new tokens alone."""
    decoder = Decoder(model, TURN_PREFIX + TURN_TAIL + TURN_ANSWER)
    vocab: Any = model.config.vocab_size
    prompt = torch.randint(vocab, (1, TURN_PREFIX + TURN_TAIL), device="cuda")
    prefix, tail = prompt[:, :TURN_PREFIX], prompt[:, TURN_PREFIX:]

    def follow(ids: torch.Tensor, count: int = 1) -> None:
        list(generate(model, ids, count, decoder=decoder))

    turns, alone = [], []
    for _ in range(REPEATS + 1):
        decoder.forget()
        alone.append(time_call(lambda: follow(tail)))
        follow(prefix, TURN_ANSWER)
        turns.append(time_call(lambda: follow(prompt)))
        if decoder.reused != TURN_PREFIX:
            sys.exit(f"the second turn reused {decoder.reused} tokens of {TURN_PREFIX}")
    case = {**case, "prefix": TURN_PREFIX, "tail": TURN_TAIL}
    medians = [statistics.median(times[1:]) for times in (turns, alone)]  # the first one compiles
    return [
        row(case, "graph", "turn_first_token_seconds", medians[0], "s"),
        row(case, "graph", "tail_first_token_seconds", medians[1], "s"),
    ]


def compare_with_bound(
    model: GptOssForCausalLM, arm: str, case: dict[str, Any], rate: float
) -> list[dict[str, Any]]:
    """Return rows of the bytes a token reads, the resulting bound, and `rate` relative to it."""
    needed = active_bytes(model)
    bound = sheet_bandwidth() / needed
    return [
        row(case, arm, "active_bytes", needed, "bytes"),
        row(case, arm, "bound", bound, "tokens/s"),
        row(case, arm, "share_of_bound", rate / bound, "1"),
    ]


def time_call(call: Any) -> float:
    """Return the duration of a call in seconds, including the device's work."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def time_steps(decoder: Decoder, case: dict[str, Any]) -> list[dict[str, Any]]:
    """Return rows of the device time of replayed steps, and of the kernels of a greedy one."""
    from torch.profiler import ProfilerActivity, profile

    position = int(decoder.step.position)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    rows = []
    for metric, is_sampled in (("step_ms", False), ("sampled_step_ms", True)):
        marks[0].record()
        for _ in range(50):
            decoder.step.position.fill_(position - 1)
            decoder.advance(is_sampled)
        marks[1].record()
        torch.cuda.synchronize()
        rows.append(row(case, "graph", metric, marks[0].elapsed_time(marks[1]) / 50, "ms"))
    decoder.step.position.fill_(position - 1)
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        decoder.advance()
        torch.cuda.synchronize()
    spent: dict[str, list[float]] = defaultdict(list)
    events: Any = trace.events()
    for event in events:
        if event.device_time > 0:
            spent[event.name].append(event.device_time)
    for kernel, times in sorted(spent.items(), key=lambda item: -sum(item[1])):
        print(f"  {sum(times):9.1f} us  {len(times):4} x  {kernel[:90]}", file=sys.stderr)
        rows.append(row(case, "graph", f"kernel_us: {kernel[:120]}", sum(times), "us"))
    return rows


def spawn(arm: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure one arm in a new process and return its rows."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        options = {"arm": arm, "out": out, "prompt": args.prompt, "tokens": args.tokens}
        options["layers"] = args.layers
        words = itertools.chain.from_iterable((f"--{k}", str(v)) for k, v in options.items())
        subprocess.run([sys.executable, __file__, *words], check=True)
        return json.loads(out.read_text(encoding="utf-8"))


def main() -> None:
    """Measure the chosen arms and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=256, help="tokens to generate")
    parser.add_argument("--layers", type=int, default=24, help="24 is the 20b")
    add_result(parser)
    for name in ("--arm", "--out"):  # for the process of one measurement
        parser.add_argument(name, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not has_device(__file__):
        return
    if args.arm:
        Path(args.out).write_text(json.dumps(measure(args)), encoding="utf-8")
        return
    rows = []
    machine = machine_of(args)
    command = command_of(__file__, args)
    for arm in args.arms:
        rows += spawn(arm, args)
        path = write("generation", machine, command, rows, args.folder)  # in case a later one fails
        print(path, file=sys.stderr)


if __name__ == "__main__":
    main()
