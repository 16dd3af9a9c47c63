"""How close the model's own work comes to bare matrix products: python benchmarks/efficiency.py [--model smollm2]

    scoring    log-probs of packed conversations, no gradient
    update     the same with a backward pass
    decoding   new tokens from a KV cache that holds those conversations

For each phase: FLOPs that the model needs / seconds that it took, over the rate of torch.matmul alone on every weight
matrix of the model, one after the other, with as many tokens and in the same precision. Then where the time of one more
pass went, by kind of operator, from torch.profiler. Runs on the GPU where there is one. `--model random`: a tiny random
model, to try the benchmark.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from lab.benchmarks.generation import endless
from lab.benchmarks.score import load, play
from lm.encoder import Encoder
from lm.logprobs import CHUNK, has_linear_head, sequence_logprobs
from lm.packing import Sequence, pack

# Kinds of operators by a part of their names, the first that fits; those of the last kind by their whole names.
KINDS = {
    "attention": ("attention",),
    "softmax": ("softmax",),
    "matmul": ("::mm", "addmm", "bmm", "matmul", "linear"),
    "copies": ("copy", "clone", "cat", "gather", "scatter", "index", "masked", "fill_", "zero", "repeat", "embedding"),
}
ELEMENTWISE = {
    *("add", "addcmul", "sub", "rsub", "mul", "div", "neg", "pow", "sqrt", "rsqrt", "exp", "log", "silu", "gelu"),
    *("sigmoid", "cos", "sin", "mean", "sum", "norm", "rms_norm", "fused_rms_norm", "tanh", "maximum", "minimum"),
}


@dataclass
class Phase:
    """`work` is what is timed; `prepare` makes what it uses up, outside the time."""

    name: str
    tokens: int  # that go through the layers
    scored: int  # that go through the output layer
    flops: float
    work: Callable
    products: Callable  # the matrix products with weights, and nothing else
    prepare: Callable = lambda: None


def forward_flops(model, tokens: int, scored: int, attended: int) -> float:
    """Of one forward pass: 2 for each weight of a matrix and token, the output layer's for `scored` tokens alone, and
    4 x width for each layer and pair of a query and a key that it sees (`attended` of them): scores, then values."""
    head, config = model.get_output_embeddings(), model.config
    weights = sum(layer.weight.numel() for layer in linear_layers(model) if layer is not head)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 4 * config.num_attention_heads * size * config.num_hidden_layers * attended
    return 2 * weights * tokens + 2 * head.weight.numel() * scored + attention


def linear_layers(model) -> list[torch.nn.Linear]:
    """Everything that multiplies by a matrix of weights, the output layer too."""
    return [module for module in model.modules() if isinstance(module, torch.nn.Linear)]


def causal(start: int, count: int) -> int:
    """Keys seen by `count` queries that follow `start` tokens, each one itself and all before it."""
    return count * start + count * (count + 1) // 2


def products(model, tokens: int, scored: int, dtype: torch.dtype, *, backward: bool = False) -> Callable:
    """A function that multiplies by every weight matrix as a pass does: in the forward direction, and in a backward
    pass for the gradients of input and weight. The output layer's tokens come in chunks, as in lm/logprobs.py."""
    head, device = model.get_output_embeddings(), model.device
    chunk = max(1, CHUNK // head.out_features)
    work = []
    for layer in linear_layers(model):
        weight = layer.weight.detach().to(dtype)  # (out, in)
        counts = torch.arange(scored).split(chunk) if layer is head else [range(tokens)]
        work += [(weight, len(count)) for count in counts]
    states = torch.randn(max(count * max(weight.shape) for weight, count in work), device=device).to(dtype)

    def of_width(count: int, width: int) -> torch.Tensor:
        return states[: count * width].view(count, width)  # (count, width)

    def multiply() -> None:
        for weight, count in work:
            given, gradient = of_width(count, weight.shape[1]), of_width(count, weight.shape[0])
            torch.matmul(given, weight.T)
            if backward:
                torch.matmul(gradient, weight)
                torch.matmul(gradient.T, given)

    return multiply


def reading(model, sequences: list[Sequence], dtype: torch.dtype) -> tuple[Phase, Phase]:
    """Scoring and update, on the same sequences as one micro-batch."""
    tokens = sum(len(sequence.ids) for sequence in sequences)
    scored = sum(size for sequence in sequences for _, _, size in sequence.responses)
    flops = forward_flops(model, tokens, scored, sum(causal(0, len(sequence.ids)) for sequence in sequences))

    @torch.no_grad()
    def scoring() -> None:
        model.eval()
        sequence_logprobs(model, sequences, 1.0)

    def update() -> None:
        model.train()
        sequence_logprobs(model, sequences, 1.0)[0].mean().neg().backward()
        model.zero_grad()

    sizes = (tokens, scored)
    # a backward pass is two products for each one of the forward pass
    return (
        Phase("scoring", *sizes, flops, scoring, products(model, *sizes, dtype)),
        Phase("update", *sizes, 3 * flops, update, products(model, *sizes, dtype, backward=True)),
    )


def decoding(model, tokenizer, sequences: list[Sequence], new_tokens: int, dtype: torch.dtype, amp) -> Phase:
    """`new_tokens` more of each sequence, which are all of one length, from a cache that holds it."""
    rows, length = len(sequences), len(sequences[0].ids)
    ids = torch.tensor([sequence.ids for sequence in sequences], device=model.device)  # (rows, length)
    config, held = endless(model, tokenizer, new_tokens), {}

    def prepare() -> None:
        model.eval()
        if not held:
            with torch.no_grad(), amp():
                held["cache"] = model(ids[:, :-1], use_cache=True, logits_to_keep=1).cache
        held["copy"] = copy.deepcopy(held["cache"])

    @torch.no_grad()
    def work() -> None:
        model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, cache=held["copy"])

    step = products(model, rows, rows, dtype)

    def multiply() -> None:
        for _ in range(new_tokens):
            step()

    count = rows * new_tokens
    flops = forward_flops(model, count, count, rows * causal(length - 1, new_tokens))
    return Phase("decoding", count, count, flops, work, multiply, prepare)


