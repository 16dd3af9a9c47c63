"""Memory of log-probs in chunks against all logits at once: python lab/benchmarks/memory.py [--out memory.png]

Trains a small random Llama for one forward and backward pass on T tokens, every one of them scored, with a vocabulary
of V words, each case in a process of its own. The number is the peak above what the model, its gradients and a first
pass on a few tokens had taken: torch.cuda.max_memory_allocated on a GPU, else the most that the process had resident.
Prints a table and draws it over T for each V.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import matplotlib
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lm.precision import device_of
from lm.scoring import token_logprobs
from memory.machine import peak_mib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

WAYS = ("at once", "chunked")


def case(way: str, tokens: int, vocabulary: int) -> dict[str, float]:
    """Run in a fresh process: (MiB above the baseline, seconds)."""
    device = device_of()
    shape = LlamaConfig(
        vocab_size=vocabulary,
        max_position_embeddings=tokens,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    model = LlamaForCausalLM(shape).to(device)

    def step(count: int) -> None:
        ids = torch.randint(0, vocabulary, (1, count), device=device)
        inputs, keep = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, torch.ones_like(ids).bool()
        chunk = 2**62 if way == "at once" else None
        token_logprobs(model, inputs, keep, ids[0], 1.0, chunk=chunk).sum().backward()

    # Gradients of the weights exist after it, and the second use of them adds up: both are part of any training.
    step(8)
    step(8)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before, started = peak_mib(device), time.perf_counter()
    step(tokens)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return {"mib": peak_mib(device) - before, "seconds": time.perf_counter() - started}


def measure(way: str, tokens: int, vocabulary: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--case", way, str(tokens), str(vocabulary)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{way}, {tokens} tokens, {vocabulary} words: {done.stderr[-1000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def draw(results: dict, tokens: list[int], vocabularies: list[int], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for color, vocabulary in enumerate(vocabularies):
        for way, line in zip(WAYS, ("--", "-"), strict=True):
            peaks = [results[way, count, vocabulary]["mib"] for count in tokens]
            axes.plot(tokens, peaks, line, marker="o", color=f"C{color}", label=f"{vocabulary:,} words, {way}")
    axes.set(xlabel="scored tokens in one pass", ylabel="peak memory of the pass, MiB", ylim=(0, None))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048, 4096], help="T: scored tokens")
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[49152, 151936], help="V: words")
    parser.add_argument("--out", type=Path, default=Path("memory.png"), help="the plot")
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)  # what a process of its own is started with
    args = parser.parse_args()
    if args.case:
        way, tokens, vocabulary = args.case
        print(json.dumps(case(way, int(tokens), int(vocabulary))))
        return
    print(f"{'V':>8}{'T':>7}{'logits, MiB':>13}  {'way':<9}{'peak, MiB':>10}{'seconds':>9}")
    results = {}
    for vocabulary in args.vocabularies:
        for tokens in args.tokens:
            for way in WAYS:
                results[way, tokens, vocabulary] = found = measure(way, tokens, vocabulary)
                print(f"{vocabulary:>8}{tokens:>7}{tokens * vocabulary / 2**18:>13.0f}  {way:<9}", end="")
                print(f"{found['mib']:>10.0f}{found['seconds']:>9.2f}", flush=True)
    draw(results, args.tokens, args.vocabularies, args.out)
    print(f"plot: {args.out}")


if __name__ == "__main__":
    main()
