"""Packed against per-step scoring of one trajectory: python benchmarks/score.py [--turns 10] [--model smollm2]

Plays an episode of that many turns, scores its responses both ways, prints the times, their ratio and the largest
difference.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from envs.alfworld import AlfworldEnv, cached_games
from models import load_model
from rescore import pack, response_logprobs
from rollout import Encoder, rollout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=10, help="turns of the episode")
    parser.add_argument("--model", default="smollm2", help="as for train.py")
    parser.add_argument("--repeats", type=int, default=3, help="timings of which the median is taken")
    args = parser.parse_args()
    model, tokenizer = load_model(args.model)
    model.eval()
    game = cached_games("small", "valid_seen", 1)
    style = "compact" if args.model == "tiny" else "official"
    torch.manual_seed(0)
    trajectories, _ = rollout(
        model,
        Encoder(tokenizer, "chat"),
        lambda: AlfworldEnv(max_steps=args.turns, prompt=style),
        game,
        1,
        max_new_tokens=24,
        context_limit=8192,
    )
    steps = trajectories[0].steps
    contexts, responses = [step.context for step in steps], [step.response for step in steps]
    scores, seconds = {}, {}
    for name, packed in (("per step", False), ("packed", True)):
        times = []
        for _ in range(args.repeats):
            started = time.perf_counter()
            scores[name] = response_logprobs(model, contexts, responses, packed=packed)
            times.append(time.perf_counter() - started)
        seconds[name] = statistics.median(times)
        tokens = sum(len(s.ids) for s in pack(contexts, responses, packed=packed))
        print(f"{name:>9}: {seconds[name]:7.3f} s, {tokens} tokens read")
    difference = (scores["per step"] - scores["packed"]).abs().nan_to_num().max().item()
    print(f"{len(steps)} turns: packed is {seconds['per step'] / seconds['packed']:.1f}x faster, ", end="")
    print(f"largest difference {difference:.1e}")


if __name__ == "__main__":
    main()