def clock(work: Callable, device: torch.device) -> float:
    """Seconds until it is done, on the device too."""
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(phase: Phase, device: torch.device, repeats: int, amp) -> tuple[float, float]:
    """Median seconds of (the phase, its bare products), turn about, after one of each that is not counted."""
    times = []
    for _ in range(repeats + 1):
        phase.prepare()
        with amp():
            took = clock(phase.work, device)
        times.append((took, clock(phase.products, device)))
    works, bare = zip(*times[1:], strict=True)
    return statistics.median(works), statistics.median(bare)


def kind_of(operator: str) -> str:
    """Of an operator and of its backward version alike."""
    if operator.removeprefix("aten::").strip("_").removesuffix("_backward") in ELEMENTWISE:
        return "elementwise"
    return next((kind for kind, parts in KINDS.items() if any(part in operator for part in parts)), "other")


def account(phase: Phase, device: torch.device, amp) -> tuple[dict[str, dict[str, float]], float]:
    """({kind: {operator: seconds of its own}}, seconds of the pass) with the profiler on, which slows it down."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]
    phase.prepare()
    with profile(activities=activities) as profiler, amp():
        whole = clock(phase.work, device)
    kinds: dict[str, dict[str, float]] = {}
    for event in profiler.key_averages():
        # on a GPU, operators have the time of the kernels that they started: those are not counted once more
        spent = event.self_device_time_total if cuda else event.self_cpu_time_total
        if event.device_type == DeviceType.CPU and spent > 0:
            kinds.setdefault(kind_of(event.key), {})[event.key] = spent / 1e6
    return kinds, whole


def account_table(kinds: dict[str, dict[str, float]], whole: float) -> str:
    """A line a kind with its share of the pass and its three largest operators; the rest was spent between them."""
    lines = []
    for kind, spent in sorted(kinds.items(), key=lambda item: -sum(item[1].values())):
        largest = sorted(spent, key=lambda operator: -spent[operator])[:3]
        names = ", ".join(f"{name} {100 * spent[name] / whole:.1f}%" for name in largest)
        lines.append(f"  {kind:<12}{100 * sum(spent.values()) / whole:>6.1f}%  {names}")
    rest = whole - sum(sum(spent.values()) for spent in kinds.values())
    return "\n".join([*lines, f"  {'no operator':<12}{100 * max(rest, 0) / whole:>6.1f}%  Python, or an idle GPU"])


def recomputed(model, scored: int, flops: float) -> str:
    """Whether lm/logprobs.py computes the output layer again in the backward pass. Not counted as the model's work."""
    again = 2 * model.get_output_embeddings().weight.numel() * scored
    if scored * model.config.vocab_size <= CHUNK or not has_linear_head(model):
        return "the update computes nothing twice: all logits fit in one chunk"
    return f"not counted: the update computes the output layer's chunks twice, {100 * again / flops:.1f}% more FLOPs"


def row(phase: Phase, seconds: float, bare: float) -> str:
    speed, rate = phase.flops / seconds / 1e9, phase.flops / bare / 1e9
    return (
        f"{phase.name:<10}{phase.tokens:>8}{phase.scored:>8}{phase.flops / 1e9:>10.2f}{seconds:>9.3f}"
        f"{speed:>10.1f}{rate:>10.1f}{100 * speed / rate:>6.1f}%"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="as for train.py, or 'random'")
    parser.add_argument("--precision", choices=["float32", "autocast"], default="float32", help="autocast: to bfloat16")
    parser.add_argument("--turns", type=int, default=5, help="T: turns of the conversation")
    parser.add_argument("--rows", type=int, default=1, help="how many times it is in the micro-batch")
    parser.add_argument("--new-tokens", type=int, default=32, help="decoded by each row")
    parser.add_argument("--repeats", type=int, default=3, help="timings of which the median is taken")
    args = parser.parse_args()
    model, tokenizer, prompt = load(args.model)
    trajectory = play(model, Encoder(tokenizer, "chat"), prompt, args.turns)
    contexts, responses = zip(*((step.context, step.response) for step in trajectory.steps), strict=True)
    sequences = pack(list(contexts), list(responses)) * args.rows
    half, device = args.precision == "autocast", model.device
    dtype = torch.bfloat16 if half else model.dtype
    amp = lambda: torch.autocast(device.type, torch.bfloat16, enabled=half)
    print(f"{args.model} on {device.type}, {torch.get_num_threads()} CPU threads, {args.precision}")
    print(
        f"{'phase':<10}{'tokens':>8}{'scored':>8}{'GFLOP':>10}{'seconds':>9}{'GFLOP/s':>10}{'matmul':>10}{'share':>7}"
    )
    phases = [
        *reading(model, sequences, dtype),
        decoding(model, tokenizer, sequences[-1:] * args.rows, args.new_tokens, dtype, amp),
    ]
    for phase in phases:
        print(row(phase, *measure(phase, device, args.repeats, amp)), flush=True)
    print(recomputed(model, phases[1].scored, phases[1].flops))
    for phase in phases:
        kinds, whole = account(phase, device, amp)
        print(f"{phase.name}: where {whole:.3f} s went, profiled\n{account_table(kinds, whole)}", flush=True)


if __name__ == "__main__":
    main()
