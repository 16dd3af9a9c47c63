"""Does bfloat16 pay on this machine? python lab/benchmarks/precision.py [--model smollm2]

Two things that a run spends its time on, in bfloat16 and in float32, in turn: the loss of an update with its gradient,
for a model under autocast, and a step of Muon in the warm start of the tiny model. Where the last column is below 1,
--mixed-precision auto means float32, and the warm start takes tiny/muon.py's Muon.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import torch

from lm.precision import multiplies_bfloat16
from lm.scoring import Sequence
from tiny.loading import load_model
from tiny.muon import ExactMuon
from tiny.supervised import demonstration_loss
from tiny.warmstart import tiny_model

Ways = dict[str, Callable[[], None]]  # "bfloat16", "float32" -> one go


def seconds(ways: Ways, repeats: int) -> dict[str, float]:
    """The median of each way, after one go that does not count; the ways take turns."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, go in ways.items():
            started = time.perf_counter()
            go()
            if turn:
                taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in taken.items()}


def losses(model, tokens: int) -> Ways:
    """The loss of one sequence, and its gradient."""
    torch.manual_seed(0)
    ids = torch.randint(4, model.config.vocab_size, (tokens,)).tolist()
    sequence = Sequence(ids, [(0, tokens // 2, tokens // 2)])

    def go(autocast: bool) -> None:
        demonstration_loss(model, [sequence], 0.0, autocast=autocast).backward()
        model.zero_grad()

    return {"bfloat16": lambda: go(True), "float32": lambda: go(False)}


def steps(words: int = 1000) -> Ways:
    """Muon's step on the tiny model's matrices."""
    ways = {}
    for name, kind in (("bfloat16", torch.optim.Muon), ("float32", ExactMuon)):
        matrices = [p for p in tiny_model(words, seed=0).model.layers.parameters() if p.ndim == 2]
        for matrix in matrices:
            matrix.grad = torch.randn_like(matrix)
        ways[name] = kind(matrices, lr=1e-3).step
    return ways


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="as of train.py")
    parser.add_argument("--tokens", type=int, default=512, help="of the sequence")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    model, _ = load_model(args.model)
    measured = {f"loss and gradient, {args.tokens} tokens": losses(model, args.tokens), "Muon's step": steps()}
    kind = torch.backends.cpu.get_cpu_capability()
    print(f"{kind}, {torch.get_num_threads()} threads; products in bfloat16: {multiplies_bfloat16('cpu')}")
    print(f"{'seconds':<32}{'bfloat16':>10}{'float32':>10}{'float32 / bfloat16':>20}")
    for name, ways in measured.items():
        taken = seconds(ways, args.repeats)
        ratio = taken["float32"] / taken["bfloat16"]
        print(f"{name:<32}{taken['bfloat16']:>10.3f}{taken['float32']:>10.3f}{ratio:>20.2f}")


if __name__ == "__main__":
    main()
